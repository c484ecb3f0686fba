// C = factor * sum of a matmul's slices of K, in order, in f32, + bias + residual (= or, with an in-place residual, +=).
// partial [slices, M, N]; C begins at element c_base of its tensor, with rows of ldc elements, and at column first_column
// of the bias. One invocation four consecutive elements, or one where N is no multiple of four.
// Grid: ceil(M * N / (256 * width)), folded.
{% import "lib/epilogue.wgsl" as epilogue with context %}
{% include "lib/grid.wgsl" %}
{% set WIDTH = c_width %}

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let i = linear_workgroup(group, groups) * 256u + thread;
  if (i >= {{ M * N // WIDTH }}u) { return; }
  var sum = partial[i];
{% for slice in range(1, slices) %}
  sum += partial[i + {{ slice * M * N // WIDTH }}u];
{% endfor %}
{% if factor != 1.0 %}
  sum *= f32({{ factor }});
{% endif %}
  let column = i % {{ N // WIDTH }}u;
  let at = {{ c_base // WIDTH }}u + i / {{ N // WIDTH }}u * {{ ldc // WIDTH }}u + column;
  {{ epilogue.put("sum", "%du + column" % (first_column // WIDTH), "at", WIDTH) }}
}
