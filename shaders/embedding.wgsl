// Rows of one page of a table, [rows, D], whose first row is row `first` of the whole.
{% if mode == "gather" %}
// out[t] = table[ids[t] - first] where that is in the page (=). The table is f32, bf16 or half.
{% else %}
// out[id - first] += sum of dy[t] over all t with ids[t] == id: one workgroup takes the run of equal ids that starts at
// its place of the sorted order, and skips where it does not start one.
{% endif %}
// One workgroup of 64 a token. Grid: T, folded.
{% include "lib/grid.wgsl" %}
{% include "lib/widen.wgsl" %}

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
  let id = ids[min(order[t], {{ T - 1 }}u)];
  let row = id - {{ first }}u;
  if (row >= {{ rows }}u || (t > 0u && ids[min(order[t - 1u], {{ T - 1 }}u)] == id)) { return; }
  for (var d = thread; d < {{ D }}u; d += 64u) {
    var total = out[row * {{ D }}u + d];
    for (var i = t; i < {{ T }}u; i++) {
      let token = min(order[i], {{ T - 1 }}u);
      if (ids[token] != id) { break; }
      total += dy[token * {{ D }}u + d];
    }
    out[row * {{ D }}u + d] = total;
  }
{% endif %}
}
