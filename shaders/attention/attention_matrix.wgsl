// attention.wgsl on matrix units: causal grouped-query attention within segments (FlashAttention-2, arXiv 2307.08691,
// algorithm 1), f32 sums. q [B, S, H, E], k and v [B, S, K, E], f16; segment_start [B, S]; out [B, S, H, E] and
// lse [B, S, H]. `=`. Grid: (H, B, ceil(S / BQ)), the last blocks first, as they see the most keys.
//
// A subgroup owns {{ MM }} queries, its workgroup BQ, and meets BK keys at a time. Matrices are opaque: scores become weights in
// workgroup memory, where {{ SUBGROUP // MM }} invocations share a row. Sums over keys are rescaled there too, when the maximum of a row has
// grown by a factor of 2^{{ MARGIN }} since they were last: until then weights of up to that are exact enough, being floats.
// Exponentials are to the base 2, whose logarithm goes into the scale of scores.
{% set SUBGROUPS = BQ // MM %}{% set THREADS = SUBGROUPS * SUBGROUP %}
{% set STORED = BK + 4 %}{% set WEIGHTS = BK // 2 + 4 %}{# words of a row: results of 4 bytes, weights of 2 #}
{% import "lib/matrix.wgsl" as matrix with context %}
{% import "lib/attention_matrix.wgsl" as parts with context %}
{% set LANES = parts.LANES %}{% set PAIRS = BK // 2 // LANES %}{# pairs of keys an invocation has #}
const MASKED = -1e30;
var<workgroup> tile: array<vec4<u32>, {{ [BQ, BK] | max * parts.ROW }}>;
var<workgroup> stored: array<f32, {{ BQ * STORED }}>;
var<workgroup> weights: array<u32, {{ BQ * WEIGHTS }}>;
// The last block of keys at which a maximum had grown too much; four, so that no array begins off 16 bytes, as matrices must.
var<workgroup> grown: array<atomic<u32>, 4>;
{{ matrix.exchange(THREADS) }}
{% set tile_query = parts.tile_of("query") %}
{{ parts.declare(["query"], BQ) }}
{{ matrix.functions({"tile": 8, "weights": 2, tile_query: 8}, [(tile_query, "tile"), ("weights", "tile")]) }}
{% macro larger(a, b) %}max({{ a }}, {{ b }}){% endmacro %}
{% macro added(a, b) %}{{ a }} + {{ b }}{% endmacro %}

{# For as many columns of the sums as `stored` holds, from `column` on: they are there, and each invocation may use its row. #}
{% macro each_part() %}
{% for column in range(0, E, BK) %}
{% set count = [BK, E - column] | min // MN %}
    workgroupBarrier();
{% for j in range(count) %}
{{ matrix.store("stored", "at_stored + %du" % (j * MN), "sums%d" % (column // MN + j), STORED) }}
{% endfor %}
    workgroupBarrier();
{{ caller(column, count) }}
{% endfor %}
{% endmacro %}

@compute @workgroup_size({{ THREADS }}){{ " @subgroup_size(%d)" % SUBGROUP if pinned and dialect != "emulated" }}
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let lane = thread % {{ SUBGROUP }}u;
  let subgroup = thread / {{ SUBGROUP }}u;
  let row = subgroup * {{ MM }}u + lane / {{ LANES }}u;
  let own = lane % {{ LANES }}u;
  let at_stored = subgroup * {{ MM * STORED }}u;
  let at_weights = subgroup * {{ MM * WEIGHTS }}u;
  let q0 = ({{ (S + BQ - 1) // BQ - 1 }}u - group.z) * {{ BQ }}u;
  let at_query = q0 + row;
  let head = group.x;
  let kv_head = head / {{ H // K }}u;
  let row_start = group.y * {{ S }}u;
  let last = min(q0 + {{ BQ - 1 }}u, {{ S - 1 }}u);
  let last_segment = segment_start[row_start + last];
  let earliest = {{ parts.first_key("segment_start[row_start + min(at_query, %du)]" % (S - 1), "at_query") }};
{{ matrix.begin() }}
  if (thread == 0u) { atomicStore(&grown[0], 0u); }
  {{ parts.stage(tile_query, 0, "q", "q0", BQ, "head", H) }}
  workgroupBarrier();
  {{ parts.hold("query", tile_query, "subgroup * %du" % MM) }}
{% for j in range(E // MN) %}
{{ matrix.result("sums%d" % j) }}
{% endfor %}
{% for j in range(BK // MN) %}
{{ matrix.result("score%d" % j) }}
{% endfor %}
  var highest = MASKED; // of this row, when its sums were last rescaled
  var total = 0.0; // of this invocation's weights
  let first = min({{ parts.first_key("segment_start[row_start + q0]", "q0") }}, q0) / {{ BK }}u * {{ BK }}u;
  for (var k0 = first; k0 <= last; k0 += {{ BK }}u) {
    workgroupBarrier();
    {{ parts.stage("tile", 0, "k", "k0", BK, "kv_head", K) }}
    workgroupBarrier();
    {{ parts.scores("score", "query", "tile", 0, BK) }}
{% for j in range(BK // MN) %}
{{ matrix.store("stored", "at_stored + %du" % (j * MN), "score%d" % j, STORED) }}
{% endfor %}
    workgroupBarrier();
    {{ parts.stage("tile", 0, "v", "k0", BK, "kv_head", K) }}
{% for j in range(PAIRS) %}
    var value{{ j }} = {{ scale }} * vec2<f32>(stored[row * {{ STORED }}u + (own + {{ j * LANES }}u) * 2u], stored[row * {{ STORED }}u + (own + {{ j * LANES }}u) * 2u + 1u]);
{% endfor %}
    if (k0 + {{ BK - 1 }}u > q0 || k0 < last_segment{{ " || k0 + %du <= last" % WINDOW if WINDOW }}) {
{% for j in range(PAIRS) %}
      {
        let key = vec2<u32>(k0 + (own + {{ j * LANES }}u) * 2u) + vec2<u32>(0u, 1u);
        value{{ j }} = select(vec2<f32>(MASKED), value{{ j }}, (key <= vec2<u32>(at_query)) & (key >= vec2<u32>(earliest)));
      }
{% endfor %}
    }
    var most = max(value0.x, value0.y);
{% for j in range(1, PAIRS) %}
    most = max(most, max(value{{ j }}.x, value{{ j }}.y));
{% endfor %}
    {{ matrix.combine("most", LANES, larger) }}
    if (k0 == first) {
      highest = most;
    } else if (most > highest + {{ MARGIN }}.0) {
      atomicMax(&grown[0], k0);
    }
    if (workgroupUniformLoad(&grown[0]) == k0 && k0 != first) {
      let higher = max(highest, most);
      let shrink = exp2(highest - higher);
      highest = higher;
      total *= shrink;
{% call(column, count) each_part() %}
{% for j in range(count * MN // LANES) %}
      stored[row * {{ STORED }}u + own + {{ j * LANES }}u] *= shrink;
{% endfor %}
      workgroupBarrier();
{% for j in range(count) %}
{{ matrix.load("stored", "at_stored + %du" % (j * MN), "sums%d" % (column // MN + j), STORED) }}
{% endfor %}
{% endcall %}
    }
{% for j in range(PAIRS) %}
    value{{ j }} = exp2(value{{ j }} - vec2<f32>(highest));
    total += value{{ j }}.x + value{{ j }}.y;
    weights[row * {{ WEIGHTS }}u + own + {{ j * LANES }}u] = pack2x16float(value{{ j }});
{% endfor %}
    workgroupBarrier();
{% for k in range(0, BK, MK) %}
    {
{{ matrix.left("weight", "weights", 2, "at_weights + %du" % (k // 2), WEIGHTS) }}
{% for j in range(E // MN) %}
      {
{{ matrix.right("value", "tile", 8, "%du" % (k * parts.ROW + j * MN // 8), parts.ROW, false) }}
{{ matrix.multiply("sums%d" % j, "weight", "value", "weights", "tile") }}
      }
{% endfor %}
    }
{% endfor %}
  }
  {{ matrix.combine("total", LANES, added) }}
  let inverse = 1.0 / total;
{% call(column, count) each_part() %}
  if (at_query < {{ S }}u) {
{% for j in range(count * MN // (4 * LANES)) %}
    {
      let column = (own + {{ j * LANES }}u) * 4u;
      let place = row * {{ STORED }}u + column;
      out[(((row_start + at_query) * {{ H }}u + head) * {{ E }}u + {{ column }}u + column) / 4u] = inverse * vec4<f32>(stored[place], stored[place + 1u], stored[place + 2u], stored[place + 3u]);
    }
{% endfor %}
  }
{% endcall %}
  if (own == 0u && at_query < {{ S }}u) { lse[(row_start + at_query) * {{ H }}u + head] = (highest + log2(total)) * {{ ln2 }}; }
}
