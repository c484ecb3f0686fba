// Rotary embedding of x [T, WIDTH] by head: pair (i, i + HALF) rotated by the angle of its row's position
// (RoFormer, arXiv 2104.09864, eq. 34). f32, nothing is summed. `=`.
// One invocation per pair. Grid: ceil(PAIRS / 256), folded.
{% include "lib/grid.wgsl" %}

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let pair = linear_workgroup(group, groups) * 256u + thread;
  if (pair >= {{ PAIRS }}u) { return; }
  let i = pair % {{ HALF }}u;
  let at = (pair / {{ HALF }}u) * {{ 2 * HALF }}u + i;
  let row = at / {{ WIDTH }}u;
  let angle = min(positions[row], arrayLength(&table) / {{ 2 * HALF }}u - 1u) * {{ 2 * HALF }}u + i;
  let cosine = table[angle];
  let sine = {{ sign }}table[angle + {{ HALF }}u];
  let first = {{ source }}[at];
  let second = {{ source }}[at + {{ HALF }}u];
  y[at] = first * cosine - second * sine;
  y[at + {{ HALF }}u] = second * cosine + first * sine;
}
