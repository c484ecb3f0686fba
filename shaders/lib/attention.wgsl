// Pieces shared by attention's kernels: tiles in workgroup memory and matmuls of two of them.
//
// Tokens and head columns come in fours ("quads"), one vec4 each. A tile lies so that the index summed over is its row
// and a row is a run of quads; invocation (ty, tx) holds eight rows of a result, in two quads, and a few quads of
// columns. Quads of an invocation lie side by side in f16, where two make one 16-byte read, and apart in f32, where
// side by side two invocations would hit one bank. Tiles that are transposed on the way in are swizzled by row, else the
// invocations that store one column would all hit one bank.
{% set T = "f16" if f16 else "f32" %}
{% set CHUNK = 32 %}{# products that f16 sums before they go to f32 #}
{# Tokens after which an accumulator is emptied: it takes 1,024 numbers, as its rounding error grows with what it sums. #}
{% set AT_ONCE = 1024 * (CHUNK if f16 else 1) %}

{% import "lib/visible.wgsl" as visible with context %}
{% set first_key = visible.first_key %}

{# Scores after the soft cap; tanh overflows to NaN on some drivers for large arguments. #}
{% macro capped(scores) -%}
tanh(clamp({{ scores }} * {{ inverse_cap }}, vec4<f32>(-20.0), vec4<f32>(20.0))) * {{ cap }}
{%- endmacro %}

{% macro quad(lane, lanes, j, count) -%}
{{ "(%s * %du + %du)" % (lane, count, j) if f16 else "(%s + %du)" % (lane, lanes * j) }}
{%- endmacro %}

{% macro place(row, quad, pitch) -%}
(({{ row }}) * {{ pitch }}u + (({{ quad }}) ^ ((({{ row }}) / 4u * {{ 2 if f16 else 1 }}u) & {{ pitch - 1 }}u)))
{%- endmacro %}

{# var NAME: the four columns from `column` of a token's head. Past the last token it is the last; past E, zero. #}
{% macro fetch(name, source, token, head, heads, column) %}
{% set at = BASES[source] ~ "((row_start + %s) * %du + %s) * %du + %s" % (token if WHOLE else "min(%s, %du)" % (token, S - 1), heads, head, E, column) %}
      var {{ name }} = vec4<f32>();
{% if E % 4 == 0 %}
{% if E == EP %}
      {{ name }} = {{ source }}[({{ at }}) / 4u];
{% else %}
      if ({{ column }} < {{ E }}u) { {{ name }} = {{ source }}[({{ at }}) / 4u]; }
{% endif %}
{% else %}
      for (var x = 0u; x < 4u; x++) {
        if ({{ column }} + x < {{ E }}u) { {{ name }}[x] = {{ source }}[{{ at }} + x]; }
      }
{% endif %}
{% endmacro %}

{# TILE[column][token]: `width` columns from `column` on, of `tokens` tokens from `first` on. #}
{% macro stage_transposed(tile, base, pitch, source, first, tokens, head, heads, column, width, factor) %}
    for (var block = thread; block < {{ tokens * width // 16 }}u; block += {{ THREADS }}u) {
      let e = block % {{ width // 4 }}u * 4u;
      let t = block / {{ width // 4 }}u;
{% for i in range(4) %}
      let token{{ i }} = {{ first }} + t * 4u + {{ i }}u;
      {{ fetch("value%d" % i, source, "token%d" % i, head, heads, "(%s + e)" % column) }}
{% endfor %}
{% for i in range(4) %}
      {{ tile }}[{{ place("%s + e + %du" % (base, i), "t", pitch) }}] =
        vec4<{{ T }}>(vec4<f32>(value0[{{ i }}], value1[{{ i }}], value2[{{ i }}], value3[{{ i }}]){{ factor }});
{% endfor %}
    }
{% endmacro %}

{# TILE[token][column]: every column of `tokens` tokens from `first` on. #}
{% macro stage(tile, source, first, tokens, head, heads) %}
    for (var i = thread; i < {{ tokens * EP // 4 }}u; i += {{ THREADS }}u) {
      let token = {{ first }} + i / {{ EP // 4 }}u;
      let e = i % {{ EP // 4 }}u * 4u;
      {{ fetch("value", source, "token", head, heads, "e") }}
      {{ tile }}[i] = {{ "vec4<f16>(value)" if f16 else "value" }};
    }
{% endmacro %}

{% macro declare(name, columns) %}
{% for i in range(8) %}{% for j in range(columns) %}
  var {{ name }}{{ i }}_{{ j }} = vec4<f32>();
{% endfor %}{% endfor %}
{% endmacro %}

{% macro clear(name, columns) %}
{% for i in range(8) %}{% for j in range(columns) %}
  {{ name }}{{ i }}_{{ j }} = vec4<f32>();
{% endfor %}{% endfor %}
{% endmacro %}

{# NAMEi_j += sum over `steps` of A[a_row + step][row i] B[b_row + step][columns j]; the swizzled tiles have a power of two
   as pitch. #}
{% macro multiply(name, a, a_row, a_pitch, b, b_row, b_pitch, swizzled, columns, steps) %}
{% set chunk = [CHUNK, steps] | min %}
{% set sum = "half" if f16 else name %}
{% set unroll = [UNROLL, chunk] | min %}
    for (var chunk = 0u; chunk < {{ steps }}u; chunk += {{ chunk }}u) {
{% if f16 %}{% for i in range(8) %}{% for j in range(columns) %}
      var half{{ i }}_{{ j }} = vec4<f16>();
{% endfor %}{% endfor %}{% endif %}
      for (var step = 0u; step < {{ chunk }}u; step += {{ unroll }}u) {
{% for u in range(unroll) %}
        {
          let row = chunk + step + {{ u }}u;
{% for i in range(2) %}
{% if f16 and i %}
          let a1 = {{ a }}[at_a0 + 1u];
{% else %}
          let at_a{{ i }} = {{ place("%s + row" % a_row, quad("ty", TY, i, 2), a_pitch) }};
          let a{{ i }} = {{ a }}[at_a{{ i }}];
{% endif %}
{% endfor %}
{% for j in range(columns) %}
{% if not swizzled %}
          let b{{ j }} = {{ b }}[({{ b_row }} + row) * {{ b_pitch }}u + {{ quad("tx", TX, j, columns) }}];
{% elif f16 and j %}
          let b{{ j }} = {{ b }}[at_b0 + {{ j }}u];
{% else %}
          let at_b{{ j }} = {{ place("%s + row" % b_row, quad("tx", TX, j, columns), b_pitch) }};
          let b{{ j }} = {{ b }}[at_b{{ j }}];
{% endif %}
{% endfor %}
{% for i in range(8) %}{% for j in range(columns) %}
          {{ sum }}{{ i }}_{{ j }} = fma(vec4<{{ T }}>(a{{ i // 4 }}[{{ i % 4 }}]), b{{ j }}, {{ sum }}{{ i }}_{{ j }});
{% endfor %}{% endfor %}
        }
{% endfor %}
      }
{% if f16 %}{% for i in range(8) %}{% for j in range(columns) %}
      {{ name }}{{ i }}_{{ j }} += vec4<f32>(half{{ i }}_{{ j }});
{% endfor %}{% endfor %}{% endif %}
    }
{% endmacro %}

{# Which row of its tile row i of an invocation is. #}
{% macro row(i) -%}
({{ quad("ty", TY, i // 4, 2) }} * 4u + {{ i % 4 }}u)
{%- endmacro %}

{% macro put(out, at, value, zero, add, keep) -%}
{{ out }}[{{ at }}] = {{ value }}{{ " + select(%s, %s[%s]%s, %s)" % (zero, out, at, keep, add) if add }};
{%- endmacro %}

{# OUT [tokens, heads, E] at row i's token and the columns of an invocation: = or, where `add` holds, += (with `keep`,
   factors by row of what is there). #}
{% macro store(out, name, columns, first, head, heads, factor, add, keep=[""] * 8) %}
{% for i in range(8) %}
  {
    let token = {{ first }} + {{ row(i) }};
    if (token < {{ S }}u) {
      let start = {{ BASES[out] }}((row_start + token) * {{ heads }}u + {{ head }}) * {{ E }}u;
{% for j in range(columns) %}
      {
        let e = {{ quad("tx", TX, j, columns) }} * 4u;
        let value = {{ name }}{{ i }}_{{ j }}{{ factor[i] }};
{% if E % 4 == 0 %}
        if (e < {{ E }}u) { {{ put(out, "(start + e) / 4u", "value", "vec4<f32>()", add, keep[i]) }} }
{% else %}
        for (var x = 0u; x < 4u; x++) {
          if (e + x < {{ E }}u) { {{ put(out, "start + e + x", "value[x]", "0.0", add, keep[i]) }} }
        }
{% endif %}
      }
{% endfor %}
    }
  }
{% endfor %}
{% endmacro %}
