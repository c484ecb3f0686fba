{% import "lib/attention.wgsl" as parts with context %}
// The first half of attention's gradient (FlashAttention-2, arXiv 2307.08691, algorithm 2): P and dS of every visible
// block of 64 queries and 64 keys, from f32 sums, of which f16 takes {{ parts.CHUNK }} at a time.
//   P = exp(scale q k^T - lse), dP = dout v^T, dS = P (dP - delta), which lacks the factor scale
// With a soft cap, P is of capped scores, and dS has the factor 1 - (capped / cap)^2.
// q and dout [rows, S, H, E], k and v [rows, S, K, E], statistics [2, B, H, S]: lse, then delta = sum(out dout).
// dscores [rows, HEADS, PAIRS, 2, 64, 64]: P, then dS, by query and key, for query blocks FIRST to END - 1 and the key
// blocks up to each. Blocks in which no query sees a key are left out. `=`.
// Grid: (FIRST + END + 1, ceil((END - FIRST) / 2), rows * HEADS): a short and a long row of blocks together.
{% set T = parts.T %}
var<workgroup> tile_a: array<vec4<{{ T }}>, {{ CE * 16 }}>;
var<workgroup> tile_b: array<vec4<{{ T }}>, {{ CE * 16 }}>;

@compute @workgroup_size({{ THREADS }})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let tx = thread % {{ TX }}u;
  let ty = thread / {{ TX }}u;
  let short = {{ FIRST }}u + group.y;
  let long = {{ END - 1 }}u - group.y;
  let in_short = group.x <= short;
  let i = select(long, short, in_short);
  let j = select(group.x - short - 1u, group.x, in_short);
  let q0 = i * 64u;
  let k0 = j * 64u;
  let head = group.z % {{ HEADS }}u;
  let kv_head = head / {{ H // K }}u;
  let row = group.z / {{ HEADS }}u;
  let row_start = row * {{ S }}u;
  let is_new = in_short || long > short; // the middle row of blocks comes once
  if (is_new && {{ parts.first_key("segment_start[%srow_start + q0]" % BASES.segment_start, "q0") }} < k0 + 64u) {
    let facts = {{ BASES.statistics }}(row * {{ H }}u + head) * {{ S }}u;
    let last = min(q0 + 63u, {{ S - 1 }}u);
    let masked = i == j || segment_start[{{ BASES.segment_start }}row_start + last] > k0 || last < q0 + 63u
      {{- " || k0 + %du <= last" % WINDOW if WINDOW }};
    {{ parts.declare("s", 1) }}
{% for i in range(8) %}
    var weight{{ i }} = vec4<{{ T }}>();
{% if cap %}
    var slope{{ i }} = vec4<f32>();
{% endif %}
{% endfor %}
    // Scores, then dP: one loop for both keeps the code within the instruction cache.
    for (var phase = 0u; phase < 2u; phase++) {
      for (var e0 = 0u; e0 < {{ EP }}u; e0 += {{ CE }}u) {
        workgroupBarrier();
        if (phase == 0u) {
          {{ parts.stage_transposed("tile_a", "0u", 16, "q", "q0", 64, "head", H, "e0", CE, " * %s" % scale) }}
          {{ parts.stage_transposed("tile_b", "0u", 16, "k", "k0", 64, "kv_head", K, "e0", CE, "") }}
        } else {
          {{ parts.stage_transposed("tile_a", "0u", 16, "dout", "q0", 64, "head", H, "e0", CE, "") }}
          {{ parts.stage_transposed("tile_b", "0u", 16, "v", "k0", 64, "kv_head", K, "e0", CE, "") }}
        }
        workgroupBarrier();
        {{ parts.multiply("s", "tile_a", "0u", 16, "tile_b", "0u", 16, true, 1, CE) }}
      }
      if (phase == 0u) {
        let key = vec4<u32>(k0 + tx * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
{% for i in range(8) %}
        {
          let query = q0 + {{ parts.row(i) }};
          let known = min(query, {{ S - 1 }}u);
          let lse = statistics[facts + known] * {{ log2e }};
{% if cap %}
          s{{ i }}_0 = {{ parts.capped("s%d_0" % i) }};
          slope{{ i }} = vec4<f32>(1.0) - s{{ i }}_0 * s{{ i }}_0 * {{ inverse_cap }} * {{ inverse_cap }};
{% endif %}
          var weight = exp2(min(s{{ i }}_0 - vec4<f32>(lse), vec4<f32>()));
          if (masked) {
            let segment = {{ parts.first_key("segment_start[%srow_start + known]" % BASES.segment_start, "query") }};
            let seen = (key <= vec4<u32>(query)) & (key >= vec4<u32>(segment)) & vec4<bool>(query < {{ S }}u);
            weight = select(vec4<f32>(), weight, seen);
          }
          weight{{ i }} = vec4<{{ T }}>(weight);
          s{{ i }}_0 = vec4<f32>();
        }
{% endfor %}
      }
    }
    let pair = i * (i + 1u) / 2u - {{ FIRST * (FIRST + 1) // 2 }}u + j;
    let start = (group.z * {{ PAIRS }}u + pair) * 2048u;
{% for i in range(8) %}
    {
      let delta = statistics[facts + {{ B * H * S }}u + min(q0 + {{ parts.row(i) }}, {{ S - 1 }}u)];
      let at = start + {{ parts.row(i) }} * 16u + tx;
      dscores[at] = weight{{ i }};
      dscores[at + 1024u] = vec4<{{ T }}>(vec4<f32>(weight{{ i }}) * (s{{ i }}_0 - vec4<f32>(delta)){{ " * slope%d" % i if cap }});
    }
{% endfor %}
  }
}
