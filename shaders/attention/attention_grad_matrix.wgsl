// attention_grad.wgsl on matrix units: matmuls of the blocks that attention_dscores_matrix left (FlashAttention-2, arXiv
// 2307.08691, algorithm 2), of f16 operands, with f32 sums.
//   dq = scale dS k, dk = scale dS^T q, dv = P^T dout
// A workgroup owns BLOCKS blocks of 64 tokens of one of the three, a subgroup TM of these tokens and TN columns, and meets STEP
// tokens of the other side at a time. PART columns go to memory at a time; dk and dv are by query head,
// [rows, S, OUT_HEADS, E], to be summed over the group where there is one. `=`; keys before query block FIRST have been met
// by earlier launches: `+=`. Grid: (rows * HEADS, 3 for dq, dk and dv, END / BLOCKS), the longest sums first.
{% set OWN = 64 * BLOCKS %}{% set DOWN = OWN // TM %}{% set THREADS = DOWN * (E // TN) * SUBGROUP %}
{% set STEP_WORDS = STEP // 8 %}{% set A_ROW = STEP_WORDS + 1 %}{% set T_ROW = OWN // 8 + 1 %}{# of A, and of A transposed #}
{% set STORED = PART // 4 + 1 %}
{% import "lib/matrix.wgsl" as matrix with context %}
{% import "lib/attention_matrix.wgsl" as parts with context %}
{% import "lib/visible.wgsl" as visible with context %}
{% set LANES = parts.LANES %}
// Of dS or P, by query and key, words of eight and one of padding; at the end, sums on their way out.
var<workgroup> block: array<vec4<u32>, {{ [OWN * A_ROW, STEP * T_ROW, DOWN * (E // TN) * MM * STORED] | max }}>;
var<workgroup> tile: array<vec4<u32>, {{ STEP * parts.ROW }}>;
{{ matrix.functions({"tile": 8, "block": 8}, [("block", "tile")]) }}

{# A thread's shares of a stage: `count` words over all threads. #}
{% macro each_share(count) %}
{% for share in range((count + THREADS - 1) // THREADS) %}
{{ caller(share, "(thread + %du)" % (share * THREADS), "if (thread + %du < %du) " % (share * THREADS, count) if (share + 1) * THREADS > count else "") }}
{% endfor %}
{% endmacro %}

{# Of own block number `of`, the word at `within`; zero where there is none. #}
{% macro read_block(share, of, i, j, within) %}
{% set read = "ra%d = dscores[pairs + (%s * (%s + 1u) / 2u + %s) * 1024u + %s];" % (share, i, i, j, within) %}
        {{ "if (select(there0, there1, %s == 1u)) { %s }" % (of, read) if BLOCKS > 1 else read }}
{%- endmacro %}

{# rb: STEP tokens of a head from `first` on. #}
{% macro read_tile(source, heads, head) %}
{% call(share, at, guard) each_share(STEP * parts.WORDS) %}
{% set token = "first + %s / %du" % (at, parts.WORDS) %}
        {{ guard }}{ rb{{ share }} = {{ source }}[({{ BASES[source] }}((row_start + {{ token if WHOLE else "min(%s, %du)" % (token, S - 1) }}) * {{ heads }}u + {{ head }}) * {{ E }}u) / 8u + {{ at }} % {{ parts.WORDS }}u]; }
{% endcall %}
{% endmacro %}

{# SUMS += the block, transposed or not, times the tile. #}
{% macro multiply_block(transposed) %}
{% for k in range(0, STEP, MK) %}
      {
{% for i in range(TM // MM) %}
{{ matrix.left("a%d" % i, "block", 8, "%du + (sm + %du) / 8u" % (k * T_ROW, i * MM) if transposed else "(sm + %du) * %du + %du" % (i * MM, A_ROW, k // 8), T_ROW if transposed else A_ROW, transposed) }}
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
{{ visible.blocks_of_gradient(BLOCKS) }}
  let mine = own + sm / 64u; // the block of this subgroup's tokens
  let pairs = (group.x * {{ PAIRS }}u - {{ FIRST * (FIRST + 1) // 2 }}u) * 1024u + select(512u, 0u, group.y == 2u);
{% for b in range(BLOCKS) if BLOCKS > 1 %}
  let earliest{{ b }} = {{ visible.earliest_block("(own + %du)" % b, true) }};
{% endfor %}
{{ matrix.begin() }}
{% for i in range(TM // MM) %}{% for j in range(TN // MN) %}
{{ matrix.result("sums%d_%d" % (i, j)) }}
{% endfor %}{% endfor %}
  for (var step = begin * {{ 64 // STEP }}u; step < stop * {{ 64 // STEP }}u; step++) {
    let other = step / {{ 64 // STEP }}u;
    let first = step * {{ STEP }}u;
    let earliest_of_other = {{ visible.earliest_block("other") }};
    if (!of_query && earliest_of_other >= own + {{ BLOCKS }}u) { break; }
{% if BLOCKS > 1 %}
    // Whether there is a block: within the causal range, of this launch, and not left out, as no query sees a key.
{% for b in range(BLOCKS) %}
    let there{{ b }} = select(own + {{ b }}u <= other && own + {{ b }}u >= earliest_of_other, other <= own + {{ b }}u && other >= earliest{{ b }} && own + {{ b }}u >= {{ FIRST }}u && own + {{ b }}u < {{ END }}u, of_query);
{% endfor %}
{% endif %}
{% call(share, at, guard) each_share(OWN * STEP_WORDS) %}
    var ra{{ share }} = vec4<u32>();
{% endcall %}
{% call(share, at, guard) each_share(STEP * parts.WORDS) %}
    var rb{{ share }} = vec4<u32>();
{% endcall %}
    if (of_query) {
{% call(share, at, guard) each_share(OWN * STEP_WORDS) %}
      {{ guard }}{
        let at = {{ matrix.row_of(at, STEP_WORDS) }};
{{ read_block(share, "at / 64u", "(own + at / 64u)" if BLOCKS > 1 else "own", "other", "at %% 64u * 8u + first %% 64u / 8u + %s %% %du" % (at, STEP_WORDS)) }}
      }
{% endcall %}
{{ read_tile("k", K, "kv_head") }}
    } else {
{% call(share, at, guard) each_share(OWN * STEP_WORDS) %}
      {{ guard }}{
{{ read_block(share, "%s / 8u %% 2u" % at, "other", "(own + %s / 8u %% 2u)" % at if BLOCKS > 1 else "own", "(first %% 64u + %s / %du) * 8u + %s %% 8u" % (at, OWN // 8, at)) }}
      }
{% endcall %}
      if (group.y == 1u) {
{{ read_tile("q", H, "head") }}
      } else {
{{ read_tile("dout", H, "head") }}
      }
    }
    workgroupBarrier();
{% call(share, at, guard) each_share(OWN * STEP_WORDS) %}
    {{ guard }}{ block[select({{ at }} / {{ OWN // 8 }}u * {{ T_ROW }}u + {{ at }} % {{ OWN // 8 }}u, {{ matrix.row_of(at, STEP_WORDS) }} * {{ A_ROW }}u + {{ at }} % {{ STEP_WORDS }}u, of_query)] = ra{{ share }}; }
{% endcall %}
{% call(share, at, guard) each_share(STEP * parts.WORDS) %}
    {{ guard }}{ tile[{{ at }} / {{ parts.WORDS }}u * {{ parts.ROW }}u + {{ at }} % {{ parts.WORDS }}u] = rb{{ share }}; }
{% endcall %}
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
{{ matrix.store_words("block", "at_stored + %du" % (j * MN // 4), "sums%d_%d" % (i, n // MN + j), STORED) }}
{% endfor %}
  workgroupBarrier();
  {
    let token = own * 64u + sm + {{ i * MM }}u + lane / {{ LANES }}u;
    if (token < {{ S }}u) {
{% for c in range(PART // (4 * LANES)) %}
      {
        let within = lane % {{ LANES }}u + {{ c * LANES }}u;
        let column = sn + {{ n }}u + within * 4u;
        let value = bitcast<vec4<f32>>(block[at_stored + lane / {{ LANES }}u * {{ STORED }}u + within]);
        if (of_query) {
          {{ "if (mine >= %du) " % FIRST if FIRST }}{ {{ put("dq", H, "", "%s * " % scale) }} }
        } else if (group.y == 1u) {
          {{ put("dk", OUT_HEADS, "mine < %du" % FIRST if FIRST else "", "%s * " % scale) }}
        } else {
          {{ put("dv", OUT_HEADS, "mine < %du" % FIRST if FIRST else "") }}
        }
      }
{% endfor %}
    }
  }
{% endfor %}{% endfor %}
}
