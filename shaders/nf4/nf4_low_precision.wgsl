// An NF4 weight [N, K] as operand of a low-precision matmul that contracts over K, K a multiple of 64 (=).
{% if arithmetic == "f16" %}
// out [N, K] f16: the weight's values rounded to binary16. One invocation four codes: half a word.
{% else %}
// out [N, K] int8, four to a u32, and scales [K / 64, N] f32: NF4's blocks lie along K, so a block's scale is its absmax
// over 127, and a code's int8 is its entry of the codebook times 127, rounded. One invocation sixteen codes: two words.
{% endif %}
// Neighbours write side by side. The first of two codes is in the high nibble. Grid: one invocation each, 256 a workgroup,
// folded.
{% include "lib/grid.wgsl" %}
{% include "lib/nf4.wgsl" %}
{% set CODES = 4 if arithmetic == "f16" else 16 %}
{% if arithmetic == "int8" %}
var<workgroup> bytes: array<u32, 16>; // the codebook in int8
{% endif %}

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let i = linear_workgroup(group, groups) * 256u + thread;
  let at = min(i, {{ N * K // CODES - 1 }}u);
  let block = at / {{ 64 // CODES }}u;
{% if arithmetic == "f16" %}
  let words = codes[at >> 2u];
  let scale = scale_of(block);
  fill_codebook(thread);
  let bits = select(words.x, words.y, (at & 2u) != 0u) >> (16u * (at & 1u));
{% for i in range(4) %}
  let value{{ i }} = rounded(codebook[(bits >> {{ (i // 2) * 8 + (4 if i % 2 == 0 else 0) }}u) & 15u] * scale);
{% endfor %}
  if (i == at) { out[i] = vec4<f16>(vec4<f32>(value0, value1, value2, value3)); }
{% else %}
  let bits = codes[at];
{% for byte in bytes %}
  if (thread == {{ loop.index0 }}u) { bytes[{{ loop.index0 }}] = {{ byte }}u; }
{% endfor %}
  workgroupBarrier();
{% for word in range(2) %}{% for i in range(8) %}
  let byte{{ word }}{{ i }} = bytes[(bits[{{ word }}] >> {{ (i // 2) * 8 + (4 if i % 2 == 0 else 0) }}u) & 15u];
{% endfor %}{% endfor %}
  if (i == at) {
    out[i] = vec4<u32>(
{% for word in range(2) %}{% for i in (0, 4) %}
      byte{{ word }}{{ i }} | (byte{{ word }}{{ i + 1 }} << 8u) | (byte{{ word }}{{ i + 2 }} << 16u) | (byte{{ word }}{{ i + 3 }} << 24u),
{% endfor %}{% endfor %}
    );
    if ((i & 3u) == 0u) {
      scales[(block % {{ K // 64 }}u) * {{ N }}u + block / {{ K // 64 }}u] = scale_of(block) * {{ over_127 }};
    }
  }
{% endif %}
}
