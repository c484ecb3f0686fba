{# Matrices that a subgroup multiplies, MM x MK by MK x MN, f16 (with BYTES of 4, f32) in and f32 out: their spelling, in one place.

   `dialect` is "chromium", Dawn's, or "emulated", plain WGSL that tests run where there are no matrix units: there an
   operand is where it lies, and a lane holds every SUBGROUP-th element of a result. Operands lie in workgroup arrays of
   vec4<u32> or u32, eight or two f16 each, or four f32, in whose elements offsets and strides count; results go to and come from
   arrays of f32. `thread` is the invocation's place in its workgroup, and `lane` that in its subgroup. #}
{% set COMPONENT = "f32" if BYTES is defined and BYTES == 4 else "f16" %}
{% set PARTS = (MM * MN // SUBGROUP) | int %}

{# Where in a tile, by rows of `words`, a thread's word number `at` lies. Eight threads store at once: of rows of four words and
   one of padding, a row and the fourth after it, which share no bank. #}
{% macro row_of(at, words) %}{{ "(%s / 32u * 8u + %s / 8u %% 4u + %s / 4u %% 2u * 4u)" % (at, at, at) if words == 4 else "%s / %du" % (at, words) }}{% endmacro %}

{# For the workgroup arrays that hold operands, {name: components an element}, and the (left, right) pairs that are multiplied. #}
{% macro functions(arrays, pairs) %}
{% if COMPONENT == "f16" %}
fn eight_halves(first: vec4<f32>, second: vec4<f32>) -> vec4<u32> {
  return vec4<u32>(pack2x16float(first.xy), pack2x16float(first.zw), pack2x16float(second.xy), pack2x16float(second.zw));
}
{% endif %}
{% if dialect == "emulated" %}
{% for name, width in arrays.items() %}
{% if COMPONENT == "f32" %}
fn value_{{ name }}(at: u32) -> f32 { return bitcast<f32>({{ name }}[at >> 2u][at & 3u]); }
{% else %}
fn value_{{ name }}(at: u32) -> f32 { return unpack2x16float({{ name }}[at >> {{ 3 if width == 8 else 1 }}u]{{ "[(at >> 1u) & 3u]" if width == 8 }})[at & 1u]; }
{% endif %}
{% endfor %}
{% for left, right in pairs %}
// `many`, at least as long as a loop, keeps compilers from writing it out.
fn multiply_{{ left }}_{{ right }}(sums: array<f32, {{ PARTS }}>, a: vec3<u32>, b: vec3<u32>, lane: u32, many: u32) -> array<f32, {{ PARTS }}> {
  var result = sums;
  for (var part = 0u; part < min({{ PARTS }}u, many); part++) {
    let at = part * {{ SUBGROUP }}u + lane;
    let row = at / {{ MN }}u;
    let column = at % {{ MN }}u;
    for (var k = 0u; k < min({{ MK }}u, many); k++) {
      result[part] += value_{{ left }}(a.x + row * a.y + k * a.z) * value_{{ right }}(b.x + column * b.y + k * b.z);
    }
  }
  return result;
}
{% endfor %}
{% endif %}
{% endmacro %}

{# Where a loop over matrices' elements ends in emulation: more than any has, and unknown to the compiler. #}
{% macro begin() %}
{% if dialect == "emulated" %}
  let many = 256u + thread;
{% endif %}
{% endmacro %}

{% macro result(name) %}
{% if dialect == "emulated" %}
  var {{ name }} = array<f32, {{ PARTS }}>();
{% else %}
  var {{ name }}: subgroup_matrix_result<f32, {{ MN }}, {{ MM }}>;
{% endif %}
{% endmacro %}

{# All zero again. #}
{% macro clear(name) %}
{% if dialect == "emulated" %}
  {{ name }} = array<f32, {{ PARTS }}>();
{% else %}
  {{ name }} = subgroup_matrix_result<f32, {{ MN }}, {{ MM }}>();
{% endif %}
{% endmacro %}

{# NAME: rows of MK elements from `offset` on, `stride` apart; or with `by_columns` columns of MM, so that what lies there is
   the transposed. #}
{% macro left(name, array, width, offset, stride, by_columns=false) %}
{% if dialect == "emulated" %}
      let {{ name }} = vec3<u32>({{ width }}u * ({{ offset }}), {{ "1u, %du" % (width * stride) if by_columns else "%du, 1u" % (width * stride) }});
{% else %}
      let {{ name }} = subgroupMatrixLoad<subgroup_matrix_left<{{ COMPONENT }}, {{ MK }}, {{ MM }}>, {{ "col_major" if by_columns else "row_major" }}>(&{{ array }}, {{ offset }}, {{ stride }}u);
{% endif %}
{% endmacro %}

{# `by_columns`: k lies along memory. #}
{% macro right(name, array, width, offset, stride, by_columns) %}
{% if dialect == "emulated" %}
      let {{ name }} = vec3<u32>({{ width }}u * ({{ offset }}), {{ "%du, 1u" % (width * stride) if by_columns else "1u, %du" % (width * stride) }});
{% else %}
      let {{ name }} = subgroupMatrixLoad<subgroup_matrix_right<{{ COMPONENT }}, {{ MN }}, {{ MK }}>, {{ "col_major" if by_columns else "row_major" }}>(&{{ array }}, {{ offset }}, {{ stride }}u);
{% endif %}
{% endmacro %}

{# SUMS += A B, of the arrays that they were loaded from. #}
{% macro multiply(sums, a, b, left, right) %}
{% if dialect == "emulated" %}
      {{ sums }} = multiply_{{ left }}_{{ right }}({{ sums }}, {{ a }}, {{ b }}, lane, many);
{% else %}
      {{ sums }} = subgroupMatrixMultiplyAccumulate({{ a }}, {{ b }}, {{ sums }});
{% endif %}
{% endmacro %}

{# Results from and to an array of f32: rows from `offset` on, `stride` apart. #}
{% macro load(array, offset, sums, stride) %}
{% if dialect == "emulated" %}
  for (var part = 0u; part < min({{ PARTS }}u, many); part++) {
    let at = part * {{ SUBGROUP }}u + lane;
    {{ sums }}[part] = {{ array }}[{{ offset }} + at / {{ MN }}u * {{ stride }}u + at % {{ MN }}u];
  }
{% else %}
  {{ sums }} = subgroupMatrixLoad<subgroup_matrix_result<f32, {{ MN }}, {{ MM }}>, row_major>(&{{ array }}, {{ offset }}, {{ stride }}u);
{% endif %}
{% endmacro %}

{% macro store(array, offset, sums, stride) %}
{% if dialect == "emulated" %}
  for (var part = 0u; part < min({{ PARTS }}u, many); part++) {
    let at = part * {{ SUBGROUP }}u + lane;
    {{ array }}[{{ offset }} + at / {{ MN }}u * {{ stride }}u + at % {{ MN }}u] = {{ sums }}[part];
  }
{% else %}
  subgroupMatrixStore<row_major>(&{{ array }}, {{ offset }}, {{ sums }}, {{ stride }}u);
{% endif %}
{% endmacro %}

{# A result to a workgroup array of vec4<u32>, as bits: four to an element, in which `offset` and `stride` count. #}
{% macro store_words(array, offset, sums, stride) %}
{% if dialect == "emulated" %}
  for (var part = 0u; part < min({{ PARTS }}u, many); part++) {
    let at = part * {{ SUBGROUP }}u + lane;
    {{ array }}[{{ offset }} + at / {{ MN }}u * {{ stride }}u + at % {{ MN }}u / 4u][at % 4u] = bitcast<u32>({{ sums }}[part]);
  }
{% else %}
  subgroupMatrixStore<row_major>(&{{ array }}, {{ offset }}, {{ sums }}, {{ stride }}u);
{% endif %}
{% endmacro %}

{# What `lanes` neighbours of a subgroup share, a power of two: NAME becomes its combination over them. #}
{% macro exchange(threads) %}
{% if dialect == "emulated" %}
var<workgroup> exchanged: array<f32, {{ threads }}>;
{% endif %}
{% endmacro %}

{% macro combine(name, lanes, combined) %}
{% if dialect == "emulated" %}
  exchanged[thread] = {{ name }};
  workgroupBarrier();
  {{ name }} = exchanged[thread / {{ lanes }}u * {{ lanes }}u];
  for (var x = 1u; x < {{ lanes }}u; x++) { {{ name }} = {{ combined(name, "exchanged[thread / %du * %du + x]" % (lanes, lanes)) }}; }
  workgroupBarrier();
{% else %}
{% for bit in (1, 2, 4, 8, 16) if bit < lanes %}
  {{ name }} = {{ combined(name, "subgroupShuffleXor(%s, %du)" % (name, bit)) }};
{% endfor %}
{% endif %}
{% endmacro %}
