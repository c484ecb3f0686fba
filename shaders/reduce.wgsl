// Sums in f32 in a fixed order, times a factor; `=`, or `+=` where the output is added to in place.
{% if mode == "rows" %}
// out[r] = sum of source[r*CHUNK .. min((r+1)*CHUNK, TOTAL)). One workgroup of 64 per output. Grid: OUTER, folded.
{% else %}
// source [LENGTH, INNER]; out[p, i] = sum of source[l, i] over l in [p*CHUNK, min((p+1)*CHUNK, LENGTH)).
// One invocation per output. Grid: ceil(PARTS * INNER / 64), folded.
{% endif %}
{% include "lib/grid.wgsl" %}
{% from "lib/blocked_sum.wgsl" import add_sum %}
{% if mode == "rows" %}{% include "lib/reduce.wgsl" %}{% endif %}

@compute @workgroup_size(64)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let index = linear_workgroup(group, groups);
{% if mode == "rows" %}
  // Every workgroup takes part in the barriers; only those inside the output write.
  let inside = index < {{ OUTER }}u;
  var total = 0.0;
  if (inside) {
    let end = min((index + 1u) * {{ CHUNK }}u, {{ TOTAL }}u);
  {{ add_sum("total", "index * %du + thread" % CHUNK, "end", 64, CHUNK, "source[l]") }}
  }
  total = workgroup_sum(total, thread);
  if (inside && thread == 0u) { out[index] = {{ "out[index] + " if accumulate else "" }}total * {{ factor }}; }
{% else %}
  let at = index * 64u + thread;
  if (at >= {{ PARTS * INNER }}u) { return; }
  let first = at / {{ INNER }}u;
  let end = min((first + 1u) * {{ CHUNK }}u, {{ LENGTH }}u);
  var total = 0.0;
  {{ add_sum("total", "first * %du" % CHUNK, "end", 1, CHUNK, "source[l * %du + at %% %du]" % (INNER, INNER)) }}
  out[at] = {{ "out[at] + " if accumulate else "" }}total * {{ factor }};
{% endif %}
}
