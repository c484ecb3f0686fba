{% import "_attention.wgsl" as parts with context %}
// Gradients of attention.wgsl (FlashAttention-2, Dao, arXiv 2307.08691, algorithm 2). `=`.
//   P = exp(scale q k^T - lse), dP = dout v^T, dS = scale P (dP - delta);  dq = dS k, dk = dS^T q, dv = P^T dout
// statistics [2, B, S, H] holds lse, then delta = sum(out dout). No two workgroups add to one element:
{% if mode == "query" %}
// here a workgroup owns 32 queries of a head and computes their dq. Grid: (ceil(S / 32), H, B).
{% else %}
// here a workgroup owns 32 keys and computes dk and dv of them: over all query heads of their group, or, where
// MEMBERS = 1, of one query head into its own slice of [B, S, H, E], to be summed by attention_group_sum.
// Grid: (ceil(S / 32), H / MEMBERS, B).
{% endif %}
{% include "_attention.wgsl" %}

{# sij becomes P, pij becomes dS, for query QUERY and key KEY of the place (i, j). #}
{% macro slope(i, j, query, key, lse, delta, segment) %}
      {
        let seen = attends({{ query }}, {{ key }}, {{ segment }});
        let weight = select(0.0, exp(min(s{{ i }}{{ j }} * {{ scale }} - {{ lse }}, 0.0)), seen);
        s{{ i }}{{ j }} = weight;
        p{{ i }}{{ j }} = weight * (p{{ i }}{{ j }} - {{ delta }}) * {{ scale }};
      }
{% endmacro %}

{% macro facts(n, query, head) %}
      let query{{ n }} = {{ query }};
      let at{{ n }} = (row_start + min(query{{ n }}, {{ S - 1 }}u)) * {{ H }}u + {{ head }};
      let lse{{ n }} = statistics[at{{ n }}];
      let delta{{ n }} = statistics[{{ B * S * H }}u + at{{ n }}];
      let segment{{ n }} = segment_start[row_start + min(query{{ n }}, {{ S - 1 }}u)];
{% endmacro %}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let tx = thread % 8u;
  let ty = thread / 8u;
  let row_start = group.z * {{ S }}u;
{% if mode == "query" %}
  let q0 = ({{ (S + 31) // 32 - 1 }}u - group.x) * 32u; // the longest first
  let head = group.y;
  let kv_head = head / {{ H // K }}u;
{% for i in range(4) %}
  {{ facts(i, "q0 + 4u * ty + %du" % i, "head") }}
{% endfor %}
  {{ parts.declare("dq_") }}
  let last = min(q0 + 31u, {{ S - 1 }}u);
  for (var k0 = segment_start[row_start + q0] / 32u * 32u; k0 <= last; k0 += 32u) {
    {{ parts.scores("s", "q", "q0", "head", H, "k", "k0", "kv_head", K) }}
    {{ parts.scores("p", "dout", "q0", "head", H, "v", "k0", "kv_head", K) }}
{% for i in range(4) %}{% for j in range(4) %}
    {{ slope(i, j, "query%d" % i, "k0 + tx + %du" % (8 * j), "lse%d" % i, "delta%d" % i, "segment%d" % i) }}
{% endfor %}{% endfor %}
    {{ parts.keep("weights", "p") }}
    {{ parts.combine("dq_", "weights", "k", "k0", "kv_head", K) }}
  }
  {{ parts.store("dq", "dq_", "q0", "head", H, "") }}
{% else %}
  let k0 = group.x * 32u;
  let kv_head = group.y / {{ H // K // MEMBERS }}u;
  let last_key = k0 + 31u;
  {{ parts.declare("dk_") }}
  {{ parts.declare("dv_") }}
  for (var member = 0u; member < {{ MEMBERS }}u; member++) {
    let head = group.y * {{ MEMBERS }}u + member;
    for (var q0 = k0; q0 < {{ S }}u; q0 += 32u) {
      if (segment_start[row_start + q0] > last_key) { break; }
{% for j in range(4) %}
      {{ facts(j, "q0 + tx + %du" % (8 * j), "head") }}
{% endfor %}
      {{ parts.scores("s", "k", "k0", "kv_head", K, "q", "q0", "head", H) }}
      {{ parts.scores("p", "v", "k0", "kv_head", K, "dout", "q0", "head", H) }}
{% for i in range(4) %}{% for j in range(4) %}
      {{ slope(i, j, "query%d" % j, "k0 + 4u * ty + %du" % i, "lse%d" % j, "delta%d" % j, "segment%d" % j) }}
{% endfor %}{% endfor %}
      {{ parts.keep("weights", "p") }}
      workgroupBarrier(); // everybody has read `left`, which holds P from here on
      {{ parts.keep("left", "s") }}
      {{ parts.combine("dk_", "weights", "q", "q0", "head", H) }}
      {{ parts.combine("dv_", "left", "dout", "q0", "head", H) }}
    }
  }
  {{ parts.store("dk", "dk_", "k0", "group.y", H // MEMBERS, "") }}
  {{ parts.store("dv", "dv_", "k0", "group.y", H // MEMBERS, "") }}
{% endif %}
}
