// The two 16-bit floats of a word as f32, the low half first. Both are exact, and neither needs the f16 feature.
fn widen_bf16(bits: u32) -> vec2<f32> {
  return bitcast<vec2<f32>>(vec2<u32>(bits << 16u, bits & 0xffff0000u));
}
fn widen_half(bits: u32) -> vec2<f32> {
  return unpack2x16float(bits);
}
