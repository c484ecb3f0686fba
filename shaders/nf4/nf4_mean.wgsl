// mean[0] = mean of the block scales absmax[0 .. blocks), within an ulp of the exact one. `=`. One workgroup of 256.
// Sums are pairs (high, low): low gathers what rounding took from high (Knuth, The Art of Computer Programming 2,
// 4.2.2, theorem B). code[{{ zero }}] is a zero that the compiler does not know, so it cannot cancel terms.
{% include "lib/divide.wgsl" %}
var<workgroup> sums: array<vec2<f32>, 256>;

fn opaque(value: f32) -> f32 {
  return bitcast<f32>(bitcast<u32>(value) ^ bitcast<u32>(code[{{ zero }}]));
}

fn add(a: vec2<f32>, b: vec2<f32>) -> vec2<f32> {
  let sum = opaque(a.x + b.x);
  let part = opaque(sum - a.x);
  let lost = (a.x - opaque(sum - part)) + (b.x - part);
  return vec2<f32>(sum, a.y + b.y + lost);
}

@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) thread: u32) {
  var sum = vec2<f32>();
  for (var i = thread; i < {{ blocks }}u; i += 256u) { sum = add(sum, vec2<f32>(absmax[i], 0.0)); }
  sums[thread] = sum;
  workgroupBarrier();
  for (var half = 128u; half > 0u; half >>= 1u) {
    if (thread < half) { sums[thread] = add(sums[thread], sums[thread + half]); }
    workgroupBarrier();
  }
  if (thread == 0u) { mean[0] = divide(sums[0].x + sums[0].y, {{ blocks }}.0); }
}
