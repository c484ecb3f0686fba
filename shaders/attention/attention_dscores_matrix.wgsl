// attention_dscores.wgsl on matrix units: P and dS of every visible block of 64 queries and 64 keys (FlashAttention-2, arXiv
// 2307.08691, algorithm 2), of f16 operands, with f32 sums.
//   P = exp(scale q k^T - lse), dP = dout v^T, dS = P (dP - delta), which lacks the factor scale
// q and dout [rows, S, H, E], k and v [rows, S, K, E], statistics [2, B, H, S]: lse, then delta = sum(out dout).
// dscores [rows, HEADS, PAIRS, 2, 64, 64]: P, then dS, by query and key, for query blocks FIRST to END - 1 and the key
// blocks up to each. Blocks in which no query sees a key are left out. `=`.
// Grid: (rows * HEADS, SPLIT, END - FIRST): the longest rows of blocks first, each in SPLIT workgroups.
//
// A subgroup owns {{ MM }} queries, whose q and dout it holds, and meets BK keys at a time; {{ SUBGROUP // MM }} invocations share a row, eight
// keys at a time.
{% set SUBGROUPS = 64 // MM %}{% set THREADS = SUBGROUPS * SUBGROUP %}
{% set STORED = BK + 4 %}
{% import "lib/matrix.wgsl" as matrix with context %}
{% import "lib/attention_matrix.wgsl" as parts with context %}
{% set LANES = parts.LANES %}{% set EIGHTS = BK // 8 // LANES %}
var<workgroup> tile: array<vec4<u32>, {{ [64, 2 * BK] | max * parts.ROW }}>;
var<workgroup> stored: array<f32, {{ 2 * 64 * STORED }}>;
{% set tile_query, tile_dout = parts.tile_of("query"), parts.tile_of("dout") %}
{{ parts.declare(["query", "dout"], 64) }}
{{ matrix.functions({"tile": 8, tile_query: 8, tile_dout: 8}, [(tile_query, "tile"), (tile_dout, "tile")]) }}
{# Four of the results from key `key` of this invocation's row on. #}
{% macro four(at) %}{% for x in range(4) %}stored[{{ at }} + {{ x }}u]{{ ", " if x < 3 }}{% endfor %}{% endmacro %}

@compute @workgroup_size({{ THREADS }}){{ " @subgroup_size(%d)" % SUBGROUP if pinned and dialect != "emulated" }}
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let lane = thread % {{ SUBGROUP }}u;
  let subgroup = thread / {{ SUBGROUP }}u;
  let row = subgroup * {{ MM }}u + lane / {{ LANES }}u;
  let own = lane % {{ LANES }}u;
  let at_stored = subgroup * {{ MM * STORED }}u;
  let i = {{ END - 1 }}u - group.z;
  let q0 = i * 64u;
  let at_query = q0 + row;
  let head = group.x % {{ HEADS }}u;
  let kv_head = head / {{ H // K }}u;
  let batch = group.x / {{ HEADS }}u;
  let row_start = batch * {{ S }}u;
  let known = min(at_query, {{ S - 1 }}u);
  let segments = {{ BASES.segment_start }}row_start;
  let earliest = {{ parts.first_key("segment_start[segments + known]", "at_query") }};
  let last_segment = segment_start[segments + min(q0 + 63u, {{ S - 1 }}u)];
  let facts = {{ BASES.statistics }}(batch * {{ H }}u + head) * {{ S }}u + known;
  let lse = statistics[facts] * {{ log2e }};
  let delta = statistics[facts + {{ B * H * S }}u];
{{ matrix.begin() }}
  {{ parts.stage(tile_query, 0, "q", "q0", 64, "head", H) }}
  workgroupBarrier();
  {{ parts.hold("query", tile_query, "subgroup * %du" % MM) }}
  workgroupBarrier();
  {{ parts.stage(tile_dout, 0, "dout", "q0", 64, "head", H) }}
  workgroupBarrier();
  {{ parts.hold("dout", tile_dout, "subgroup * %du" % MM) }}
{% for j in range(BK // MN) %}
{{ matrix.result("score%d" % j) }}
{{ matrix.result("slope%d" % j) }}
{% endfor %}
  let pairs = group.x * {{ PAIRS }}u + i * (i + 1u) / 2u - {{ FIRST * (FIRST + 1) // 2 }}u;
  for (var j = min({{ parts.first_key("segment_start[segments + q0]", "q0") }}, q0) / 64u + group.y; j <= i; j += {{ SPLIT }}u) {
    for (var step = 0u; step < 64u; step += {{ BK }}u) {
      let k0 = j * 64u + step;
      workgroupBarrier();
      {{ parts.stage("tile", 0, "k", "k0", BK, "kv_head", K) }}
      {{ parts.stage("tile", BK, "v", "k0", BK, "kv_head", K) }}
      workgroupBarrier();
      {{ parts.scores("score", "query", "tile", 0, BK) }}
      {{ parts.scores("slope", "dout", "tile", BK, BK) }}
{% for j in range(BK // MN) %}
{{ matrix.store("stored", "at_stored + %du" % (j * MN), "score%d" % j, STORED) }}
{{ matrix.store("stored", "%du + at_stored + %du" % (64 * STORED, j * MN), "slope%d" % j, STORED) }}
{% endfor %}
      workgroupBarrier();
      let masked = k0 + {{ BK - 1 }}u > q0 || last_segment > k0 || q0 + 63u >= {{ S }}u{{ " || k0 + %du <= q0 + 63u" % WINDOW if WINDOW }};
{% for c in range(EIGHTS) %}
      {
        let column = (own + {{ c * LANES }}u) * 8u;
        let place = row * {{ STORED }}u + column;
        var weight0 = exp2(min({{ scale }} * vec4<f32>({{ four("place") }}) - vec4<f32>(lse), vec4<f32>()));
        var weight1 = exp2(min({{ scale }} * vec4<f32>({{ four("place + 4u") }}) - vec4<f32>(lse), vec4<f32>()));
        if (masked) {
          let key0 = vec4<u32>(k0 + column) + vec4<u32>(0u, 1u, 2u, 3u);
          let key1 = key0 + vec4<u32>(4u);
          let inside = vec4<bool>(at_query < {{ S }}u);
          weight0 = select(vec4<f32>(), weight0, (key0 <= vec4<u32>(at_query)) & (key0 >= vec4<u32>(earliest)) & inside);
          weight1 = select(vec4<f32>(), weight1, (key1 <= vec4<u32>(at_query)) & (key1 >= vec4<u32>(earliest)) & inside);
        }
        let slope0 = weight0 * (vec4<f32>({{ four("%du + place" % (64 * STORED)) }}) - vec4<f32>(delta));
        let slope1 = weight1 * (vec4<f32>({{ four("%du + place" % (64 * STORED + 4)) }}) - vec4<f32>(delta));
        let at = (pairs + j) * 1024u + row * 8u + (step + column) / 8u;
        dscores[at] = eight_halves(weight0, weight1);
        dscores[at + 512u] = eight_halves(slope0, slope1);
      }
{% endfor %}
    }
  }
}
