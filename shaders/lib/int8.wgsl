// 127 / absmax, for rounding a block to int8: the quotient of integers, cut to 17 bits, so that every device and the
// reference get the same codes (WGSL's own division may be off by 2.5 ulp). The significand of absmax is rounded up to 16
// bits and the quotient down: absmax times it is at most 127. 0 where absmax is below 2^-120 or not below 2^117.
fn inverse_of(absmax: f32) -> f32 {
  let bits = bitcast<u32>(absmax);
  let exponent = bits >> 23u;
  let top = ((bits & 0x7fffffu) + 0x8000ffu) >> 8u;
  let power = bitcast<f32>((244u - clamp(exponent, 7u, 243u)) << 23u);
  return select(0.0, f32({{ 127 * 2 ** 25 }}u / top) * power, exponent >= 7u && exponent < 244u);
}
