{# The pair and the writing of C, shared by the low-precision products. `rows` and `columns` list a thread's rows and
   columns of C as expressions, a column being `width` consecutive elements; accumulators are acc{row}_{column}. #}
{% macro add_pair(rows, columns, width) %}
{% if slices > 1 %}
  if (group.z == 0u) {
{% endif %}
  for (var r = 0u; r < {{ R }}u; r++) {
{% for column in columns %}{% set j = loop.index0 %}
{% if width == 4 %}
    let column{{ j }} = {{ "min(%s, %du)" % (column, N - 4) if N % BN else column }};
    let q{{ j }} = vec4<f32>({% for x in range(4) %}q[(column{{ j }} + {{ x }}u) * {{ q_n }}u + r * {{ q_r }}u]{{ ", " if x < 3 }}{% endfor %}) * f32({{ beta }});
{% else %}
    let q{{ j }} = q[({{ column }}) * {{ q_n }}u + r * {{ q_r }}u] * f32({{ beta }});
{% endif %}
{% endfor %}
{% for row in rows %}{% set i = loop.index0 %}
    let p{{ i }} = p[min({{ row }}, {{ M - 1 }}u) * {{ R }}u + r];
{% for column in columns %}
    acc{{ i }}_{{ loop.index0 }} = fma({{ "vec4<f32>(p%d)" % i if width == 4 else "p%d" % i }}, q{{ loop.index0 }}, acc{{ i }}_{{ loop.index0 }});
{% endfor %}
{% endfor %}
  }
{% if slices > 1 %}
  }
{% endif %}
{% endmacro %}

{% macro write(rows, columns, width) %}
{% for row in rows %}{% set i = loop.index0 %}
  if ({{ row }} < {{ M }}u) {
{% for column in columns %}
    {{ "if (%s < %du) " % (column, N) if N % BN }}{
      let n = {{ column }};
      let at = {{ "%du + " % c_base if c_base }}({{ "group.z * %du + " % M if slices > 1 }}{{ row }}) * {{ ldc }}u + n;
      let value = acc{{ i }}_{{ loop.index0 }}{{ " + bias[n / %du]" % width if bias }}{{ " + %s[at / %du]" % (residual, width) if residual }};
      c[at / {{ width }}u] = {{ "vec%d<f16>(value)" % width if c_format == "f16" else "value" }};
    }
{% endfor %}
  }
{% endfor %}
{% endmacro %}
