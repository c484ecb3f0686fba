// Pseudo-random words for benchmarks: a PCG hash of (seed, index), as raw bits, as f32 in +-spread, or as two bf16 in
// +-spread. `=`. One invocation a word. Grid: ceil(words / 256), folded.
{% include "lib/grid.wgsl" %}

fn hash(value: u32) -> u32 {
  let state = value * 747796405u + 2891336453u;
  let word = ((state >> ((state >> 28u) + 4u)) ^ state) * 277803737u;
  return (word >> 22u) ^ word;
}

fn spread(bits: u32) -> f32 {
  return (f32(bits & 0xffffu) / 32768.0 - 1.0) * {{ spread }};
}

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let i = linear_workgroup(group, groups) * 256u + thread;
  if (i >= {{ words }}u) { return; }
  let bits = hash(i ^ hash({{ seed }}u));
{% if dtype == "f32" %}
  out[i] = spread(bits >> 8u);
{% elif dtype == "bf16" %}
  out[i] = (bitcast<u32>(spread(bits)) >> 16u) | (bitcast<u32>(spread(bits >> 16u)) & 0xffff0000u);
{% else %}
  out[i] = bits;
{% endif %}
}
