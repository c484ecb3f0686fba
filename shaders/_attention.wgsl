// Pieces shared by attention's forward and backward kernels. A workgroup of 8x8 invocations owns 32 tokens ("mine") and
// meets the others 32 at a time. Of every 32x32 product, invocation (ty, tx) holds rows 4*ty + i and columns tx + 8*j;
// of the 32 vectors that come out, rows 4*ty + i and, of each 32 columns, the four from 4*tx on.
// Head vectors are staged 32 columns at a time as vec4, a row padded to nine, so that neither the columns tx + 8*j nor
// the rows 4*ty + i of a read share a bank.
{% set CHUNKS = (E + 31) // 32 %}
const MASKED = -1e30;
const PITCH = 9u;
var<workgroup> left: array<vec4<f32>, 288>;
var<workgroup> right: array<vec4<f32>, 288>;
var<workgroup> weights: array<vec4<f32>, 288>;

{# Four columns from `column` of a token's head; zero past the last token or column. #}
{% macro fetch(source, token, head, heads, column) %}
{% if E % 4 == 0 %}
    var value = vec4<f32>();
    if ({{ token }} < {{ S }}u && {{ column }} < {{ E }}u) {
      value = {{ source }}[(((row_start + {{ token }}) * {{ heads }}u + {{ head }}) * {{ E }}u + {{ column }}) / 4u];
    }
{% else %}
    var value = vec4<f32>();
    for (var x = 0u; x < 4u; x++) {
      if ({{ token }} < {{ S }}u && {{ column }} + x < {{ E }}u) {
        value[x] = {{ source }}[((row_start + {{ token }}) * {{ heads }}u + {{ head }}) * {{ E }}u + {{ column }} + x];
      }
    }
{% endif %}
{% endmacro %}

{# Stage columns 32*c.. of 32 tokens from `first`, of one head. #}
{% macro stage(tile, source, first, head, heads, c) %}
  for (var i = thread; i < 256u; i += 64u) {
    let token = {{ first }} + i / 8u;
    let column = {{ 32 * c }}u + (i % 8u) * 4u;
    {{ fetch(source, "token", head, heads, "column") }}
    {{ tile }}[(i / 8u) * PITCH + i % 8u] = value;
  }
{% endmacro %}

{# NAMEij = sum over the head of A[4*ty + i] B[tx + 8*j]. #}
{% macro scores(name, a, a_first, a_head, a_heads, b, b_first, b_head, b_heads) %}
{% for i in range(4) %}{% for j in range(4) %}
  var {{ name }}{{ i }}{{ j }} = 0.0;
{% endfor %}{% endfor %}
{% for c in range(CHUNKS) %}
  workgroupBarrier();
  {{ stage("left", a, a_first, a_head, a_heads, c) }}
  {{ stage("right", b, b_first, b_head, b_heads, c) }}
  workgroupBarrier();
  for (var e = 0u; e < 8u; e++) {
{% for i in range(4) %}
    let a{{ i }} = left[(4u * ty + {{ i }}u) * PITCH + e];
    let b{{ i }} = right[(tx + {{ 8 * i }}u) * PITCH + e];
{% endfor %}
{% for x in range(4) %}{% for i in range(4) %}{% for j in range(4) %}
    {{ name }}{{ i }}{{ j }} = fma(a{{ i }}[{{ x }}], b{{ j }}[{{ x }}], {{ name }}{{ i }}{{ j }});
{% endfor %}{% endfor %}{% endfor %}
  }
{% endfor %}
{% endmacro %}

{% macro declare(name) %}
{% for c in range(CHUNKS) %}{% for i in range(4) %}
  var {{ name }}{{ c }}_{{ i }} = vec4<f32>();
{% endfor %}{% endfor %}
{% endmacro %}

{# Leave a product NAMEij in a tile, so that `combine` finds the four rows of an invocation in one vec4. #}
{% macro keep(tile, name) %}
{% for j in range(4) %}
  {{ tile }}[(tx + {{ 8 * j }}u) * PITCH + ty] =
    vec4<f32>({{ name }}0{{ j }}, {{ name }}1{{ j }}, {{ name }}2{{ j }}, {{ name }}3{{ j }});
{% endfor %}
{% endmacro %}

{# NAME[4*ty + i] += sum over the others of TILE[other][4*ty + i] B[other]. #}
{% macro combine(name, tile, b, b_first, b_head, b_heads) %}
{% for c in range(CHUNKS) %}
  workgroupBarrier();
  {{ stage("right", b, b_first, b_head, b_heads, c) }}
  workgroupBarrier();
  for (var t = 0u; t < 32u; t++) {
    let w = {{ tile }}[t * PITCH + ty];
    let b = right[t * PITCH + tx];
{% for i in range(4) %}
    {{ name }}{{ c }}_{{ i }} = fma(vec4<f32>(w[{{ i }}]), b, {{ name }}{{ c }}_{{ i }});
{% endfor %}
  }
{% endfor %}
{% endmacro %}

{# out[4*ty + i] = NAME, times FACTORS[i] where given. #}
{% macro store(out, name, first, head, heads, factors) %}
{% for i in range(4) %}
  {
    let token = {{ first }} + 4u * ty + {{ i }}u;
    if (token < {{ S }}u) {
      let start = ((row_start + token) * {{ heads }}u + {{ head }}) * {{ E }}u + 4u * tx;
{% for c in range(CHUNKS) %}
{% set value = name ~ c ~ "_" ~ i ~ (" * " ~ factors ~ "[" ~ i ~ "]" if factors else "") %}
{% if E % 4 == 0 %}
      if ({{ 32 * c }}u + 4u * tx < {{ E }}u) { {{ out }}[(start + {{ 32 * c }}u) / 4u] = {{ value }}; }
{% else %}
{% for x in range(4) %}
      if ({{ 32 * c + x }}u + 4u * tx < {{ E }}u) { {{ out }}[start + {{ 32 * c + x }}u] = ({{ value }})[{{ x }}]; }
{% endfor %}
{% endif %}
{% endfor %}
    }
  }
{% endfor %}
{% endmacro %}

fn attends(query: u32, key: u32, segment: u32) -> bool {
  return key <= query && key >= segment && query < {{ S }}u;
}
