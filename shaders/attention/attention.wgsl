{% import "lib/attention.wgsl" as parts with context %}
// Causal grouped-query attention within segments, by blocks with a running maximum and sum
// (FlashAttention-2, Dao, arXiv 2307.08691, algorithm 1): no S x S matrix exists.
// q [B, S, H, E], k and v [B, S, K, E], segment_start [B, S] the first position each query may see.
// out [B, S, H, E] and lse [B, S, H], the log of the sum of exponentials. `=`.
// Grid: (H, B, ceil(S / BQ)), the last blocks first, as they see the most keys. BK keys are met at a time: CE columns of
// them and of the queries, then CV rows of v, lie in workgroup memory together.
// After {{ parts.AT_ONCE }} keys the sums over them go to `out` and start again, rescaled there as the maximum grows.
// Sums are f32; with f16 operands {{ parts.CHUNK }} products are summed in f16 before.
// Exponentials are to the base 2, whose logarithm goes into the scale of q.
{% set T = parts.T %}
{% set PITCH_Q = BQ // 4 %}
{% set LONG = S > parts.AT_ONCE %}
{% set keeps = [] %}{% for i in range(8) %}{{ keeps.append(" * keep%d[%d]" % (i // 4, i % 4)) or "" }}{% endfor %}
const MASKED = {{ "-6e4" if f16 else "-1e30" }};
var<workgroup> tile_q: array<vec4<{{ T }}>, {{ CE * PITCH_Q }}>;
var<workgroup> tile_kv: array<vec4<{{ T }}>, {{ [CE * TX, CV * EP // 4] | max }}>;
var<workgroup> weights: array<vec4<{{ T }}>, {{ BK * PITCH_Q }}>;

{# Leave vec4s NAME0 and NAME1 of the eight rows for the other invocations of these rows. #}
{% macro offer(name) %}
    weights[thread * 2u] = vec4<{{ T }}>({{ name }}0);
    weights[thread * 2u + 1u] = vec4<{{ T }}>({{ name }}1);
{% endmacro %}

@compute @workgroup_size({{ THREADS }})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let tx = thread % {{ TX }}u;
  let ty = thread / {{ TX }}u;
  let q0 = ({{ (S + BQ - 1) // BQ - 1 }}u - group.z) * {{ BQ }}u;
  let head = group.x;
  let kv_head = head / {{ H // K }}u;
  let row_start = group.y * {{ S }}u;
  let last = min(q0 + {{ BQ - 1 }}u, {{ S - 1 }}u);
  let last_segment = segment_start[row_start + last];
  var highest0 = vec4<f32>(MASKED); // of the eight rows of this invocation
  var highest1 = vec4<f32>(MASKED);
  var total0 = vec4<f32>(); // over this invocation's own columns
  var total1 = vec4<f32>();
  {{ parts.declare("o", COLUMNS) }}
{% if LONG %}
  var flushed = false; // whether `out` holds sums, for maxima of held0 and held1
  var held0 = highest0;
  var held1 = highest1;
{% endif %}
  for (var k0 = min({{ parts.first_key("segment_start[row_start + q0]", "q0") }}, q0) / {{ BK }}u * {{ BK }}u; k0 <= last; k0 += {{ BK }}u) {
    {{ parts.declare("s", 1) }}
    for (var e0 = 0u; e0 < {{ EP }}u; e0 += {{ CE }}u) {
      workgroupBarrier();
      {{ parts.stage_transposed("tile_kv", "0u", TX, "k", "k0", BK, "kv_head", K, "e0", CE, "") }}
      {{ parts.stage_transposed("tile_q", "0u", PITCH_Q, "q", "q0", BQ, "head", H, "e0", CE, " * %s" % scale) }}
      workgroupBarrier();
      {{ parts.multiply("s", "tile_q", "0u", PITCH_Q, "tile_kv", "0u", TX, true, 1, CE) }}
    }
{% if cap %}
{% for i in range(8) %}
    s{{ i }}_0 = {{ parts.capped("s%d_0" % i) }};
{% endfor %}
{% endif %}
    if (k0 + {{ BK - 1 }}u > q0 || k0 < last_segment{{ " || k0 + %du <= last" % WINDOW if WINDOW }}) {
      let key = vec4<u32>(k0 + tx * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
{% for i in range(8) %}
      {
        let query = q0 + {{ parts.row(i) }};
        let segment = {{ parts.first_key("segment_start[row_start + min(query, %du)]" % (S - 1), "query") }};
        let seen = (key <= vec4<u32>(query)) & (key >= vec4<u32>(segment));
        s{{ i }}_0 = select(vec4<f32>(MASKED), s{{ i }}_0, seen);
      }
{% endfor %}
    }
    var peak0 = highest0;
    var peak1 = highest1;
{% for i in range(8) %}
    {
      let most = max(s{{ i }}_0.xy, s{{ i }}_0.zw);
      peak{{ i // 4 }}[{{ i % 4 }}] = max(peak{{ i // 4 }}[{{ i % 4 }}], max(most.x, most.y));
    }
{% endfor %}
    {{ offer("peak") }}
    workgroupBarrier();
    for (var x = 0u; x < {{ TX }}u; x++) {
      // Also its own, for all to take the same maximum, which f16 may have rounded.
      let other0 = vec4<f32>(weights[(ty * {{ TX }}u + x) * 2u]);
      let other1 = vec4<f32>(weights[(ty * {{ TX }}u + x) * 2u + 1u]);
      peak0 = select(max(peak0, other0), other0, x == 0u);
      peak1 = select(max(peak1, other1), other1, x == 0u);
    }
    {{ parts.stage("tile_kv", "v", "k0", CV, "kv_head", K) }}
    let shrink0 = exp2(highest0 - peak0);
    let shrink1 = exp2(highest1 - peak1);
    highest0 = peak0;
    highest1 = peak1;
    total0 *= shrink0;
    total1 *= shrink1;
{% for i in range(8) %}
{% for j in range(COLUMNS) %}
    o{{ i }}_{{ j }} *= shrink{{ i // 4 }}[{{ i % 4 }}];
{% endfor %}
    s{{ i }}_0 = exp2(s{{ i }}_0 - vec4<f32>(peak{{ i // 4 }}[{{ i % 4 }}]));
    total{{ i // 4 }}[{{ i % 4 }}] += dot(s{{ i }}_0, vec4<f32>(1.0));
{% endfor %}
    workgroupBarrier(); // every maximum is read
{% for x in range(4) %}{% for half in range(2) %}
    weights[{{ parts.place("tx * 4u + %du" % x, parts.quad("ty", TY, half, 2), PITCH_Q) }}] =
      vec4<{{ T }}>(vec4<f32>({% for i in range(4) %}s{{ 4 * half + i }}_0[{{ x }}]{{ ", " if i < 3 }}{% endfor %}));
{% endfor %}{% endfor %}
    workgroupBarrier();
    for (var t = 0u; t < {{ BK }}u; t += {{ CV }}u) {
{% if CV < BK %}
      if (t > 0u) {
        workgroupBarrier();
        {{ parts.stage("tile_kv", "v", "k0 + t", CV, "kv_head", K) }}
        workgroupBarrier();
      }
{% endif %}
      {{ parts.multiply("o", "weights", "t", PITCH_Q, "tile_kv", "0u", EP // 4, false, COLUMNS, CV) }}
    }
{% if LONG %}
    if ((k0 + {{ BK }}u) % {{ parts.AT_ONCE }}u == 0u && k0 + {{ BK }}u <= last) {
      let keep0 = exp2(held0 - highest0);
      let keep1 = exp2(held1 - highest1);
      {{ parts.store("out", "o", COLUMNS, "q0", "head", H, [""] * 8, "flushed", keeps) }}
      {{ parts.clear("o", COLUMNS) }}
      held0 = highest0;
      held1 = highest1;
      flushed = true;
    }
{% endif %}
  }
  workgroupBarrier();
  {{ offer("total") }}
  workgroupBarrier();
  total0 = vec4<f32>();
  total1 = vec4<f32>();
  for (var x = 0u; x < {{ TX }}u; x++) {
    total0 += vec4<f32>(weights[(ty * {{ TX }}u + x) * 2u]);
    total1 += vec4<f32>(weights[(ty * {{ TX }}u + x) * 2u + 1u]);
  }
  let inverse0 = 1.0 / total0;
  let inverse1 = 1.0 / total1;
{% set factors = [] %}{% for i in range(8) %}{{ factors.append(" * inverse%d[%d]" % (i // 4, i % 4)) or "" }}{% endfor %}
{% if LONG %}
  let keep0 = exp2(held0 - highest0) * inverse0;
  let keep1 = exp2(held1 - highest1) * inverse1;
{% endif %}
  {{ parts.store("out", "o", COLUMNS, "q0", "head", H, factors, "flushed" if LONG else "", keeps) }}
  let natural0 = (highest0 + log2(total0)) * {{ ln2 }};
  let natural1 = (highest1 + log2(total1)) * {{ ln2 }};
{% for i in range(8) %}
  if (tx == 0u && q0 + {{ parts.row(i) }} < {{ S }}u) {
    lse[(row_start + q0 + {{ parts.row(i) }}) * {{ H }}u + head] = natural{{ i // 4 }}[{{ i % 4 }}];
  }
{% endfor %}
}
