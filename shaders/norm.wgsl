// RMS and layer normalisation of [ROWS, N] over N (arXiv 1910.07467, eq. 4; arXiv 1607.06450, eq. 4), and their gradients
// with respect to the input. Sums are f32. `=`; a gradient with a residual that lies in dx `+=`.
//   xhat = (x - average) rstd, y = xhat weight + bias;  dx = rstd (g - xhat mean(g xhat) - mean(g)), g = dy weight
// RMS has neither average nor bias nor the last term. Vectors of {{ VEC }}; {{ SUMMED }} invocations per row.
// Grid: ceil(ROWS / {{ 256 // SUMMED }}), folded.
{% set WIDTH = 256 %}
{% set STEPS = N // VEC %}
{% set floats = "vec4<f32>" if VEC == 4 else "f32" %}
{% set layer = mode.startswith("layer") %}
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
  let end = select(0u, {{ STEPS }}u, row < {{ ROWS }}u);
  let start = row * {{ STEPS }}u;
{% if mode in ("rms_norm", "layer_norm") %}
  var mean = 0.0;
{% if layer %}
  var total = {{ floats }}();
  for (var i = lane; i < end; i += {{ SUMMED }}u) { total += x[start + i]; }
  mean = row_sum(total, thread) / {{ N }}.0;
{% endif %}
  var square = {{ floats }}();
  for (var i = lane; i < end; i += {{ SUMMED }}u) {
    let centred = x[start + i] - mean;
    square += centred * centred;
  }
  let scale = 1.0 / sqrt(row_sum(square, thread) / {{ N }}.0 + {{ eps }});
  for (var i = lane; i < end; i += {{ SUMMED }}u) {
    y[start + i] = (x[start + i] - mean) * scale * {{ weight("i") }}{{ " + bias[i]" if layer else "" }};
  }
  if (end > 0u && lane == 0u) {
    rstd[row] = scale;
{% if layer %}
    average[row] = mean;
{% endif %}
  }
{% else %}
  var scale = 0.0;
  var mean = 0.0;
  if (end > 0u) {
    scale = rstd[row];
{% if layer %}
    mean = average[row];
{% endif %}
  }
  var along_part = {{ floats }}();
  var total_part = {{ floats }}();
  for (var i = lane; i < end; i += {{ SUMMED }}u) {
    let g = dy[start + i] * {{ weight("i") }};
    along_part += g * (x[start + i] - mean) * scale;
    total_part += g;
  }
  let along = row_sum(along_part, thread) / {{ N }}.0;
  let total = {{ "row_sum(total_part, thread) / %d.0" % N if layer else "0.0" }};
  for (var i = lane; i < end; i += {{ SUMMED }}u) {
    let g = dy[start + i] * {{ weight("i") }};
    let grad = scale * (g - (x[start + i] - mean) * scale * along - total);
    dx[start + i] = {{ residual ~ "[start + i] + " if residual }}grad;
  }
{% endif %}
}
