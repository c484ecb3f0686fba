// The NF4 codebook, block scales and the rounding of a quantisation state, bit for bit as nf4.py.
// Call fill_codebook first: an array in registers cannot be indexed by data, and one in private memory is slow. It ends
// with a barrier.
var<workgroup> codebook: array<f32, 16>;

fn fill_codebook(thread: u32) {
{% for value in codebook %}
  if (thread == {{ loop.index0 }}u) { codebook[{{ loop.index0 }}] = {{ value }}; }
{% endfor %}
  workgroupBarrier();
}

{% include "lib/nf4_scale.wgsl" %}

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
