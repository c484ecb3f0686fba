// An NF4 weight [N, K] transposed, both multiples of 64 (=).
{% if arithmetic != "int8" %}
// out [K, N]: the weight's values, in {{ "f16 rounded to binary16" if arithmetic == "f16" else "f32" }}.
{% else %}
// out [K, N] int8, four to a u32, and scales [N / 64, K] f32: NF4's blocks lie across N, so values are quantised again,
// in blocks of 64 along N: scale = absmax / 127, code = round(value / scale).
{% endif %}
// A workgroup turns 64 rows and 64 columns. A row is one block: its sixteen values are made once, to be looked up. Then
// an invocation takes {{ "four rows of eight columns, a word of codes each, and sixteen neighbours write a column side by side" if arithmetic != "int8" else "sixteen rows of two columns, whose codes share a byte, and writes a vector of each" }}.
// Of two codes in a byte, the first is in the high nibble. Grid: (K / 64, N / 64).
{% include "lib/nf4.wgsl" %}
{% include "lib/int8.wgsl" %}
{# Words of a row's codes, and its values: one more each, against bank conflicts. #}
{% set CODES = 9 %}{% set VALUES = 17 %}
var<workgroup> tile: array<u32, {{ 64 * CODES }}>;
var<workgroup> values: array<f32, {{ 64 * VALUES }}>;
{% if arithmetic == "int8" %}
var<workgroup> largest: array<vec2<f32>, 128>;
{% endif %}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let row = thread / 2u;
  let half = thread % 2u;
  let block = (group.y * 64u + row) * {{ K // 64 }}u + group.x;
  let words = codes[block * 2u + half];
  let scale = scale_of(block);
{% for i in range(4) %}
  tile[row * {{ CODES }}u + half * 4u + {{ i }}u] = words[{{ i }}];
{% endfor %}
{% for i in range(8) %}
  values[row * {{ VALUES }}u + half * 8u + {{ i }}u] = rounded(select({{ codebook[i] }}, {{ codebook[8 + i] }}, half == 1u) * scale);
{% endfor %}
  workgroupBarrier();
{% if arithmetic != "int8" %}
  let quad = thread % 16u;
  let first = thread / 16u * 8u;
{% for i in range(4) %}
  let word{{ i }} = tile[(quad * 4u + {{ i }}u) * {{ CODES }}u + thread / 16u];
{% endfor %}
  let to = (group.x * 64u + first) * {{ N // 4 }}u + group.y * 16u + quad;
{% for c in range(8) %}
  out[to + {{ c * N // 4 }}u] = vec4<{{ arithmetic }}>(vec4<f32>(
{% for i in range(4) %}
    values[(quad * 4u + {{ i }}u) * {{ VALUES }}u + ((word{{ i }} >> {{ (c // 2) * 8 + (4 if c % 2 == 0 else 0) }}u) & 15u)],
{% endfor %}
  ));
{% endfor %}
{% else %}
  let pair = thread % 32u;
  let first = thread / 32u * 16u;
  let shift = pair % 4u * 8u;
{% for i in range(16) %}
  let byte{{ i }} = tile[(first + {{ i }}u) * {{ CODES }}u + pair / 4u] >> shift;
  let value{{ i }} = vec2<f32>(values[(first + {{ i }}u) * {{ VALUES }}u + ((byte{{ i }} >> 4u) & 15u)], values[(first + {{ i }}u) * {{ VALUES }}u + (byte{{ i }} & 15u)]);
{% endfor %}
  var all = abs(value0);
{% for i in range(1, 16) %}
  all = max(all, abs(value{{ i }}));
{% endfor %}
  largest[thread] = all;
  workgroupBarrier();
  let absmax = max(max(largest[pair], largest[pair + 32u]), max(largest[pair + 64u], largest[pair + 96u]));
  if (thread < 32u) {
    let to = group.y * {{ K }}u + group.x * 64u + pair * 2u;
    scales[to] = absmax.x * {{ over_127 }};
    scales[to + 1u] = absmax.y * {{ over_127 }};
  }
{% for c in range(2) %}
  {
    let inverse = inverse_of(absmax[{{ c }}]);
    let to = (group.x * 64u + pair * 2u + {{ c }}u) * {{ N }}u + group.y * 64u + first;
    out[to / 16u] = vec4<u32>(
{% for i in range(0, 16, 4) %}
      pack4xI8(vec4<i32>(round(vec4<f32>(value{{ i }}[{{ c }}], value{{ i + 1 }}[{{ c }}], value{{ i + 2 }}[{{ c }}], value{{ i + 3 }}[{{ c }}]) * inverse))),
{% endfor %}
    );
  }
{% endfor %}
{% endif %}
}
