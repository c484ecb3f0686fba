// The keys k and values v of T tokens to their places (slot, position) in caches [SLOTS, CONTEXT, ..]; `=`. A token whose
// place the caches do not have is left out.
// One invocation per vector of k. Grid: ceil(T WIDTH / 64), folded.
{% include "lib/grid.wgsl" %}

@compute @workgroup_size(64)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let i = linear_workgroup(group, groups) * 64u + thread;
  if (i >= {{ T * WIDTH }}u) { return; }
  let t = i / {{ WIDTH }}u;
  let slot = slots[t];
  let position = positions[t];
  if (slot >= {{ SLOTS }}u || position >= {{ CONTEXT }}u) { return; }
  let at = (slot * {{ CONTEXT }}u + position) * {{ WIDTH }}u + i % {{ WIDTH }}u;
  keys[at] = {{ element }}(k[i]);
  values[at] = {{ element }}(v[i]);
}
