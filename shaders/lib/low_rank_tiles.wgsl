{# An adapter's product P op(Q) as more steps of K of a product on matrix units: RK of its rank R at a time, converted to what
   matrices are made of, E to a word, into the tiles of A and B. P [M, R] times lora_scale; Q [N, R] where r lies along memory, else [R, N]. What lies past R is zero. #}
{% set E = 16 // BYTES %}
{% macro read_row(name, factor) %}
fn low_rank_{{ name }}(row: u32, r: u32) -> vec4<u32> {
{% if R % E == 0 %}
  if (r >= {{ R }}u) { return vec4<u32>(); }
  let at = (row * {{ R }}u + r) / 4u;
  return {{ "eight_halves(%s[at]%s, %s[at + 1u]%s)" % (name, factor, name, factor) if E == 8 else "bitcast<vec4<u32>>(%s[at]%s)" % (name, factor) }};
{% else %}
  var values: array<vec4<f32>, 2>;
  for (var x = 0u; x < min({{ E }}u, max(r, {{ R }}u) - r); x++) { values[x / 4u][x % 4u] = {{ name }}[row * {{ R }}u + r + x]{{ factor }}; }
  return {{ "eight_halves(values[0], values[1])" if E == 8 else "bitcast<vec4<u32>>(values[0])" }};
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
  let at = (r * {{ N }}u + min(column, {{ N - E }}u)) / 4u;
  return {{ "eight_halves(q[at], q[at + 1u])" if E == 8 else "bitcast<vec4<u32>>(q[at])" }};
}
{% endif %}
{% endmacro %}

{# Steps r0 to r0 + RK of the rank into the tiles. #}
{% macro stage() %}
    workgroupBarrier();
    for (var i = thread; i < {{ BM * RK // E }}u; i += {{ THREADS }}u) {
      tile_a[i / {{ RK // E }}u * {{ P_ROW }}u + i % {{ RK // E }}u] = low_rank_p(min(m0 + i / {{ RK // E }}u, {{ M - 1 }}u), r0 + i % {{ RK // E }}u * {{ E }}u);
    }
{% set words = RK // E if q_contiguous else BN // E %}
    for (var i = thread; i < {{ BN * RK // E }}u; i += {{ THREADS }}u) {
      let row = i / {{ words }}u;
      let word = i % {{ words }}u;
      tile_b[row * {{ Q_ROW }}u + word] = {{ "low_rank_q(min(n0 + row, %du), r0 + word * %du)" % (N - 1, E) if q_contiguous else "low_rank_q(r0 + row, n0 + word * %du)" % E }};
    }
    workgroupBarrier();
{% endmacro %}
