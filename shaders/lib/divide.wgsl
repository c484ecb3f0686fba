// a / b rounded to nearest for normal a and b; quotients too small to be normal become 0. WGSL's own division may be
// 2.5 ulp off. Long division of the 24-bit significands to 25 bits, the last of which decides: no quotient lies halfway
// between two floats, since 25 significant bits times those of b do not fit in a.
fn divide(a: f32, b: f32) -> f32 {
  let a_bits = bitcast<u32>(a);
  let b_bits = bitcast<u32>(b);
  if ((a_bits & 0x7fffffffu) == 0u) { return 0.0; }
  let sign = (a_bits ^ b_bits) & 0x80000000u;
  var exponent = i32((a_bits >> 23u) & 0xffu) - i32((b_bits >> 23u) & 0xffu) + 127;
  let divisor = (b_bits & 0x7fffffu) | 0x800000u;
  var rest = (a_bits & 0x7fffffu) | 0x800000u;
  if (rest < divisor) {
    rest <<= 1u;
    exponent -= 1;
  }
  if (exponent < 1) { return 0.0; }
  var quotient = 0u;
  for (var bit = 0u; bit < 25u; bit++) {
    quotient <<= 1u;
    if (rest >= divisor) {
      rest -= divisor;
      quotient |= 1u;
    }
    rest <<= 1u;
  }
  let significand = (quotient >> 1u) + (quotient & 1u);
  // A carry out of the significand flows into the exponent, as it should.
  return bitcast<f32>(sign | ((u32(exponent) << 23u) + (significand - 0x800000u)));
}
