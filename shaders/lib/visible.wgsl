{# The first key that a query sees: of its segment, and of its window where there is one. #}
{% macro first_key(segment, query) -%}
{{ "max(%s, max(%s, %du) - %du)" % (segment, query, WINDOW - 1, WINDOW - 1) if WINDOW else segment }}
{%- endmacro %}

{# What a workgroup of attention's second half sums: block `own` of one head's dq, dk or dv (of_query: dq), over the blocks
   of the other side from `begin` up to `stop`. The longest sums come first. #}
{% macro blocks_of_gradient() %}
  let head = group.x % {{ HEADS }}u;
  let kv_head = head / {{ H // K }}u;
  let row_start = (group.x / {{ HEADS }}u) * {{ S }}u;
  let of_query = group.y == 0u;
  let own = select(group.z, {{ END - 1 }}u - min(group.z, {{ END - 1 }}u), of_query);
  let segments = {{ BASES.segment_start }}row_start;
  let earliest = min({{ first_key("segment_start[segments + own * 64u]", "own * 64u") }}, own * 64u) / 64u;
  let begin = select(max(own, {{ FIRST }}u), earliest, of_query);
  var stop = select({{ END }}u, own + 1u, of_query);
  if (of_query && own < {{ FIRST }}u) { stop = begin; }
{% endmacro %}
