// out[i] = CODEBOOK[code i] * scale of block i / 64, rounded as the quantisation state says. `=`, bit-equal to nf4.py.
// {{ "Scales are 8-bit codes: table[code] * nested[block / 256] + table[256], two roundings." if double else "Scales are f32." }}
// One invocation a word of eight codes, the first of two in the high nibble. Grid: ceil(size / 2048), folded.
{% include "lib/grid.wgsl" %}
{% include "lib/nf4.wgsl" %}

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  fill_codebook(thread);
  let word = linear_workgroup(group, groups) * 256u + thread;
  if (word * 8u >= {{ size }}u) { return; }
  let bits = codes[word];
  let scale = scale_of(word >> 3u);
{% for i in range(8) %}
  let value{{ i }} = rounded(codebook[(bits >> {{ (i // 2) * 8 + (4 if i % 2 == 0 else 0) }}u) & 15u] * scale);
{% endfor %}
{% if vector %}
  out[word * 2u] = vec4<f32>(value0, value1, value2, value3);
  out[word * 2u + 1u] = vec4<f32>(value4, value5, value6, value7);
{% else %}
{% for i in range(8) %}
  if (word * 8u + {{ i }}u < {{ size }}u) { out[word * 8u + {{ i }}u] = value{{ i }}; }
{% endfor %}
{% endif %}
}
