// Heads of T tokens: queries q [T, H E] and keys k [T, K E] {{ "normalised, then " if normed }}rotated by the token's position, pair (i, i + E / 2)
// by pair; queries to out (=), keys and values v [T, K E] to the token's place in caches [SLOTS, CONTEXT, K E] (=). A
// token whose place the caches do not have is left out of them. Sums are f32, in a fixed tree order.
// A workgroup of {{ WIDTH }} takes one head of one token. Grid: T (H + 2 K), folded.
{% include "lib/grid.wgsl" %}
{% if normed %}
{% include "lib/reduce.wgsl" %}
{% endif %}
{% set HALF = E // 2 %}

@compute @workgroup_size({{ WIDTH }})
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let place = linear_workgroup(group, groups);
  let t = min(place / {{ H + 2 * K }}u, {{ T - 1 }}u);
  let head = place % {{ H + 2 * K }}u;
  let here = place < {{ T * (H + 2 * K) }}u;
  let is_query = head < {{ H }}u;
  let is_value = head >= {{ H + K }}u;
  let position = positions[t];
  let slot = slots[t];
  let kept = here && slot < {{ SLOTS }}u && position < {{ CONTEXT }}u;
  let from_query = (t * {{ H }}u + min(head, {{ H - 1 }}u)) * {{ E }}u;
  let kv_head = select(0u, (head - {{ H }}u) % {{ K }}u, !is_query);
  let from_key = (t * {{ K }}u + kv_head) * {{ E }}u;
  let to_key = ((min(slot, {{ SLOTS - 1 }}u) * {{ CONTEXT }}u + min(position, {{ CONTEXT - 1 }}u)) * {{ K }}u + kv_head) * {{ E }}u;
  let angle = min(position, {{ POSITIONS - 1 }}u) * {{ E }}u;
{% if normed %}
  var square = 0.0;
{% endif %}
{% for j in range(EACH) %}
  let i{{ j }} = thread + {{ j * WIDTH }}u;
  var first{{ j }} = 0.0;
  var second{{ j }} = 0.0;
  if (i{{ j }} < {{ HALF }}u) {
    if (is_query) {
      first{{ j }} = {{ source }}[from_query + i{{ j }}];
      second{{ j }} = {{ source }}[from_query + {{ HALF }}u + i{{ j }}];
    } else if (is_value) {
      first{{ j }} = v[from_key + i{{ j }}];
      second{{ j }} = v[from_key + {{ HALF }}u + i{{ j }}];
    } else {
      first{{ j }} = k[from_key + i{{ j }}];
      second{{ j }} = k[from_key + {{ HALF }}u + i{{ j }}];
    }
{% if normed %}
    square = fma(second{{ j }}, second{{ j }}, fma(first{{ j }}, first{{ j }}, square));
{% endif %}
  }
{% endfor %}
{% if normed %}
  let scale = 1.0 / sqrt(workgroup_sum(square, thread) / {{ E }}.0 + {{ eps }});
{% endif %}
{% for j in range(EACH) %}
  if (i{{ j }} < {{ HALF }}u && !is_value) {
{% if normed %}
    if (is_query) {
      first{{ j }} *= scale * (q_weight[i{{ j }}]{{ " + " ~ offset if offset }});
      second{{ j }} *= scale * (q_weight[{{ HALF }}u + i{{ j }}]{{ " + " ~ offset if offset }});
    } else {
      first{{ j }} *= scale * (k_weight[i{{ j }}]{{ " + " ~ offset if offset }});
      second{{ j }} *= scale * (k_weight[{{ HALF }}u + i{{ j }}]{{ " + " ~ offset if offset }});
    }
{% endif %}
    let cosine = table[angle + i{{ j }}];
    let sine = table[angle + {{ HALF }}u + i{{ j }}];
    let turned = first{{ j }} * cosine - second{{ j }} * sine;
    second{{ j }} = second{{ j }} * cosine + first{{ j }} * sine;
    first{{ j }} = turned;
  }
  if (i{{ j }} < {{ HALF }}u) {
    if (is_query && here) {
      out[from_query + i{{ j }}] = first{{ j }};
      out[from_query + {{ HALF }}u + i{{ j }}] = second{{ j }};
    } else if (is_value && kept) {
      values[to_key + i{{ j }}] = {{ element }}(first{{ j }});
      values[to_key + {{ HALF }}u + i{{ j }}] = {{ element }}(second{{ j }});
    } else if (kept) {
      keys[to_key + i{{ j }}] = {{ element }}(first{{ j }});
      keys[to_key + {{ HALF }}u + i{{ j }}] = {{ element }}(second{{ j }});
    }
  }
{% endfor %}
}
