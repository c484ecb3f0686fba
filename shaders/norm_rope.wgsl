// RMS normalisation of x [ROWS, N] by head, then the rotation of pairs (i, i + N / 2) by the angle of the head's token;
// or the gradient of both with respect to x (=). Sums are f32. Vectors of {{ VEC }}; {{ SUMMED }} invocations per head.
//   n = x rstd weight, y = rotation(n);  g = rotation back(dy) weight, dx = rstd (g - xhat mean(g xhat)), xhat = x rstd
// Grid: ceil(ROWS / {{ 256 // SUMMED }}), folded.
{% set WIDTH = 256 %}
{% set floats = "vec4<f32>" if VEC == 4 else "f32" %}
{% macro weight(at) %}{{ "(weight[%s] + %s)" % (at, offset) if offset else "weight[%s]" % at }}{% endmacro %}
{% include "lib/grid.wgsl" %}
{% include "lib/reduce.wgsl" %}
{% include "lib/row_sum.wgsl" %}

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let row = linear_workgroup(group, groups) * {{ 256 // SUMMED }}u + thread / {{ SUMMED }}u;
  let lane = thread % {{ SUMMED }}u;
  let end = select(0u, {{ HALF }}u, row < {{ ROWS }}u);
  let start = row * {{ 2 * HALF }}u;
  var angle = 0u;
  let last = arrayLength(&table) / {{ 2 * HALF }}u - 1u;
  if (end > 0u) { angle = min(positions[row / {{ HEADS }}u], last) * {{ 2 * HALF }}u; }
  var part = {{ floats }}();
{% if mode == "norm_rope" %}
  for (var i = lane; i < end; i += {{ SUMMED }}u) {
    let first = x[start + i];
    let second = x[start + {{ HALF }}u + i];
    part += first * first + second * second;
  }
  let scale = 1.0 / sqrt(row_sum(part, thread) / {{ N }}.0 + {{ eps }});
  for (var i = lane; i < end; i += {{ SUMMED }}u) {
    let first = x[start + i] * scale * {{ weight("i") }};
    let second = x[start + {{ HALF }}u + i] * scale * {{ weight("%du + i" % HALF) }};
    let cosine = table[angle + i];
    let sine = table[angle + {{ HALF }}u + i];
    y[start + i] = first * cosine - second * sine;
    y[start + {{ HALF }}u + i] = second * cosine + first * sine;
  }
  if (end > 0u && lane == 0u) { rstd[row] = scale; }
{% else %}
  var scale = 0.0;
  if (end > 0u) { scale = rstd[row]; }
  for (var i = lane; i < end; i += {{ SUMMED }}u) {
    let cosine = table[angle + i];
    let sine = table[angle + {{ HALF }}u + i];
    let first = (dy[start + i] * cosine + dy[start + {{ HALF }}u + i] * sine) * {{ weight("i") }};
    let second = (dy[start + {{ HALF }}u + i] * cosine - dy[start + i] * sine) * {{ weight("%du + i" % HALF) }};
    part += (first * x[start + i] + second * x[start + {{ HALF }}u + i]) * scale;
  }
  let along = row_sum(part, thread) / {{ N }}.0;
  for (var i = lane; i < end; i += {{ SUMMED }}u) {
    let cosine = table[angle + i];
    let sine = table[angle + {{ HALF }}u + i];
    let first = (dy[start + i] * cosine + dy[start + {{ HALF }}u + i] * sine) * {{ weight("i") }};
    let second = (dy[start + {{ HALF }}u + i] * cosine - dy[start + i] * sine) * {{ weight("%du + i" % HALF) }};
    dx[start + i] = scale * (first - x[start + i] * scale * along);
    dx[start + {{ HALF }}u + i] = scale * (second - x[start + {{ HALF }}u + i] * scale * along);
  }
{% endif %}
}
