// An NF4 weight [N, K] as operand of a low-precision product that contracts over K, K a multiple of 64 (=).
{% if arithmetic == "f16" %}
// out [N, K] f16: the weight's values rounded to binary16.
{% else %}
// out [N, K] int8, four to a u32, and scales [K / 64, N] f32: NF4's blocks lie along K, so a block's scale is its absmax
// over 127, and a code's int8 is its entry of the codebook times 127, rounded.
{% endif %}
// One invocation a word of eight codes, the first of two in the high nibble. Grid: ceil(N * K / 2048), folded.
{% include "_grid.wgsl" %}
{% include "_nf4.wgsl" %}
{% if arithmetic == "int8" %}
var<workgroup> bytes: array<u32, 16>; // the codebook in int8
{% endif %}

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
{% if arithmetic == "f16" %}
  fill_codebook(thread);
{% else %}
  var values = array<u32, 16>({{ bytes }});
  if (thread < 16u) { bytes[thread] = values[thread]; }
  workgroupBarrier();
{% endif %}
  let word = linear_workgroup(group, groups) * 256u + thread;
  if (word >= {{ N * K // 8 }}u) { return; }
  let bits = codes[word];
  let block = word >> 3u;
{% if arithmetic == "f16" %}
  let scale = scale_of(block);
{% for i in range(8) %}
  let value{{ i }} = rounded(codebook[(bits >> {{ (i // 2) * 8 + (4 if i % 2 == 0 else 0) }}u) & 15u] * scale);
{% endfor %}
  out[word * 2u] = vec4<f16>(vec4<f32>(value0, value1, value2, value3));
  out[word * 2u + 1u] = vec4<f16>(vec4<f32>(value4, value5, value6, value7));
{% else %}
{% for i in range(8) %}
  let byte{{ i }} = bytes[(bits >> {{ (i // 2) * 8 + (4 if i % 2 == 0 else 0) }}u) & 15u];
{% endfor %}
  out[word * 2u] = byte0 | (byte1 << 8u) | (byte2 << 16u) | (byte3 << 24u);
  out[word * 2u + 1u] = byte4 | (byte5 << 8u) | (byte6 << 16u) | (byte7 << 24u);
  if ((word & 7u) == 0u) {
    scales[(block % {{ K // 64 }}u) * {{ N }}u + block / {{ K // 64 }}u] = scale_of(block) * {{ over_127 }};
  }
{% endif %}
}
