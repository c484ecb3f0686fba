// RMS and layer normalisation of [ROWS, N] over N, and their gradients with respect to the input. `=`.
//   xhat = (x - average) rstd, y = xhat weight + bias;  dx = rstd (g - xhat mean(g xhat) - mean(g)), g = dy weight
// RMS has neither average nor bias nor the last term. One workgroup of 64 a row. Grid: ROWS, folded.
{% include "_grid.wgsl" %}
{% include "_reduce.wgsl" %}
{% set layer = mode.startswith("layer") %}

@compute @workgroup_size(64)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let row = linear_workgroup(group, groups);
  let end = select(0u, {{ N }}u, row < {{ ROWS }}u);
  let start = row * {{ N }}u;
{% if mode in ("rms_norm", "layer_norm") %}
  var mean = 0.0;
{% if layer %}
  for (var i = thread; i < end; i += 64u) { mean += x[start + i]; }
  mean = workgroup_sum(mean, thread) / {{ N }}.0;
{% endif %}
  var square = 0.0;
  for (var i = thread; i < end; i += 64u) {
    let centred = x[start + i] - mean;
    square += centred * centred;
  }
  let scale = 1.0 / sqrt(workgroup_sum(square, thread) / {{ N }}.0 + {{ eps }});
  for (var i = thread; i < end; i += 64u) {
    y[start + i] = (x[start + i] - mean) * scale * weight[i]{{ " + bias[i]" if layer else "" }};
  }
  if (end > 0u && thread == 0u) {
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
  var along = 0.0;
  var total = 0.0;
  for (var i = thread; i < end; i += 64u) {
    let g = dy[start + i] * weight[i];
    along += g * (x[start + i] - mean) * scale;
    total += g;
  }
  along = workgroup_sum(along, thread) / {{ N }}.0;
  total = {{ "workgroup_sum(total, thread) / %d.0" % N if layer else "0.0" }};
  for (var i = thread; i < end; i += 64u) {
    let g = dy[start + i] * weight[i];
    dx[start + i] = scale * (g - (x[start + i] - mean) * scale * along - total);
  }
{% endif %}
}
