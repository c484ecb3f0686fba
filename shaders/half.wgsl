// Rows of f32 as binary16 with a power of two a row, and back (=). Vectors of {{ width }}.
{% set floats = "vec%d<f32>" % width %}
{% include "lib/grid.wgsl" %}
{% if mode == "to" %}
// x [ROWS, N] -> codes [ROWS, N] and scales [ROWS], x = codes * scale: the row's largest element is brought to
// [2^{{ top }}, 2^{{ top + 1 }}). One workgroup of 256 a row. Grid: ROWS, folded.
{% set WIDTH = 256 %}
{% include "lib/reduce.wgsl" %}

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let row = linear_workgroup(group, groups);
  let end = select(0u, {{ N }}u, row < {{ ROWS }}u);
  var largest = {{ floats }}();
  for (var i = thread; i < end; i += 256u) { largest = max(largest, abs(x[row * {{ N }}u + i])); }
{% if width == 4 %}
  let pair = max(largest.xy, largest.zw);
{% else %}
  let pair = largest;
{% endif %}
  let absmax = workgroup_max(max(pair.x, pair.y), thread);
  // Biased exponents of the scale and of its reciprocal, both in 1 .. 253.
  let exponent = u32(clamp(i32(bitcast<u32>(absmax) >> 23u) - {{ top }}, 1, 253));
  let inverse = bitcast<f32>((254u - exponent) << 23u);
  for (var i = thread; i < end; i += 256u) {
    let value = x[row * {{ N }}u + i] * inverse;
{% if width == 4 %}
    codes[row * {{ N }}u + i] = vec2<u32>(pack2x16float(value.xy), pack2x16float(value.zw));
{% else %}
    codes[row * {{ N }}u + i] = pack2x16float(value);
{% endif %}
  }
  if (end > 0u && thread == 0u) { scales[row] = bitcast<f32>(exponent << 23u); }
}
{% else %}
// codes [SIZE / N, N] -> y. One invocation a vector. Grid: ceil(SIZE / 256), folded.

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let i = linear_workgroup(group, groups) * 256u + thread;
  if (i >= {{ SIZE }}u) { return; }
{% if width == 4 %}
  let value = vec4<f32>(unpack2x16float(codes[i].x), unpack2x16float(codes[i].y));
{% else %}
  let value = unpack2x16float(codes[i]);
{% endif %}
  y[i] = value * scales[i / {{ N }}u];
}
{% endif %}
