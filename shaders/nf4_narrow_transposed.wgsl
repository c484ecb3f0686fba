// An NF4 weight [N, K] as operand of a low-precision product that contracts over N, both multiples of 64 (=).
{% if arithmetic == "f16" %}
// out [K, N] f16: the weight's values rounded to binary16.
{% else %}
// out [K, N] int8, four to a u32, and scales [N / 64, K] f32: NF4's blocks lie across N, so values are quantised again,
// in blocks of 64 along N: scale = absmax / 127, code = round(value / scale).
{% endif %}
// A workgroup turns a tile of 64 rows and 32 columns: a row's four words of codes in, then eight invocations to each
// column of 64 values. Grid: (K / 32, N / 64).
{% include "_nf4.wgsl" %}
var<workgroup> tile: array<f32, {{ 64 * 33 }}>;
var<workgroup> largest: array<f32, 256>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  fill_codebook(thread);
  let row = thread / 4u;
  let first = (thread % 4u) * 8u;
  let at = (group.y * 64u + row) * {{ K }}u + group.x * 32u + first;
  let bits = codes[at >> 3u];
  let scale = scale_of(at >> 6u);
{% for i in range(8) %}
  tile[row * 33u + first + {{ i }}u] = rounded(codebook[(bits >> {{ (i // 2) * 8 + (4 if i % 2 == 0 else 0) }}u) & 15u] * scale);
{% endfor %}
  workgroupBarrier();
  let column = thread / 8u;
  let part = thread % 8u;
{% for i in range(8) %}
  let value{{ i }} = tile[(part * 8u + {{ i }}u) * 33u + column];
{% endfor %}
  let low = vec4<f32>(value0, value1, value2, value3);
  let high = vec4<f32>(value4, value5, value6, value7);
  let to = (group.x * 32u + column) * {{ N // 4 }}u + group.y * 16u + part * 2u;
{% if arithmetic == "f16" %}
  out[to] = vec4<f16>(low);
  out[to + 1u] = vec4<f16>(high);
{% else %}
  let both = max(abs(low), abs(high));
  largest[thread] = max(max(both.x, both.y), max(both.z, both.w));
  workgroupBarrier();
  var absmax = 0.0;
  for (var i = 0u; i < 8u; i++) { absmax = max(absmax, largest[column * 8u + i]); }
  let inverse = select(0.0, 127.0 / absmax, absmax > 0.0);
  out[to] = pack4xI8(vec4<i32>(round(low * inverse)));
  out[to + 1u] = pack4xI8(vec4<i32>(round(high * inverse)));
  if (part == 0u) { scales[group.y * {{ K }}u + group.x * 32u + column] = absmax * {{ over_127 }}; }
{% endif %}
}
