// out[p] = sum of page[i]^2 over the p-th CHUNK of a page. Sums are f32. `=`.
// One workgroup of 256 per chunk. Grid: PARTS, folded.
{% include "lib/grid.wgsl" %}
{% include "lib/reduce.wgsl" %}

@compute @workgroup_size({{ WIDTH }})
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let part = linear_workgroup(group, groups);
  let end = min((part + 1u) * {{ CHUNK }}u, {{ N }}u);
  var total = 0.0;
  for (var i = part * {{ CHUNK }}u + thread; i < end; i += {{ WIDTH }}u) { total += page[i] * page[i]; }
  total = workgroup_sum(total, thread);
  if (part < {{ PARTS }}u && thread == 0u) { out[part] = total; }
}
