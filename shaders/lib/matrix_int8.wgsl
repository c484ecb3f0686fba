{# Matrices of int8 that a subgroup multiplies, MM x CODES by CODES x MN, with sums in int32: their spelling, as lib/matrix.wgsl has
   that of f16. Operands and results lie in the workgroup array `tiles` of vec4<u32>, in whose elements offsets and strides count:
   sixteen int8, or four int32 or f32. #}
{% set PARTS = (MM * MN // SUBGROUP) | int %}
{% macro functions() %}
{% if dialect == "emulated" %}
fn code(at: u32) -> i32 { return extractBits(bitcast<i32>(tiles[at >> 4u][(at >> 2u) & 3u]), (at & 3u) * 8u, 8u); }
// `many`, at least as long as a loop, keeps compilers from writing it out.
fn multiply_codes(sums: array<i32, {{ PARTS }}>, a: vec2<u32>, b: vec2<u32>, lane: u32, many: u32) -> array<i32, {{ PARTS }}> {
  var result = sums;
  for (var part = 0u; part < min({{ PARTS }}u, many); part++) {
    let at = part * {{ SUBGROUP }}u + lane;
    let row = at / {{ MN }}u;
    let column = at % {{ MN }}u;
    for (var k = 0u; k < min({{ CODES }}u, many); k++) {
      result[part] += code(a.x + row * a.y + k) * code(b.x + column * b.y + k);
    }
  }
  return result;
}
{% endif %}
{% endmacro %}

{% macro result(name) %}
{% if dialect == "emulated" %}
  var {{ name }} = array<i32, {{ PARTS }}>();
{% else %}
  var {{ name }}: subgroup_matrix_result<i32, {{ MN }}, {{ MM }}>;
{% endif %}
{% endmacro %}

{# Rows of CODES along memory, `stride` apart. #}
{% macro left(name, offset, stride) %}
{% if dialect == "emulated" %}
      let {{ name }} = vec2<u32>(16u * ({{ offset }}), {{ 16 * stride }}u);
{% else %}
      let {{ name }} = subgroupMatrixLoad<subgroup_matrix_left<i8, {{ CODES }}, {{ MM }}>, row_major>(&tiles, {{ offset }}, {{ stride }}u);
{% endif %}
{% endmacro %}

{# Columns of CODES along memory, `stride` apart. #}
{% macro right(name, offset, stride) %}
{% if dialect == "emulated" %}
      let {{ name }} = vec2<u32>(16u * ({{ offset }}), {{ 16 * stride }}u);
{% else %}
      let {{ name }} = subgroupMatrixLoad<subgroup_matrix_right<i8, {{ MN }}, {{ CODES }}>, col_major>(&tiles, {{ offset }}, {{ stride }}u);
{% endif %}
{% endmacro %}

{% macro multiply(sums, a, b) %}
{% if dialect == "emulated" %}
      {{ sums }} = multiply_codes({{ sums }}, {{ a }}, {{ b }}, lane, many);
{% else %}
      {{ sums }} = subgroupMatrixMultiplyAccumulate({{ a }}, {{ b }}, {{ sums }});
{% endif %}
{% endmacro %}

{# Sums of int32 or f32 to `tiles`, by their bits: rows from `offset` on, `stride` apart. #}
{% macro store(offset, sums, stride) %}
{% if dialect == "emulated" %}
  for (var part = 0u; part < min({{ PARTS }}u, many); part++) {
    let at = part * {{ SUBGROUP }}u + lane;
    tiles[{{ offset }} + at / {{ MN }}u * {{ stride }}u + at % {{ MN }}u / 4u][at % 4u] = bitcast<u32>({{ sums }}[part]);
  }
{% else %}
  subgroupMatrixStore<row_major>(&tiles, {{ offset }}, {{ sums }}, {{ stride }}u);
{% endif %}
{% endmacro %}
