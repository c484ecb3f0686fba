// What attention's backward needs of each query and head: statistics[0] = lse, statistics[1] = sum over E of out dout,
// both by head, [B, H, S], from [B, S, H, E] and [B, S, H]. Sums are f32. `=`.
// Eight invocations per (token, head). Grid: ceil(B * S * H / 8), folded.
{% include "lib/grid.wgsl" %}
var<workgroup> sums: array<f32, 64>;

@compute @workgroup_size(64)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let row = linear_workgroup(group, groups) * 8u + thread / 8u;
  var total = 0.0;
  if (row < {{ B * S * H }}u) {
    for (var e = thread % 8u; e < {{ E // WIDTH }}u; e += 8u) {
      let at = row * {{ E // WIDTH }}u + e;
      total += {{ "dot(out[at], dout[at])" if WIDTH == 4 else "out[at] * dout[at]" }};
    }
  }
  sums[thread] = total;
  workgroupBarrier();
  if (thread % 8u == 0u && row < {{ B * S * H }}u) {
    for (var x = 1u; x < 8u; x++) { total += sums[thread + x]; }
    let token = row / {{ H }}u;
    let at = (token / {{ S }}u * {{ H }}u + row % {{ H }}u) * {{ S }}u + token % {{ S }}u;
    statistics[at] = lse[row];
    statistics[{{ B * S * H }}u + at] = total;
  }
}
