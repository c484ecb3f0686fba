// attention_grad.wgsl on matrix units: matmuls of the blocks that attention_dscores_matrix left (FlashAttention-2, arXiv
// 2307.08691, algorithm 2), of f16 operands, with f32 sums.
//   dq = scale dS k, dk = scale dS^T q, dv = P^T dout
// A workgroup owns 64 tokens of one of the three, a subgroup TM of them and TN columns, PART of which go to
// memory at a time; dk and dv are by query head,
// [rows, S, OUT_HEADS, E], to be summed over the group where there is one. `=`; keys before query block FIRST have been met
// by earlier launches: `+=`. Grid: (rows * HEADS, 3 for dq, dk and dv, END), the longest sums first.
{% set DOWN = 64 // TM %}{% set THREADS = DOWN * (E // TN) * SUBGROUP %}
{% set STORED = PART + 4 %}
{% import "lib/matrix.wgsl" as matrix with context %}
{% import "lib/attention_matrix.wgsl" as parts with context %}
{% import "lib/visible.wgsl" as visible with context %}
{% set LANES = parts.LANES %}
var<workgroup> block: array<vec4<u32>, {{ 64 * 9 }}>; // of dS or P: rows of queries, eight words and one of padding
var<workgroup> tile: array<vec4<u32>, {{ 64 * parts.ROW }}>;
var<workgroup> stored: array<f32, {{ DOWN * (E // TN) * MM * STORED }}>;
{{ matrix.functions({"tile": 8, "block": 8}, [("block", "tile")]) }}

{# SUMS += the block, transposed or not, times the tile. #}
{% macro multiply_block(transposed) %}
{% for k in range(0, 64, MK) %}
      {
{% for i in range(TM // MM) %}
{{ matrix.left("a%d" % i, "block", 8, "%du + (sm + %du) / 8u" % (k * 9, i * MM) if transposed else "(sm + %du) * 9u + %du" % (i * MM, k // 8), 9, transposed) }}
{% endfor %}
{% for j in range(TN // MN) %}
{{ matrix.right("b%d" % j, "tile", 8, "%du + (sn + %du) / 8u" % (k * parts.ROW, j * MN), parts.ROW, false) }}
{% for i in range(TM // MM) %}
{{ matrix.multiply("sums%d_%d" % (i, j), "a%d" % i, "b%d" % j, "block", "tile") }}
{% endfor %}
{% endfor %}
      }
{% endfor %}
{% endmacro %}

{# Four results to where they belong: = or, where `add` holds, +=. #}
{% macro put(target, heads, add, factor="") %}
{% set at = "(%s((row_start + token) * %du + head) * %du + column) / 4u" % (BASES[target], heads, E) %}
{{ target }}[{{ at }}] = {{ factor }}value{{ " + select(vec4<f32>(), %s[%s], %s)" % (target, at, add) if add }};
{%- endmacro %}

@compute @workgroup_size({{ THREADS }}){{ " @subgroup_size(%d)" % SUBGROUP if pinned and dialect != "emulated" }}
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let lane = thread % {{ SUBGROUP }}u;
  let subgroup = thread / {{ SUBGROUP }}u;
  let sm = subgroup % {{ DOWN }}u * {{ TM }}u;
  let sn = subgroup / {{ DOWN }}u * {{ TN }}u;
{{ visible.blocks_of_gradient() }}
{{ matrix.begin() }}
{% for i in range(TM // MM) %}{% for j in range(TN // MN) %}
{{ matrix.result("sums%d_%d" % (i, j)) }}
{% endfor %}{% endfor %}
  for (var other = begin; other < stop; other++) {
    if (!of_query && {{ parts.first_key("segment_start[segments + other * 64u]", "other * 64u") }} >= own * 64u + 64u) { break; }
    let i = select(other, own, of_query);
    let j = select(own, other, of_query);
    let start = (group.x * {{ PAIRS }}u + i * (i + 1u) / 2u - {{ FIRST * (FIRST + 1) // 2 }}u + j) * 1024u + select(512u, 0u, group.y == 2u);
    workgroupBarrier();
    for (var n = thread; n < 512u; n += {{ THREADS }}u) { block[n / 8u * 9u + n % 8u] = dscores[start + n]; }
    if (of_query) {
      {{ parts.stage("tile", 0, "k", "other * 64u", 64, "kv_head", K) }}
    } else if (group.y == 1u) {
      {{ parts.stage("tile", 0, "q", "other * 64u", 64, "head", H) }}
    } else {
      {{ parts.stage("tile", 0, "dout", "other * 64u", 64, "head", H) }}
    }
    workgroupBarrier();
    if (of_query) {
{{ multiply_block(false) }}
    } else {
{{ multiply_block(true) }}
    }
  }
  let at_stored = subgroup * {{ MM * STORED }}u;
{% for i in range(TM // MM) %}{% for n in range(0, TN, PART) %}
  workgroupBarrier();
{% for j in range(PART // MN) %}
{{ matrix.store("stored", "at_stored + %du" % (j * MN), "sums%d_%d" % (i, n // MN + j), STORED) }}
{% endfor %}
  workgroupBarrier();
  {
    let token = own * 64u + sm + {{ i * MM }}u + lane / {{ LANES }}u;
    if (token < {{ S }}u) {
{% for c in range(PART // (4 * LANES)) %}
      {
        let within = (lane % {{ LANES }}u + {{ c * LANES }}u) * 4u;
        let column = sn + {{ n }}u + within;
        let place = at_stored + lane / {{ LANES }}u * {{ STORED }}u + within;
        let value = vec4<f32>(stored[place], stored[place + 1u], stored[place + 2u], stored[place + 3u]);
        if (of_query) {
          {{ "if (own >= %du) " % FIRST if FIRST }}{ {{ put("dq", H, "", "%s * " % scale) }} }
        } else if (group.y == 1u) {
          {{ put("dk", OUT_HEADS, "own < %du" % FIRST if FIRST else "", "%s * " % scale) }}
        } else {
          {{ put("dv", OUT_HEADS, "own < %du" % FIRST if FIRST else "") }}
        }
      }
{% endfor %}
    }
  }
{% endfor %}{% endfor %}
}
