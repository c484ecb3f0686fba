{# TOTAL += the sum of `term` over l = from, from + step, ... below `end`, at most `length` places behind `from`. One
   accumulator takes 1,024 terms: its rounding error grows with what it sums. #}
{% set AT_ONCE = 1024 %}
{% macro add_sum(total, from, end, step, length, term) %}
{% if length > AT_ONCE * step %}
  for (var block = {{ from }}; block < {{ end }}; block += {{ AT_ONCE * step }}u) {
    let stop = min(block + {{ AT_ONCE * step }}u, {{ end }});
    var part = 0.0;
    for (var l = block; l < stop; l += {{ step }}u) { part += {{ term }}; }
    {{ total }} += part;
  }
{% else %}
  for (var l = {{ from }}; l < {{ end }}; l += {{ step }}u) { {{ total }} += {{ term }}; }
{% endif %}
{% endmacro %}
