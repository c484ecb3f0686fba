// Softmax over the last axis of [ROWS, N], or its gradient dx = y (dy - sum(y dy)). Sums are f32. `=`.
// One workgroup of 64 per row. Grid: ROWS, folded.
{% include "lib/grid.wgsl" %}
{% include "lib/reduce.wgsl" %}
{% from "lib/blocked_sum.wgsl" import add_sum %}

@compute @workgroup_size(64)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let row = linear_workgroup(group, groups);
  let end = select(0u, {{ N }}u, row < {{ ROWS }}u);
  let start = row * {{ N }}u;
{% if mode == "softmax" %}
  var highest = -3.4e38;
  for (var i = thread; i < end; i += 64u) { highest = max(highest, x[start + i]); }
  highest = workgroup_max(highest, thread);
  var total = 0.0;
  {{ add_sum("total", "thread", "end", 64, N, "exp(x[start + l] - highest)") }}
  total = workgroup_sum(total, thread);
  for (var i = thread; i < end; i += 64u) { out[start + i] = exp(x[start + i] - highest) / total; }
{% else %}
  var dot = 0.0;
  {{ add_sum("dot", "thread", "end", 64, N, "y[start + l] * dy[start + l]") }}
  dot = workgroup_sum(dot, thread);
  for (var i = thread; i < end; i += 64u) { out[start + i] = y[start + i] * (dy[start + i] - dot); }
{% endif %}
}
