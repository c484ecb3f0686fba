{# An adapter's product P op(Q) as more steps of K of a product on matrix units: RK of its rank R at a time, rounded to f16,
   into the tiles of A and B. P [M, R] times lora_scale; Q [N, R] where r lies along memory, else [R, N]. What lies past R is zero. #}
{% macro read_row(name, factor) %}
fn low_rank_{{ name }}(row: u32, r: u32) -> vec4<u32> {
{% if R % 8 == 0 %}
  if (r >= {{ R }}u) { return vec4<u32>(); }
  let at = (row * {{ R }}u + r) / 4u;
  return eight_halves({{ name }}[at]{{ factor }}, {{ name }}[at + 1u]{{ factor }});
{% else %}
  var values: array<vec4<f32>, 2>;
  for (var x = 0u; x < min(8u, max(r, {{ R }}u) - r); x++) { values[x / 4u][x % 4u] = {{ name }}[row * {{ R }}u + r + x]{{ factor }}; }
  return eight_halves(values[0], values[1]);
{% endif %}
}
{% endmacro %}

{% macro readers() %}
{{ read_row("p", " * f32(%s)" % lora_scale) }}
{% if q_contiguous %}
{{ read_row("q", "") }}
{% else %}
fn low_rank_q(r: u32, column: u32) -> vec4<u32> {
  if (r >= {{ R }}u) { return vec4<u32>(); }
  let at = (r * {{ N }}u + min(column, {{ N - 8 }}u)) / 4u;
  return eight_halves(q[at], q[at + 1u]);
}
{% endif %}
{% endmacro %}

{# Steps r0 to r0 + RK of the rank into the tiles. #}
{% macro stage() %}
    workgroupBarrier();
    for (var i = thread; i < {{ BM * RK // 8 }}u; i += {{ THREADS }}u) {
      tile_a[i / {{ RK // 8 }}u * {{ P_ROW }}u + i % {{ RK // 8 }}u] = low_rank_p(min(m0 + i / {{ RK // 8 }}u, {{ M - 1 }}u), r0 + i % {{ RK // 8 }}u * 8u);
    }
{% set words = RK // 8 if q_contiguous else BN // 8 %}
    for (var i = thread; i < {{ BN * RK // 8 }}u; i += {{ THREADS }}u) {
      let row = i / {{ words }}u;
      let word = i % {{ words }}u;
      tile_b[row * {{ Q_ROW }}u + word] = {{ "low_rank_q(min(n0 + row, %du), r0 + word * 8u)" % (N - 1) if q_contiguous else "low_rank_q(r0 + row, n0 + word * 8u)" }};
    }
    workgroupBarrier();
{% endmacro %}
