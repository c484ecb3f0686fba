// dk[t, k, e] = sum over the query heads of group k of partial_k[t, h, e], and dv likewise. Sums are f32. `=`.
// One invocation per element of [tokens, HEADS, E], HEADS of the K heads that a token has in dk and dv.
// Grid: ceil(SIZE / 256), folded.
{% include "lib/grid.wgsl" %}

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let i = linear_workgroup(group, groups) * 256u + thread;
  if (i >= {{ SIZE }}u) { return; }
  let first = (i / {{ E }}u) * {{ GROUP * E }}u + i % {{ E }}u;
  var k = 0.0;
  var v = 0.0;
  for (var member = 0u; member < {{ GROUP }}u; member++) {
    k += partial_k[first + member * {{ E }}u];
    v += partial_v[first + member * {{ E }}u];
  }
  let at = (i / {{ HEADS * E }}u) * {{ K * E }}u + i % {{ HEADS * E }}u;
  dk[{{ BASES.dk }}at] = k;
  dv[{{ BASES.dv }}at] = v;
}
