{# What every matmul does with its sums on their way to C: alpha, an adapter's low-rank matmul, bias, residual, the format
   of C. The constants are those of `epilogue` in ops/gemm/launches.py.

   `rows` and `columns` list a thread's rows and columns of C as expressions, a column being `width` consecutive elements;
   the sums are acc{row}_{column}, `width` wide. `z` is the slice of K that they are of; where a slice is summed in several
   `blocks`, `first` tells whether this is the first, and C or `partial` adds them up. #}

{# For each block of a slice of K that is summed at once: where it begins and ends. #}
{% macro each_block(from, to) %}
{% if blocks > 1 %}
  for (var from_block = {{ from }}; from_block < {{ to }}; from_block += {{ block }}u) {
  let to_block = min(from_block + {{ block }}u, {{ to }});
  let first = from_block == {{ from }};
{{ caller("from_block", "to_block") }}
  }
{% else %}
{{ caller(from, to) }}
{% endif %}
{% endmacro %}

{% macro scale(rows, columns) %}
{% if alpha != 1.0 %}
{% for row in rows %}{% set i = loop.index0 %}{% for column in columns %}
  acc{{ i }}_{{ loop.index0 }} *= f32({{ alpha }});
{% endfor %}{% endfor %}
{% endif %}
{% endmacro %}

{# The condition of what is added to one block of one slice only. #}
{% macro once() %}
{% set terms = ["z == 0u"] * (slices > 1) + ["first"] * (blocks > 1) %}
{{ "if (%s) " % terms | join(" && ") if terms }}
{%- endmacro %}

{# acc += lora_scale * P op(Q), P [M, R], element by element: for kernels whose tiles hold no f32. #}
{% macro add_low_rank(rows, columns, width) %}
  {{ once() }}{
  for (var r = 0u; r < {{ R }}u; r++) {
{% for column in columns %}{% set j = loop.index0 %}
{% if width == 4 %}
    let column{{ j }} = {{ "min(%s, %du)" % (column, N - 4) if N % BN else column }};
    let q{{ j }} = vec4<f32>({% for x in range(4) %}q[(column{{ j }} + {{ x }}u) * {{ q_n }}u + r * {{ q_r }}u]{{ ", " if x < 3 }}{% endfor %}) * f32({{ lora_scale }});
{% else %}
    let q{{ j }} = q[({{ column }}) * {{ q_n }}u + r * {{ q_r }}u] * f32({{ lora_scale }});
{% endif %}
{% endfor %}
{% for row in rows %}{% set i = loop.index0 %}
    let p{{ i }} = p[min({{ row }}, {{ M - 1 }}u) * {{ R }}u + r];
{% for column in columns %}
    acc{{ i }}_{{ loop.index0 }} = fma({{ "vec4<f32>(p%d)" % i if width == 4 else "p%d" % i }}, q{{ loop.index0 }}, acc{{ i }}_{{ loop.index0 }});
{% endfor %}
{% endfor %}
  }
  }
{% endmacro %}

{# C[c_at] = sum + bias[bias_at] + residual[c_at], `width` elements at once.

   Added up in a variable: written as one expression, NVIDIA's compiler gives a tiled f32 matmul another inner loop, and a
   step of a 4B model takes 4% longer (docs/gemm.md). #}
{% macro put(sum, bias_at, c_at, width) %}
{
            var value = {{ sum }};
{% if bias %}
            value += bias[{{ bias_at }}];
{% endif %}
{% if residual %}
            value += {{ residual }}[{{ c_at }}];
{% endif %}
            c[{{ c_at }}] = {{ "value" if c_format == "f32" else "%s<%s>(value)" % ("vec4" if width == 4 else "", c_format) }};
          }
{%- endmacro %}

{# C at a place = or, for all blocks but the first, +=. #}
{% macro store(sum, bias_at, c_at, width) %}
{% if blocks > 1 and (bias or residual != "c") %}
if (first) {{ put(sum, bias_at, c_at, width) }} else { c[{{ c_at }}] = {{ sum }} + c[{{ c_at }}]; }
{%- else %}
{{ put(sum, bias_at, c_at, width) }}
{%- endif %}
{% endmacro %}

{# Writes all sums that lie inside C. Columns are tested where `edges` says that some may not. #}
{% macro write(rows, columns, width, edges) %}
{% for row in rows %}{% set i = loop.index0 %}
  {
    let m = {{ row }};
    if (m < {{ M }}u) {
{% for column in columns %}{% set sum = "acc%d_%d" % (i, loop.index0) %}
      {
        let n = {{ column }};
        let at = {{ "%du + " % c_base if c_base }}{{ "(z * %du + m)" % M if slices > 1 and not tail else "m" }} * {{ ldc }}u + n;
{% if width > c_width %}
        for (var x = 0u; x < {{ width }}u; x++) {
          if (n + x < {{ N }}u) {
            {{ store(sum ~ "[x]", "n + x", "at + x", 1) }}
          }
        }
{% else %}
        {{ "if (n < %du) " % N if edges }}{
{% if tail %}
          if (!whole) {
            let place = (z * {{ M * tail }}u + m * {{ tail }}u + n - {{ N - tail }}u) >> 2u;
            partial[place] = {{ sum }}{{ " + select(partial[place], vec4<f32>(), first)" if slice > block }};
          } else {
            {{ store(sum, "n >> 2u", "at >> 2u", 4) }}
          }
{% elif width == 4 %}
          {{ store(sum, "n >> 2u", "at >> 2u", 4) }}
{% else %}
          {{ store(sum, "n", "at", 1) }}
{% endif %}
        }
{% endif %}
      }
{% endfor %}
    }
  }
{% endfor %}
{% endmacro %}
