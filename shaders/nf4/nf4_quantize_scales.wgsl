// 8-bit codes of block scales and the nested scale of each group of 256 (nf4.py has the arithmetic). `=`.
// One workgroup of 256 a group. Grid: ceil(blocks / 256), folded.
{% set WIDTH = 256 %}
{% include "lib/grid.wgsl" %}
{% include "lib/reduce.wgsl" %}
{% include "lib/divide.wgsl" %}
var<workgroup> bytes: array<u32, 256>;
var<workgroup> inverse: f32;

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let number = linear_workgroup(group, groups);
  let at = number * 256u + thread;
  var centred = 0.0;
  if (at < {{ blocks }}u) { centred = absmax[at] - mean[0]; }
  let highest = workgroup_max(abs(centred), thread);
  if (thread == 0u) {
    inverse = 0.0;
    if (highest > 0.0) { inverse = divide(1.0, highest); }
  }
  workgroupBarrier();
  let y = clamp(centred * inverse, -1.0, 1.0);
  // Halving is exact, so this is the one product that may be contracted with the sum after it; when it is, the grid
  // position moves by one part in 2^40 at most, and the code can only fall on a neighbour.
  let place = u32((y + 1.0) * 0.5 * 65535.0 + 0.5);
  let code = (steps[place >> 2u] >> (8u * (place & 3u))) & 0xffu;
  bytes[thread] = select(0u, code, highest > 0.0);
  workgroupBarrier();
  if (thread < 64u && number * 256u + thread * 4u < {{ blocks }}u) {
    var word = 0u;
    for (var i = 0u; i < 4u; i++) { word |= bytes[thread * 4u + i] << (8u * i); }
    codes[number * 64u + thread] = word;
  }
  if (thread == 0u && number * 256u < {{ blocks }}u) { nested[number] = highest; }
}
