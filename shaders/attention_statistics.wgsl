// What attention's backward needs of each query and head: statistics[0] = lse, statistics[1] = sum over E of out dout.
// One invocation a (token, head) of ROWS. Grid: ceil(ROWS / 64), folded. `=`.
{% include "_grid.wgsl" %}

@compute @workgroup_size(64)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let row = linear_workgroup(group, groups) * 64u + thread;
  if (row >= {{ ROWS }}u) { return; }
  var total = 0.0;
  for (var e = 0u; e < {{ E }}u; e++) { total += out[row * {{ E }}u + e] * dout[row * {{ E }}u + e]; }
  statistics[row] = lse[row];
  statistics[{{ ROWS }}u + row] = total;
}
