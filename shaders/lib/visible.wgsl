{# The first key that a query sees: of its segment, and of its window where there is one. #}
{% macro first_key(segment, query) -%}
{{ "max(%s, max(%s, %du) - %du)" % (segment, query, WINDOW - 1, WINDOW - 1) if WINDOW else segment }}
{%- endmacro %}
