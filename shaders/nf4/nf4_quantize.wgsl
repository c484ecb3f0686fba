// codes and absmax of blocks of 64 values (nf4.py has the arithmetic). `=`, bit-equal to nf4.quantize.
// One workgroup of 64 a block. Grid: ceil(size / 64), folded.
{% include "lib/grid.wgsl" %}
{% include "lib/reduce.wgsl" %}
{% include "lib/widen.wgsl" %}
{% include "lib/divide.wgsl" %}
const MIDPOINTS = array<f32, 15>({{ midpoints }});
var<workgroup> nibbles: array<u32, 64>;
var<workgroup> inverse: f32;

@compute @workgroup_size(64)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let block = linear_workgroup(group, groups);
  let at = block * 64u + thread;
  var value = 0.0;
  if (at < {{ size }}u) {
{% if format == "f32" %}
    value = weight[at];
{% else %}
    value = widen_{{ format }}(weight[at >> 1u])[at & 1u];
{% endif %}
  }
  let highest = workgroup_max(abs(value), thread);
  // At least 1e-38, by the bits: that is below the normal range, where a GPU's arithmetic may see zero.
  let clamped = bitcast<f32>(max(bitcast<u32>(highest), 0x6ce3eeu));
  if (thread == 0u) { inverse = divide(1.0, clamped); }
  workgroupBarrier();
{% if size % 64 %}
  let whole = (block + 1u) * 64u <= {{ size }}u;
  var scaled = value * inverse;
  if (!whole) { scaled = divide(value, clamped); }
{% else %}
  let scaled = value * inverse;
{% endif %}
  let y = clamp(scaled, -1.0, 1.0);
  var midpoints = MIDPOINTS;
  var code = 0u;
  for (var i = 0u; i < 15u; i++) { code += select(0u, 1u, y > midpoints[i]); }
  nibbles[thread] = code;
  workgroupBarrier();
  if (thread < 8u && block * 64u + thread * 8u < {{ size }}u) {
    var word = 0u;
    for (var i = 0u; i < 8u; i++) {
      let shift = (i >> 1u) * 8u + select(0u, 4u, (i & 1u) == 0u);
      word |= nibbles[thread * 8u + i] << shift;
    }
    codes[block * 8u + thread] = word;
  }
  if (thread == 0u && block * 64u < {{ size }}u) {
{% if size % 64 %}
    absmax[block] = select(clamped, highest, whole);
{% else %}
    absmax[block] = highest;
{% endif %}
  }
}
