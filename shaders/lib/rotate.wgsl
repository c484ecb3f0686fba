{# Blocks of 64 values times a Hadamard matrix, not normalised: eight times an orthogonal one. Sums and differences at strides
   of 1, 2, 16, 32, 4 and 8, in the order of `rotated` in ops/gemm/rotated.py. #}
{% macro functions() %}
// At strides of 1 and 2.
fn rotated_four(v: vec4<f32>) -> vec4<f32> {
  let pairs = vec4<f32>(v.x + v.y, v.x - v.y, v.z + v.w, v.z - v.w);
  return vec4<f32>(pairs.x + pairs.z, pairs.y + pairs.w, pairs.x - pairs.z, pairs.y - pairs.w);
}
{% endmacro %}

{# The same of four variables, element by element. #}
{% macro rotate_across(a, b, c, d) %}
  {
    let sum0 = {{ a }} + {{ b }};
    let difference0 = {{ a }} - {{ b }};
    let sum1 = {{ c }} + {{ d }};
    let difference1 = {{ c }} - {{ d }};
    {{ a }} = sum0 + sum1;
    {{ b }} = difference0 + difference1;
    {{ c }} = sum0 - sum1;
    {{ d }} = difference0 - difference1;
  }
{% endmacro %}
