// out [T, H E] = the sums of a token's runs of keys, put together in their order and divided by their weights; `=`.
// Zeros for a token whose slot the cache does not have. One invocation per vector. Grid: ceil(T H E / {{ 64 * VEC }}), folded.
{% set floats = "vec4<f32>" if VEC == 4 else "f32" %}
{% include "lib/grid.wgsl" %}
{% include "lib/online_softmax.wgsl" %}

@compute @workgroup_size(64)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let i = linear_workgroup(group, groups) * 64u + thread;
  if (i >= {{ T * H * COLUMNS }}u) { return; }
  let t = i / {{ H * COLUMNS }}u;
  let there = slots[t] < {{ SLOTS }}u;
  let end = select(0u, min(positions[t], {{ CONTEXT - 1 }}u) + 1u, there);
{% if WINDOW %}
  let start = max(end, {{ WINDOW }}u) - {{ WINDOW }}u;
{% else %}
  let start = 0u;
{% endif %}
  var peak = -3e38;
  var weight = 0.0;
  var sum = {{ floats }}();
  let last_run = (end + {{ SPLIT - 1 }}u) / {{ SPLIT }}u;
  for (var run = start / {{ SPLIT }}u; run < last_run; run += {{ AHEAD }}u) {
{% for u in range(AHEAD) %}
    let at{{ u }} = i / {{ COLUMNS }}u * {{ RUNS }}u + min(run + {{ u }}u, last_run - 1u);
    let peak{{ u }} = weights[at{{ u }} * 2u];
    let weight{{ u }} = weights[at{{ u }} * 2u + 1u];
    let sum{{ u }} = sums[at{{ u }} * {{ COLUMNS }}u + i % {{ COLUMNS }}u];
{% endfor %}
{% for u in range(AHEAD) %}
    if (run + {{ u }}u < last_run) {
      let larger = max(peak, peak{{ u }});
      let old = exp2(peak - larger);
      let fresh = exp2(peak{{ u }} - larger);
      weight = added_weight(weight, old, weight{{ u }}, fresh);
      sum = added_values(sum, old, sum{{ u }}, fresh);
      peak = larger;
    }
{% endfor %}
  }
  out[i] = select({{ floats }}(), sum / weight, there);
}
