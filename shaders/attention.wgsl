{% import "_attention.wgsl" as parts with context %}
// Causal grouped-query attention within segments, by blocks with a running maximum and sum
// (FlashAttention-2, Dao, arXiv 2307.08691, algorithm 1): no S x S matrix exists.
// q [B, S, H, E], k and v [B, S, K, E], segment_start [B, S] the first position each query may see.
// out [B, S, H, E] and lse [B, S, H], the log of the sum of exponentials. `=`.
// Grid: (ceil(S / 32), H, B); key blocks outside the causal and segment range are skipped.
{% include "_attention.wgsl" %}
var<workgroup> weights: array<f32, {{ 32 * 33 }}>;
var<workgroup> highest: array<f32, 32>;
var<workgroup> total: array<f32, 32>;
var<workgroup> shrink: array<f32, 32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let tx = thread % 8u;
  let ty = thread / 8u;
  let q0 = group.x * 32u;
  let head = group.y;
  let kv_head = head / {{ H // K }}u;
  let row_start = group.z * {{ S }}u;
  if (thread < 32u) {
    highest[thread] = MASKED;
    total[thread] = 0.0;
  }
{% for i in range(4) %}
  let segment{{ i }} = segment_start[row_start + min(q0 + ty + {{ 8 * i }}u, {{ S - 1 }}u)];
{% endfor %}
  {{ parts.declare("o") }}
  let last = min(q0 + 31u, {{ S - 1 }}u);
  for (var k0 = segment_start[row_start + q0] / 32u * 32u; k0 <= last; k0 += 32u) {
    {{ parts.scores("s", "q", "q0", "head", H, "k", "k0", "kv_head", K) }}
{% for i in range(4) %}{% for j in range(4) %}
    weights[(ty + {{ 8 * i }}u) * 33u + tx + {{ 8 * j }}u] =
      select(MASKED, s{{ i }}{{ j }} * {{ scale }}, attends(q0 + ty + {{ 8 * i }}u, k0 + tx + {{ 8 * j }}u, segment{{ i }}));
{% endfor %}{% endfor %}
    workgroupBarrier();
    if (thread < 32u) {
      var peak = highest[thread];
      for (var t = 0u; t < 32u; t++) { peak = max(peak, weights[thread * 33u + t]); }
      var sum = 0.0;
      for (var t = 0u; t < 32u; t++) {
        let score = weights[thread * 33u + t];
        let weight = select(0.0, exp(score - peak), score > MASKED);
        weights[thread * 33u + t] = weight;
        sum += weight;
      }
      shrink[thread] = exp(highest[thread] - peak);
      total[thread] = total[thread] * shrink[thread] + sum;
      highest[thread] = peak;
    }
    workgroupBarrier();
{% for i in range(4) %}
    let shrink{{ i }} = shrink[ty + {{ 8 * i }}u];
{% for c in range((E + EC - 1) // EC) %}{% for j in range(EC // 8) %}
    o{{ c }}_{{ i }}{{ j }} *= shrink{{ i }};
{% endfor %}{% endfor %}
{% endfor %}
    {{ parts.combine("o", "weights", False, "v", "k0", "kv_head", K) }}
    workgroupBarrier();
  }
{% for i in range(4) %}
  let inverse{{ i }} = 1.0 / max(total[ty + {{ 8 * i }}u], 1e-37);
{% endfor %}
  {{ parts.store("out", "o", "q0", "head", H, " * inverse%d") }}
  if (thread < 32u && q0 + thread < {{ S }}u) {
    lse[(row_start + q0 + thread) * {{ H }}u + head] = highest[thread] + log(total[thread]);
  }
}
