// a / b rounded to nearest, ties to even, for finite a and b with normal results: WGSL's own division may be 2.5 ulp
// off. Long division of the 24-bit significands, 26 quotient bits and a sticky one.
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
  var quotient = 0u;
  for (var bit = 0u; bit < 26u; bit++) {
    quotient <<= 1u;
    if (rest >= divisor) {
      rest -= divisor;
      quotient |= 1u;
    }
    rest <<= 1u;
  }
  // 26 bits: 24 kept, a half and a quarter; what remains is sticky.
  let kept = quotient >> 2u;
  let tail = ((quotient & 3u) << 1u) | select(0u, 1u, rest != 0u);
  let up = tail > 4u || (tail == 4u && (kept & 1u) == 1u);
  let significand = kept + select(0u, 1u, up);
  // A carry out of the significand flows into the exponent, as it should.
  return bitcast<f32>(sign | ((u32(exponent) << 23u) + (significand - 0x800000u)));
}
