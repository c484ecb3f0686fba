{% import "_attention.wgsl" as parts with context %}
// Causal grouped-query attention within segments, by blocks with a running maximum and sum
// (FlashAttention-2, Dao, arXiv 2307.08691, algorithm 1): no S x S matrix exists.
// q [B, S, H, E], k and v [B, S, K, E], segment_start [B, S] the first position each query may see.
// out [B, S, H, E] and lse [B, S, H], the log of the sum of exponentials. `=`.
// Grid: (ceil(S / 32), H, B); key blocks outside the causal and segment range are skipped.
{% include "_attention.wgsl" %}
var<workgroup> gathered: array<vec4<f32>, 64>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let tx = thread % 8u;
  let ty = thread / 8u;
  // The last blocks see the most keys: they go first, so that none is left alone at the end.
  let q0 = ({{ (S + 31) // 32 - 1 }}u - group.x) * 32u;
  let head = group.y;
  let kv_head = head / {{ H // K }}u;
  let row_start = group.z * {{ S }}u;
{% for i in range(4) %}
  let segment{{ i }} = segment_start[row_start + min(q0 + 4u * ty + {{ i }}u, {{ S - 1 }}u)];
{% endfor %}
  var highest = vec4<f32>(MASKED); // of the four rows of this invocation, as everything below
  var total = vec4<f32>();
  {{ parts.declare("o") }}
  let last = min(q0 + 31u, {{ S - 1 }}u);
  for (var k0 = segment_start[row_start + q0] / 32u * 32u; k0 <= last; k0 += 32u) {
    {{ parts.scores("s", "q", "q0", "head", H, "k", "k0", "kv_head", K) }}
    var peak = highest;
{% for i in range(4) %}{% for j in range(4) %}
    s{{ i }}{{ j }} = select(MASKED, s{{ i }}{{ j }} * {{ scale }}, attends(q0 + 4u * ty + {{ i }}u, k0 + tx + {{ 8 * j }}u, segment{{ i }}));
    peak[{{ i }}] = max(peak[{{ i }}], s{{ i }}{{ j }});
{% endfor %}{% endfor %}
    gathered[thread] = peak;
    workgroupBarrier();
    for (var x = 0u; x < 8u; x++) { peak = max(peak, gathered[ty * 8u + x]); }
    let shrink = exp(highest - peak);
    highest = peak;
    var sum = vec4<f32>();
{% for i in range(4) %}{% for j in range(4) %}
    s{{ i }}{{ j }} = select(0.0, exp(s{{ i }}{{ j }} - peak[{{ i }}]), s{{ i }}{{ j }} > MASKED);
    sum[{{ i }}] += s{{ i }}{{ j }};
{% endfor %}{% endfor %}
    {{ parts.keep("weights", "s") }}
    workgroupBarrier();
    gathered[thread] = sum;
    workgroupBarrier();
    total *= shrink;
    for (var x = 0u; x < 8u; x++) { total += gathered[ty * 8u + x]; }
{% for i in range(4) %}{% for c in range((E + 31) // 32) %}
    o{{ c }}_{{ i }} *= shrink[{{ i }}];
{% endfor %}{% endfor %}
    {{ parts.combine("o", "weights", "v", "k0", "kv_head", K) }}
  }
  let inverse = 1.0 / max(total, vec4<f32>(1e-37));
  {{ parts.store("out", "o", "q0", "head", H, "inverse") }}
{% for i in range(4) %}
  if (tx == {{ i }}u && q0 + 4u * ty + {{ i }}u < {{ S }}u) {
    lse[(row_start + q0 + 4u * ty + {{ i }}u) * {{ H }}u + head] = highest[{{ i }}] + log(total[{{ i }}]);
  }
{% endfor %}
}
