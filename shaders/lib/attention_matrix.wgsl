// Pieces shared by attention's kernels on matrix units: tokens' heads as f16 in tiles of workgroup memory, ROW words of 16
// bytes each, one more than a head has against bank conflicts.
{% import "lib/visible.wgsl" as visible with context %}
{% set first_key = visible.first_key %}
{% set WORDS = E // 8 %}{% set ROW = WORDS + 1 %}
{% set LANES = SUBGROUP // MM %}{# invocations that share a row of matrices #}

{# TILE from row `base` on: `tokens` tokens from `first` on, of f16. Past the last token it is the last. #}
{% macro stage(tile, base, source, first, tokens, head, heads) %}
{% for share in range((tokens * WORDS + THREADS - 1) // THREADS) %}
{% set at = "(thread + %du)" % (share * THREADS) %}
{% set token = "%s + %s / %du" % (first, at, WORDS) %}
    {{ "if (%s < %du) " % (at, tokens * WORDS) if (share + 1) * THREADS > tokens * WORDS }}{
      {{ tile }}[({{ base }} + {{ at }} / {{ WORDS }}u) * {{ ROW }}u + {{ at }} % {{ WORDS }}u] =
        {{ source }}[({{ BASES[source] }}((row_start + {{ token if WHOLE else "min(%s, %du)" % (token, S - 1) }}) * {{ heads }}u + {{ head }}) * {{ E }}u) / 8u + {{ at }} % {{ WORDS }}u];
    }
{% endfor %}
{% endmacro %}

{# The tile that rows come from that a subgroup holds on to: emulated operands stay there, so that it is one of their own. #}
{% macro tile_of(name) %}{{ "tile_" ~ name if dialect == "emulated" else "tile" }}{% endmacro %}

{% macro declare(names, rows) %}
{% for name in names if dialect == "emulated" %}
var<workgroup> tile_{{ name }}: array<vec4<u32>, {{ rows * ROW }}>;
{% endfor %}
{% endmacro %}

{# NAME0, NAME1, ...: the rows of a tile from `row` on as left operands, MK columns each. #}
{% macro hold(name, tile, row) %}
{% for e in range(0, E, MK) %}
{{ matrix.left("%s%d" % (name, e // MK), tile, 8, "(%s) * %du + %du" % (row, ROW, e // 8), ROW) }}
{% endfor %}
{% endmacro %}

{# NAMEj = HELD times the transposed of KEYS rows of a tile from `base` on. #}
{% macro scores(name, held, tile, base, keys) %}
{% for j in range(keys // MN) %}
{{ matrix.clear("%s%d" % (name, j)) }}
{% endfor %}
{% for e in range(E // MK) %}{% for j in range(keys // MN) %}
    {
{{ matrix.right("key", tile, 8, "%du + %du" % ((base + j * MN) * ROW, e * MK // 8), ROW, true) }}
{{ matrix.multiply("%s%d" % (name, j), "%s%d" % (held, e), "key", tile_of(held), tile) }}
    }
{% endfor %}{% endfor %}
{% endmacro %}
