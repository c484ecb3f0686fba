{% import "_attention.wgsl" as parts with context %}
// Gradients of attention.wgsl (FlashAttention-2, Dao, arXiv 2307.08691, algorithm 2), split so that no two workgroups
// add to one element: {{ mode }} computes {{ "dq, a block of queries a workgroup" if mode == "query" else "dk and dv, a block of keys a workgroup, over all query heads of its group" }}. `=`.
//   P = exp(scale q k^T - lse), dP = dout v^T, dS = scale P (dP - delta);  dq = dS k, dk = dS^T q, dv = P^T dout
// statistics [2, B, S, H] holds lse, then delta = sum(out dout). Grid: (ceil(S / 32), {{ "H" if mode == "query" else "K" }}, B).
{% include "_attention.wgsl" %}
var<workgroup> slopes: array<f32, {{ 32 * 33 }}>;
{% if mode == "key" %}
var<workgroup> weights: array<f32, {{ 32 * 33 }}>;
{% endif %}

{% macro slope() %}
{% for i in range(4) %}
      let query{{ i }} = q0 + ty + {{ 8 * i }}u;
      let at{{ i }} = (row_start + min(query{{ i }}, {{ S - 1 }}u)) * {{ H }}u + head;
      let lse{{ i }} = statistics[at{{ i }}];
      let delta{{ i }} = statistics[{{ B * S * H }}u + at{{ i }}];
      let segment{{ i }} = segment_start[row_start + min(query{{ i }}, {{ S - 1 }}u)];
{% for j in range(4) %}
      {
        let seen = attends(query{{ i }}, k0 + tx + {{ 8 * j }}u, segment{{ i }});
        let weight = select(0.0, exp(min(s{{ i }}{{ j }} * {{ scale }} - lse{{ i }}, 0.0)), seen);
        let at = (ty + {{ 8 * i }}u) * 33u + tx + {{ 8 * j }}u;
        slopes[at] = weight * (p{{ i }}{{ j }} - delta{{ i }}) * {{ scale }};
{% if mode == "key" %}
        weights[at] = weight;
{% endif %}
      }
{% endfor %}
{% endfor %}
{% endmacro %}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let tx = thread % 8u;
  let ty = thread / 8u;
  let row_start = group.z * {{ S }}u;
{% if mode == "query" %}
  let q0 = group.x * 32u;
  let head = group.y;
  let kv_head = head / {{ H // K }}u;
  {{ parts.declare("dq_") }}
  let last = min(q0 + 31u, {{ S - 1 }}u);
  for (var k0 = segment_start[row_start + q0] / 32u * 32u; k0 <= last; k0 += 32u) {
    {{ parts.scores("s", "q", "q0", "head", H, "k", "k0", "kv_head", K) }}
    {{ parts.scores("p", "dout", "q0", "head", H, "v", "k0", "kv_head", K) }}
    {{ slope() }}
    {{ parts.combine("dq_", "slopes", False, "k", "k0", "kv_head", K) }}
  }
  {{ parts.store("dq", "dq_", "q0", "head", H, "") }}
{% else %}
  let k0 = group.x * 32u;
  let kv_head = group.y;
  let last_key = k0 + 31u;
  {{ parts.declare("dk_") }}
  {{ parts.declare("dv_") }}
  for (var member = 0u; member < {{ H // K }}u; member++) {
    let head = kv_head * {{ H // K }}u + member;
    for (var q0 = k0; q0 < {{ S }}u; q0 += 32u) {
      if (segment_start[row_start + q0] > last_key) { break; }
      {{ parts.scores("s", "q", "q0", "head", H, "k", "k0", "kv_head", K) }}
      {{ parts.scores("p", "dout", "q0", "head", H, "v", "k0", "kv_head", K) }}
      {{ slope() }}
      {{ parts.combine("dk_", "slopes", True, "q", "q0", "head", H) }}
      {{ parts.combine("dv_", "weights", True, "dout", "q0", "head", H) }}
    }
  }
  {{ parts.store("dk", "dk_", "k0", "kv_head", K, "") }}
  {{ parts.store("dv", "dv_", "k0", "kv_head", K, "") }}
{% endif %}
}
