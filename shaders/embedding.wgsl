// Rows of one shard of a table, [rows, D], whose first row is row `first` of the whole.
{% if mode == "gather" %}
// out[t] = table[ids[t] - first] where that is in the shard (=). The table is f32, bf16 or half.
{% else %}
// out[id - first] += sum of dy[t] over all t with ids[t] == id: one workgroup takes the run of equal ids that starts at
// its place of the sorted order, and skips where it does not start one. Sums are f32.
{% endif %}
// One workgroup of 64 per token. Grid: T, folded.
{% include "lib/grid.wgsl" %}
{% include "lib/widen.wgsl" %}

{% if mode != "gather" %}
fn id_at(place: u32) -> u32 {
  return ids[min(order[place], {{ T - 1 }}u)];
}
{% endif %}

@compute @workgroup_size(64)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let t = linear_workgroup(group, groups);
  if (t >= {{ T }}u) { return; }
{% if mode == "gather" %}
  let row = ids[t] - {{ first }}u;
  if (row >= {{ rows }}u) { return; }
  for (var d = thread; d < {{ D }}u; d += 64u) {
    let at = row * {{ D }}u + d;
{% if format != "f32" %}
    out[t * {{ D }}u + d] = widen_{{ format }}(table[at >> 1u])[at & 1u];
{% else %}
    out[t * {{ D }}u + d] = table[at];
{% endif %}
  }
{% else %}
  let id = id_at(t);
  let row = id - {{ first }}u;
  if (row >= {{ rows }}u || (t > 0u && id_at(t - 1u) == id)) { return; }
  for (var d = thread; d < {{ D }}u; d += 64u) {
    // One accumulator takes 1,024 tokens: its rounding error grows with what it sums.
    var total = 0.0;
    for (var i = t; i < {{ T }}u && id_at(i) == id; i += 1024u) {
      var part = 0.0;
      for (var n = i; n < min(i + 1024u, {{ T }}u); n++) {
        if (id_at(n) != id) { break; }
        part += dy[min(order[n], {{ T - 1 }}u) * {{ D }}u + d];
      }
      total += part;
    }
    out[row * {{ D }}u + d] += total;
  }
{% endif %}
}
