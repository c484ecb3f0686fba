// softmax(scale q k^T) v of T tokens against the keys and values of their slots in caches [SLOTS, CONTEXT, K E], up to
// their own positions. f32, weights to the base 2.
// A workgroup takes one token and up to {{ HEADS }} of the query heads that read one key/value head.
{% if RUNS %}
// It takes one run of {{ SPLIT }} keys and leaves its sums (=), relative to 2^peak, for cached_attention_join.
// Grid: T K {{ PARTS }}, folded, by {{ RUNS }} runs.
{% else %}
// It goes through the runs of {{ SPLIT }} keys in order; out [T, H E] `=`. Grid: T K {{ PARTS }}, folded.
{% endif %}
{% set floats = "vec4<f32>" if VEC == 4 else "f32" %}
{% set PIECES = THREADS // LANES %}
{% set SHARED = (COLUMNS + LANES - 1) // LANES %}
{% include "lib/grid.wgsl" %}
{% include "lib/online_softmax.wgsl" %}
var<workgroup> queries: array<{{ floats }}, {{ HEADS * COLUMNS }}>;
var<workgroup> scores: array<f32, {{ HEADS * SPLIT }}>;
var<workgroup> shares: array<f32, {{ HEADS * SPLIT * SHARE }}>;
var<workgroup> tree: array<f32, {{ HEADS * SPLIT }}>;
var<workgroup> pieces: array<{{ floats }}, {{ THREADS }}>;

@compute @workgroup_size({{ THREADS }})
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let place = linear_workgroup(group, groups);
  let t = place / {{ K * PARTS }}u;
  if (t >= {{ T }}u) { return; }  // the whole workgroup
  let kv_head = place % {{ K * PARTS }}u / {{ PARTS }}u;
  let first_head = kv_head * {{ GROUP }}u + place % {{ PARTS }}u * {{ HEADS }}u;
  let end_head = min(first_head + {{ HEADS }}u, (kv_head + 1u) * {{ GROUP }}u);
  let slot = slots[t];
  let there = slot < {{ SLOTS }}u;
  let end = select(0u, min(positions[t], {{ CONTEXT - 1 }}u) + 1u, there);
{% if WINDOW %}
  let start = max(end, {{ WINDOW }}u) - {{ WINDOW }}u;
{% else %}
  let start = 0u;
{% endif %}
{% if RUNS %}
  let run = group.z;
  if (run * {{ SPLIT }}u >= end || (run + 1u) * {{ SPLIT }}u <= start) { return; }  // the whole workgroup
{% endif %}
  for (var i = thread; i < {{ HEADS * COLUMNS }}u; i += {{ THREADS }}u) {
    let head = min(first_head + i / {{ COLUMNS }}u, end_head - 1u);
    queries[i] = q[(t * {{ H }}u + head) * {{ COLUMNS }}u + i % {{ COLUMNS }}u];
  }
  let base = (min(slot, {{ SLOTS - 1 }}u) * {{ CONTEXT }}u * {{ K }}u + kv_head) * {{ COLUMNS }}u;
  let lane = thread % {{ LANES }}u;
  let piece = thread / {{ LANES }}u;
{% if not RUNS %}
{% for h in range(HEADS) %}
  var peak{{ h }} = -3e38;
  var weight{{ h }} = 0.0;
{% for c in range(SHARED) %}
  var sum{{ h }}_{{ c }} = {{ floats }}();
{% endfor %}
{% endfor %}
  let last_run = (end + {{ SPLIT - 1 }}u) / {{ SPLIT }}u;
  for (var run = start / {{ SPLIT }}u; run < last_run; run++) {
{% endif %}
  let from_key = run * {{ SPLIT }}u;
  let keys_here = min(end - from_key, {{ SPLIT }}u);
  workgroupBarrier();
  // {{ SHARE }} neighbours share a key, and read what lies side by side.
  for (var item = thread; item < {{ SPLIT * SHARE }}u; item += {{ THREADS }}u) {
    let key = item / {{ SHARE }}u;
    let share = item % {{ SHARE }}u;
{% for h in range(HEADS) %}
    var dot{{ h }} = {{ floats }}();
{% endfor %}
    if (key < keys_here && from_key + key >= start) {
      let row = base + (from_key + key) * {{ K * COLUMNS }}u;
      for (var e = share; e < {{ COLUMNS }}u; e += {{ AHEAD_KEYS * SHARE }}u) {
{% for u in range(AHEAD_KEYS) %}
        let value{{ u }} = {{ floats }}(keys[row + e + {{ u * SHARE }}u]);
{% endfor %}
{% for u in range(AHEAD_KEYS) %}{% for h in range(HEADS) %}
        dot{{ h }} = fma(queries[{{ h * COLUMNS + u * SHARE }}u + e], value{{ u }}, dot{{ h }});
{% endfor %}{% endfor %}
      }
    }
{% for h in range(HEADS) %}
    shares[({{ h * SPLIT }}u + key) * {{ SHARE }}u + share] = {{ "(dot%d.x + dot%d.y) + (dot%d.z + dot%d.w)" % (h, h, h, h) if VEC == 4 else "dot%d" % h }};
{% endfor %}
  }
  workgroupBarrier();
  for (var i = thread; i < {{ HEADS * SPLIT }}u; i += {{ THREADS }}u) {
    let key = i % {{ SPLIT }}u;
    var score = shares[i * {{ SHARE }}u];
{% for share in range(1, SHARE) %}
    score += shares[i * {{ SHARE }}u + {{ share }}u];
{% endfor %}
    score *= {{ scale }};
{% if cap %}
    score = {{ cap }} * tanh(clamp(score * {{ inverse_cap }}, -10.0, 10.0));
{% endif %}
    score = select(-3e38, score, key < keys_here && from_key + key >= start);
    scores[i] = score;
    tree[i] = score;
  }
  workgroupBarrier();
  for (var half = {{ SPLIT // 2 }}u; half > 0u; half >>= 1u) {
    for (var i = thread; i < {{ HEADS }}u * half; i += {{ THREADS }}u) {
      let at = i / half * {{ SPLIT }}u + i % half;
      tree[at] = max(tree[at], tree[at + half]);
    }
    workgroupBarrier();
  }
{% for h in range(HEADS) %}
  let peak_here{{ h }} = tree[{{ h * SPLIT }}];
{% endfor %}
  workgroupBarrier();
  for (var i = thread; i < {{ HEADS * SPLIT }}u; i += {{ THREADS }}u) {
    var peak = peak_here0;
{% for h in range(1, HEADS) %}
    if (i / {{ SPLIT }}u == {{ h }}u) { peak = peak_here{{ h }}; }
{% endfor %}
    let key = i % {{ SPLIT }}u;
    let seen = key < keys_here && from_key + key >= start;
    let weight = select(0.0, exp2(scores[i] - peak), seen);
    scores[i] = weight;
    tree[i] = weight;
  }
  workgroupBarrier();
  for (var half = {{ SPLIT // 2 }}u; half > 0u; half >>= 1u) {
    for (var i = thread; i < {{ HEADS }}u * half; i += {{ THREADS }}u) {
      let at = i / half * {{ SPLIT }}u + i % half;
      tree[at] += tree[at + half];
    }
    workgroupBarrier();
  }
{% for h in range(HEADS) %}
  let weight_here{{ h }} = tree[{{ h * SPLIT }}];
{% endfor %}
{% for c in range(SHARED) %}
  // Values: {{ PIECES }} pieces of the run, each in the order of its keys, then one after the other.
{% for h in range(HEADS) %}
  var value{{ h }}_{{ c }} = {{ floats }}();
{% endfor %}
  {
    let column = lane + {{ c * LANES }}u;
    if (column < {{ COLUMNS }}u) {
      // Keys beyond the last have no weight; what is read for them is somewhere in the cache.
      for (var key = piece; key < keys_here; key += {{ AHEAD * PIECES }}u) {
{% for u in range(AHEAD) %}
        let value{{ u }} = {{ floats }}(values[base + min(from_key + key{{ " + %du" % (u * PIECES) if u }}, {{ CONTEXT - 1 }}u) * {{ K * COLUMNS }}u + column]);
{% endfor %}
{% for u in range(AHEAD) %}{% for h in range(HEADS) %}
        value{{ h }}_{{ c }} = fma({{ floats }}(scores[{{ h * SPLIT }}u + key{{ " + %du" % (u * PIECES) if u }}]), value{{ u }}, value{{ h }}_{{ c }});
{% endfor %}{% endfor %}
      }
    }
  }
{% for h in range(HEADS) %}
  workgroupBarrier();
  pieces[thread] = value{{ h }}_{{ c }};
  workgroupBarrier();
  value{{ h }}_{{ c }} = pieces[lane];
{% for p in range(1, PIECES) %}
  value{{ h }}_{{ c }} += pieces[{{ p * LANES }}u + lane];
{% endfor %}
{% endfor %}
{% endfor %}
{% for h in range(HEADS) %}
{% if RUNS %}
  if (first_head + {{ h }}u < end_head && piece == 0u) {
    let at = (t * {{ H }}u + first_head + {{ h }}u) * {{ RUNS }}u + run;
    if (lane == 0u) { weights[at * 2u] = peak_here{{ h }}; weights[at * 2u + 1u] = weight_here{{ h }}; }
{% for c in range(SHARED) %}
    if (lane + {{ c * LANES }}u < {{ COLUMNS }}u) { sums[at * {{ COLUMNS }}u + lane + {{ c * LANES }}u] = value{{ h }}_{{ c }}; }
{% endfor %}
  }
{% else %}
  {
    let peak = max(peak{{ h }}, peak_here{{ h }});
    let old = exp2(peak{{ h }} - peak);
    let fresh = exp2(peak_here{{ h }} - peak);
    weight{{ h }} = added_weight(weight{{ h }}, old, weight_here{{ h }}, fresh);
{% for c in range(SHARED) %}
    sum{{ h }}_{{ c }} = added_values(sum{{ h }}_{{ c }}, old, value{{ h }}_{{ c }}, fresh);
{% endfor %}
    peak{{ h }} = peak;
  }
{% endif %}
{% endfor %}
{% if not RUNS %}
  }
{% for h in range(HEADS) %}
  if (first_head + {{ h }}u < end_head && piece == 0u) {
    let at = (t * {{ H }}u + first_head + {{ h }}u) * {{ COLUMNS }}u + lane;
{% for c in range(SHARED) %}
    if (lane + {{ c * LANES }}u < {{ COLUMNS }}u) {
      out[at + {{ c * LANES }}u] = select({{ floats }}(), sum{{ h }}_{{ c }} / weight{{ h }}, there);
    }
{% endfor %}
  }
{% endfor %}
{% endif %}
}
