{# The first key that a query sees: of its segment, and of its window where there is one. #}
{% macro first_key(segment, query) -%}
{{ "max(%s, max(%s, %du) - %du)" % (segment, query, WINDOW - 1, WINDOW - 1) if WINDOW else segment }}
{%- endmacro %}

{# The first block of keys that a block of queries meets; past the last token (`past`) it may be any. #}
{% macro earliest_block(block, past=false) -%}
{% set query = block ~ " * 64u" %}
min({{ first_key("segment_start[segments + %s]" % ("min(%s, %du)" % (query, S - 1) if past else query), query) }}, {{ query }}) / 64u
{%- endmacro %}

{# What a workgroup of attention's second half sums: `count` blocks from `own` on of one head's dq, dk or dv (of_query: dq), over
   the blocks of the other side from `begin` up to `stop`. The longest sums come first. #}
{% macro blocks_of_gradient(count=1) %}
{% set LAST = (END + count - 1) // count - 1 %}
  let head = group.x % {{ HEADS }}u;
  let kv_head = head / {{ H // K }}u;
  let row_start = (group.x / {{ HEADS }}u) * {{ S }}u;
  let of_query = group.y == 0u;
  let own = {{ "%du * " % count if count > 1 }}select(group.z, {{ LAST }}u - min(group.z, {{ LAST }}u), of_query);
  let segments = {{ BASES.segment_start }}row_start;
  let earliest = {{ earliest_block("own") }};
  let begin = select(max(own, {{ FIRST }}u), earliest, of_query);
  var stop = select({{ END }}u, {{ "min(own + %du, %du)" % (count, END) if count > 1 else "own + 1u" }}, of_query);
  if (of_query && own {{ "+ %du " % (count - 1) if count > 1 }}< {{ FIRST }}u) { stop = begin; }
{% endmacro %}
