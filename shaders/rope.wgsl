// Rotary embedding of x [T, WIDTH] by head of E: pair (i, i + HALF), or (2 i, 2 i + 1) if INTERLEAVED, rotated by the
// angle of its row's position (RoFormer, arXiv 2104.09864, eq. 34). Columns from 2 HALF on are copied, unless x lies in y.
// f32, nothing is summed. `=`.
// One invocation per pair. Grid: ceil(PAIRS / 256), folded.
{% set SHARED = source == "y" %}
{% set PER_HEAD = HALF if SHARED else E // 2 %}
{% set STEP = 1 if INTERLEAVED else HALF %}
{% include "lib/grid.wgsl" %}

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let pair = linear_workgroup(group, groups) * 256u + thread;
  if (pair >= {{ PAIRS }}u) { return; }
  let i = pair % {{ PER_HEAD }}u;
{% if E != 2 * HALF and not SHARED %}
  if (i >= {{ HALF }}u) {
    let rest = (pair / {{ PER_HEAD }}u) * {{ E }}u + 2u * i;
    y[rest] = x[rest];
    y[rest + 1u] = x[rest + 1u];
    return;
  }
{% endif %}
  let at = (pair / {{ PER_HEAD }}u) * {{ E }}u + i{{ " * 2u" if INTERLEAVED }};
  let row = at / {{ WIDTH }}u;
  let angle = min(positions[row], arrayLength(&table) / {{ 2 * HALF }}u - 1u) * {{ 2 * HALF }}u + i;
  let cosine = table[angle];
  let sine = {{ sign }}table[angle + {{ HALF }}u];
  let first = {{ source }}[at];
  let second = {{ source }}[at + {{ STEP }}u];
  y[at] = first * cosine - second * sine;
  y[at + {{ STEP }}u] = second * cosine + first * sine;
}
