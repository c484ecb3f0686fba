{# Matrices that a subgroup multiplies, MM x MK by MK x MN, f16 in and f32 out: their spelling, in one place.

   `dialect` is "chromium", Dawn's, or "emulated", plain WGSL that tests run where there are no matrix units: there an
   operand is where it lies, and a lane holds every SUBGROUP-th element of a result. Operands lie in workgroup arrays of
   vec4<u32>, eight f16 each, in which offsets and strides count; results go to arrays of f32. `lane` is the invocation's
   place in its subgroup. #}
{% set PARTS = (MM * MN // SUBGROUP) | int %}

{% macro functions() %}
{% if dialect == "emulated" %}
fn half_a(at: u32) -> f32 { return unpack2x16float(tile_a[at >> 3u][(at >> 1u) & 3u])[at & 1u]; }
fn half_b(at: u32) -> f32 { return unpack2x16float(tile_b[at >> 3u][(at >> 1u) & 3u])[at & 1u]; }
// `most`, at least as long as a loop, keeps compilers from writing it out.
fn multiply(sums: array<f32, {{ PARTS }}>, a: vec2<u32>, b: vec3<u32>, lane: u32, most: u32) -> array<f32, {{ PARTS }}> {
  var result = sums;
  for (var part = 0u; part < min({{ PARTS }}u, most); part++) {
    let at = part * {{ SUBGROUP }}u + lane;
    let row = at / {{ MN }}u;
    let column = at % {{ MN }}u;
    for (var k = 0u; k < min({{ MK }}u, most); k++) {
      result[part] += half_a(8u * (a.x + row * a.y) + k) * half_b(8u * b.x + column * b.y + k * b.z);
    }
  }
  return result;
}
{% endif %}
{% endmacro %}

{% macro result(name) %}
{% if dialect == "emulated" %}
  var {{ name }} = array<f32, {{ PARTS }}>();
{% else %}
  var {{ name }}: subgroup_matrix_result<f32, {{ MN }}, {{ MM }}>;
{% endif %}
{% endmacro %}

{% macro left(name, offset, stride) %}
{% if dialect == "emulated" %}
      let {{ name }} = vec2<u32>({{ offset }}, {{ stride }}u);
{% else %}
      let {{ name }} = subgroupMatrixLoad<subgroup_matrix_left<f16, {{ MK }}, {{ MM }}>, row_major>(&tile_a, {{ offset }}, {{ stride }}u);
{% endif %}
{% endmacro %}

{# `by_columns`: k lies along memory. #}
{% macro right(name, offset, stride, by_columns) %}
{% if dialect == "emulated" %}
      let {{ name }} = vec3<u32>({{ offset }}, {{ "%du, 1u" % (8 * stride) if by_columns else "1u, %du" % (8 * stride) }});
{% else %}
      let {{ name }} = subgroupMatrixLoad<subgroup_matrix_right<f16, {{ MN }}, {{ MK }}>, {{ "col_major" if by_columns else "row_major" }}>(&tile_b, {{ offset }}, {{ stride }}u);
{% endif %}
{% endmacro %}

{% macro multiply(sums, a, b) %}
{% if dialect == "emulated" %}
      {{ sums }} = multiply({{ sums }}, {{ a }}, {{ b }}, lane, to_k);
{% else %}
      {{ sums }} = subgroupMatrixMultiplyAccumulate({{ a }}, {{ b }}, {{ sums }});
{% endif %}
{% endmacro %}

{% macro store(array, offset, sums, stride) %}
{% if dialect == "emulated" %}
  for (var part = 0u; part < min({{ PARTS }}u, to_k); part++) {
    let at = part * {{ SUBGROUP }}u + lane;
    {{ array }}[{{ offset }} + at / {{ MN }}u * {{ stride }}u + at % {{ MN }}u] = {{ sums }}[part];
  }
{% else %}
  subgroupMatrixStore<row_major>(&{{ array }}, {{ offset }}, {{ sums }}, {{ stride }}u);
{% endif %}
{% endmacro %}
