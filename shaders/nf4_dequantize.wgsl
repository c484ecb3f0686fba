// out[i] = CODEBOOK[code i] * scale of block i / 64, rounded as the quantisation state says. `=`, bit-equal to nf4.py.
// {{ "Scales are 8-bit codes: table[code] * nested[block / 256] + table[256], two roundings." if double else "Scales are f32." }}
// One invocation a word of eight codes, the first of two in the high nibble. Grid: ceil(size / 2048), folded.
{% include "_grid.wgsl" %}
const CODEBOOK = array<f32, 16>({{ codebook }});

fn scale_of(block: u32) -> f32 {
{% if double %}
  let code = (absmax_codes[block >> 2u] >> (8u * (block & 3u))) & 0xffu;
  // The XOR with a zero that the compiler does not know keeps the product and the sum apart.
  let product = bitcast<u32>(table[code] * nested[block >> 8u]) ^ bitcast<u32>(table[257]);
  return bitcast<f32>(product) + table[256];
{% else %}
  return absmax[block];
{% endif %}
}

fn rounded(value: f32) -> f32 {
{% if rounded == "bfloat16" %}
  let bits = bitcast<u32>(value);
  return bitcast<f32>((bits + 0x7fffu + ((bits >> 16u) & 1u)) & 0xffff0000u);
{% elif rounded == "float16" %}
  // By hand, since WGSL leaves open which way a conversion to binary16 rounds. Below 2^-14 halves are 2^-24 apart.
  let size = abs(value);
  if (size < 6.103515625e-5) { return round(value * 16777216.0) * 5.9604644775390625e-8; }
  let bits = bitcast<u32>(value);
  let nearest = (bits + 0xfffu + ((bits >> 13u) & 1u)) & 0xffffe000u;
  return bitcast<f32>(select(nearest, (bits & 0x80000000u) | 0x7f800000u, size >= 65520.0));
{% else %}
  return value;
{% endif %}
}

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let word = linear_workgroup(group, groups) * 256u + thread;
  if (word * 8u >= {{ size }}u) { return; }
  let bits = codes[word];
  let scale = scale_of(word >> 3u);
  var codebook = CODEBOOK;
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
