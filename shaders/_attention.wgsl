// Pieces shared by attention's forward and backward kernels. Tiles of BLOCK = 32 tokens; a workgroup is 8x8
// invocations, and invocation (ty, tx) owns rows ty + 8i and columns tx + 8j of every product. Head vectors are
// staged EC columns at a time, so that workgroup memory does not grow with the head size.
{% set BLOCK = 32 %}
{% set CHUNKS = (E + EC - 1) // EC %}
const MASKED = -1e30;
const STRIDE = {{ EC + 1 }}u;
var<workgroup> left: array<f32, {{ BLOCK * (EC + 1) }}>;
var<workgroup> right: array<f32, {{ BLOCK * (EC + 1) }}>;

{# Stage columns c*EC.. of 32 tokens from `first`, of head `head` in a tensor of `heads` heads; zero past the end. #}
{% macro stage(tile, source, first, head, heads, c) %}
  for (var i = thread; i < {{ BLOCK * EC }}u; i += 64u) {
    let token = {{ first }} + i / {{ EC }}u;
    let column = {{ c * EC }}u + i % {{ EC }}u;
    var value = 0.0;
    if (token < {{ S }}u && column < {{ E }}u) {
      value = {{ source }}[((row_start + token) * {{ heads }}u + {{ head }}) * {{ E }}u + column];
    }
    {{ tile }}[(i / {{ EC }}u) * STRIDE + i % {{ EC }}u] = value;
  }
{% endmacro %}

{# s = A B^T over the whole head, for 32 tokens of A and 32 of B, into registers NAME{i}{j}. #}
{% macro scores(name, a, a_first, a_head, a_heads, b, b_first, b_head, b_heads) %}
{% for i in range(4) %}{% for j in range(4) %}
  var {{ name }}{{ i }}{{ j }} = 0.0;
{% endfor %}{% endfor %}
{% for c in range(CHUNKS) %}
  workgroupBarrier();
  {{ stage("left", a, a_first, a_head, a_heads, c) }}
  {{ stage("right", b, b_first, b_head, b_heads, c) }}
  workgroupBarrier();
  for (var e = 0u; e < {{ EC }}u; e++) {
{% for i in range(4) %}
    let a{{ i }} = left[(ty + {{ 8 * i }}u) * STRIDE + e];
    let b{{ i }} = right[(tx + {{ 8 * i }}u) * STRIDE + e];
{% endfor %}
{% for i in range(4) %}{% for j in range(4) %}
    {{ name }}{{ i }}{{ j }} = fma(a{{ i }}, b{{ j }}, {{ name }}{{ i }}{{ j }});
{% endfor %}{% endfor %}
  }
{% endfor %}
{% endmacro %}

{% macro declare(name) %}
{% for c in range(CHUNKS) %}{% for i in range(4) %}{% for j in range(EC // 8) %}
  var {{ name }}{{ c }}_{{ i }}{{ j }} = 0.0;
{% endfor %}{% endfor %}{% endfor %}
{% endmacro %}

{# NAME += W B (or W^T B), W a 32x32 tile of weights in workgroup memory, B 32 tokens of a head. #}
{% macro combine(name, weights, transposed, b, b_first, b_head, b_heads) %}
{% for c in range(CHUNKS) %}
  workgroupBarrier();
  {{ stage("right", b, b_first, b_head, b_heads, c) }}
  workgroupBarrier();
  for (var t = 0u; t < {{ BLOCK }}u; t++) {
{% for i in range(4) %}
{% if transposed %}
    let w{{ i }} = {{ weights }}[t * {{ BLOCK + 1 }}u + ty + {{ 8 * i }}u];
{% else %}
    let w{{ i }} = {{ weights }}[(ty + {{ 8 * i }}u) * {{ BLOCK + 1 }}u + t];
{% endif %}
{% endfor %}
{% for j in range(EC // 8) %}
    let b{{ j }} = right[t * STRIDE + tx + {{ 8 * j }}u];
{% endfor %}
{% for i in range(4) %}{% for j in range(EC // 8) %}
    {{ name }}{{ c }}_{{ i }}{{ j }} = fma(w{{ i }}, b{{ j }}, {{ name }}{{ c }}_{{ i }}{{ j }});
{% endfor %}{% endfor %}
  }
{% endfor %}
{% endmacro %}

{% macro store(out, name, first, head, heads, factor) %}
{% for i in range(4) %}
  {
    let token = {{ first }} + ty + {{ 8 * i }}u;
    if (token < {{ S }}u) {
      let start = ((row_start + token) * {{ heads }}u + {{ head }}) * {{ E }}u;
{% for c in range(CHUNKS) %}{% for j in range(EC // 8) %}
      if ({{ c * EC + 8 * j }}u + tx < {{ E }}u) { {{ out }}[start + {{ c * EC + 8 * j }}u + tx] = {{ name }}{{ c }}_{{ i }}{{ j }}{{ factor % i if factor else "" }}; }
{% endfor %}{% endfor %}
    }
  }
{% endfor %}
{% endmacro %}

fn attends(query: u32, key: u32, segment: u32) -> bool {
  return key <= query && key >= segment && query < {{ S }}u;
}
