{# Blocks of 64 values times a Hadamard matrix, not normalised: eight times an orthogonal one. Sums and differences at strides
   of 1, 2, 16, 32, 4 and 8, in the order of `rotated` in ops/gemm/rotated.py. #}
{% macro functions() %}
// Four values times `inverse`, rounded to int8, which none exceeds. A float between 2^23 and 2^24 has a step of 1, so that the low
// byte of the sum is the code: a conversion that every device defines for all floats takes three times as long.
fn codes_of(values: vec4<f32>, inverse: f32) -> u32 {
  let bits = bitcast<vec4<u32>>(round(values * inverse) + 12582912.0);
  return insertBits(insertBits(insertBits(bits.x, bits.y, 8u, 8u), bits.z, 16u, 8u), bits.w, 24u, 8u);
}
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
