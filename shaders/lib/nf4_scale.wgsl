{% set of = part | default("") %}
// The scale of a block of 64 codes; the weight's bindings end with its name where a kernel has several.
fn scale_of{{ of }}(block: u32) -> f32 {
{% if double %}
  let code = (absmax_codes{{ of }}[block >> 2u] >> (8u * (block & 3u))) & 0xffu;
  // The XOR with a zero that the compiler does not know keeps the product and the sum apart.
  let product = bitcast<u32>(table{{ of }}[code] * nested{{ of }}[block >> 8u]) ^ bitcast<u32>(table{{ of }}[257]);
  return bitcast<f32>(product) + table{{ of }}[256];
{% else %}
  return absmax{{ of }}[block];
{% endif %}
}
