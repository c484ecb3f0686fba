{# How matmuls bring tiles of A and B into workgroup memory.

   A tile is cut into blocks, and a thread's share of them is loaded into registers NAME{share}_{vector} and stored from
   there: all loads of a share are under way before the first is waited for. An `operand` says how its matrix lies
   (`_operand` in ops/gemm/launches.py): `majors` rows of `minors` elements, `stride` apart; k along a row or across rows.

   Three layouts: k-major tiles of f32 (matmul.wgsl), k-major swizzled tiles of f16 (matmul_f16.wgsl), and rows of int8 as
   they come (matmul_int8.wgsl). The kernel sets THREADS; BK and the formats are its constants. #}

{% macro shares(blocks) %}{{ (blocks + THREADS - 1) // THREADS }}{% endmacro %}

{# For each share of a thread: the number of its `block`, in a scope of its own. #}
{% macro each_share(blocks) %}
{% for share in range(shares(blocks) | int) %}
{% if (share + 1) * THREADS > blocks %}
    if (thread < {{ blocks - share * THREADS }}u) {
{% else %}
    {
{% endif %}
      let block = thread + {{ share * THREADS }}u;
{{ caller(share) }}
    }
{% endfor %}
{% endmacro %}

{% macro declare(registers, blocks, vectors, type) %}
{% for share in range(shares(blocks) | int) %}{% for i in range(vectors) %}
  var {{ registers }}{{ share }}_{{ i }}: {{ type }};
{% endfor %}{% endfor %}
{% endmacro %}

{# A vec4 of the transposed of four vectors: element i of each. #}
{% macro transposed(type, vectors, i) -%}
vec4<{{ type }}>({% for j in range(4) %}{{ vectors }}{{ j }}[{{ i }}]{{ ", " if j < 3 }}{% endfor %})
{%- endmacro %}

{# Rows past the last are read as the last where what they make is not written. #}
{% macro within(index, count, step) %}{{ "min(%s, %du)" % (index, count - 1) if count % step else index }}{% endmacro %}

{# f32 tiles: blocks of 4x4, read as f32, f32 or bf16 or half in memory, and transposed where k lies along memory.

   What lies outside the matrix is zero. An operand without edges is read in place: a function that is called, and a shift
   in an address, each cost a tenth of the speed. Vectors are counted in fours. #}
{% macro plain(operand) %}
{{ "yes" if operand.vector and operand.format in ("f32", "bf16") and not operand.guard_majors and not operand.guard_minors }}
{%- endmacro %}

{% macro fetch(name, operand) %}
{% if not plain(operand) | trim %}
// The four elements from 4 * quad on of row `major`, zero outside the matrix.
fn fetch_{{ name }}(major: u32, quad: u32) -> vec4<f32> {
  if (major >= {{ operand.majors }}u || quad >= {{ (operand.minors + 3) // 4 }}u) { return vec4<f32>(); }
{% if operand.vector %}
  let value = {{ name }}[{{ operand.base // 4 }}u + major * {{ operand.stride // 4 }}u + quad];
{% if operand.format != "f32" %}
  return vec4<f32>(widen_{{ operand.format }}(value.x), widen_{{ operand.format }}(value.y));
{% else %}
  return value;
{% endif %}
{% else %}
  let at = {{ operand.base }}u + major * {{ operand.stride }}u + quad * 4u;
  var value = vec4<f32>();
{% for i in range(4) %}
  if (quad * 4u + {{ i }}u < {{ operand.minors }}u) {
{% if operand.format != "f32" %}
    value[{{ i }}] = widen_{{ operand.format }}({{ name }}[(at + {{ i }}u) >> 1u])[(at + {{ i }}u) & 1u];
{% else %}
    value[{{ i }}] = {{ name }}[at + {{ i }}u];
{% endif %}
  }
{% endfor %}
  return value;
{% endif %}
}
{% endif %}
{% endmacro %}

{% macro read_block(registers, source, operand, major, quad) %}
{% if plain(operand) | trim %}
      let at = {{ operand.base // 4 }}u + ({{ major }}) * {{ operand.stride // 4 }}u + {{ quad }};
{% for i in range(4) %}
{% if operand.format == "bf16" %}
      let word{{ i }} = {{ source }}[at + {{ i * operand.stride // 4 }}u];
      {{ registers }}_{{ i }} = bitcast<vec4<f32>>(vec4<u32>(word{{ i }}.x << 16u, word{{ i }}.x & 0xffff0000u, word{{ i }}.y << 16u, word{{ i }}.y & 0xffff0000u));
{% else %}
      {{ registers }}_{{ i }} = {{ source }}[at + {{ i * operand.stride // 4 }}u];
{% endif %}
{% endfor %}
{% else %}
{% for i in range(4) %}
      {{ registers }}_{{ i }} = fetch_{{ source }}({{ major }} + {{ i }}u, {{ quad }});
{% endfor %}
{% endif %}
{% endmacro %}

{% macro declare_f32(registers, width) %}{{ declare(registers, BK * width // 16, 4, "vec4<f32>") }}{% endmacro %}

{% macro load_f32(registers, source, operand, width, origin, k0) %}
{% call(share) each_share(BK * width // 16) %}
{% if operand.k_contiguous %}
      let quad = ({{ k0 }}) / 4u + block % {{ BK // 4 }}u;
      let major = {{ origin }} + (block / {{ BK // 4 }}u) * 4u;
{% else %}
      let quad = {{ origin }} / 4u + block % {{ width // 4 }}u;
      let major = {{ k0 }} + (block / {{ width // 4 }}u) * 4u;
{% endif %}
  {{ read_block("%s%d" % (registers, share), source, operand, "major", "quad") }}
{% endcall %}
{% endmacro %}

{# TILE[k][m or n] from `buffer` on, times `factor`. #}
{% macro store_f32(tile, registers, operand, width, buffer, factor) %}
{% call(share) each_share(BK * width // 16) %}
{% if operand.k_contiguous %}
      let at = {{ buffer }} + (block % {{ BK // 4 }}u) * {{ width }}u + block / {{ BK // 4 }}u;
{% for i in range(4) %}
      {{ tile }}[at + {{ i * width // 4 }}u] = {{ transposed("f32", "%s%d_" % (registers, share), i) }}{{ factor }};
{% endfor %}
{% else %}
      let at = {{ buffer }} + (block / {{ width // 4 }}u) * {{ width }}u + block % {{ width // 4 }}u;
{% for i in range(4) %}
      {{ tile }}[at + {{ i * width // 4 }}u] = {{ registers }}{{ share }}_{{ i }}{{ factor }};
{% endfor %}
{% endif %}
{% endcall %}
{% endmacro %}

{# f16 tiles: blocks of 4x4, or single vectors where k does not lie along memory; kept in registers as they are stored and
   converted on the way into the tile. Rows are swizzled: pair x of row k lies at x ^ (k / 4 % 8), else the eight threads
   that store one column of blocks would all hit one bank. #}
{% macro converted(operand, value) %}
{% if operand.format in ("bf16", "half") %}
vec4<f16>(vec4<f32>(widen_{{ operand.format }}({{ value }}.x), widen_{{ operand.format }}({{ value }}.y)))
{%- else %}
{{ value if operand.format == "f16" else "vec4<f16>(%s)" % value }}
{%- endif %}
{% endmacro %}

{% macro blocks_f16(operand, width) %}{{ BK * width // (16 if operand.k_contiguous else 4) }}{% endmacro %}

{% macro declare_f16(registers, operand, width) %}
{% set type = "vec2<u32>" if operand.format in ("bf16", "half") else "vec4<%s>" % operand.format %}
{{ declare(registers, blocks_f16(operand, width) | int, 4 if operand.k_contiguous else 1, type) }}
{% endmacro %}

{% macro place_f16(operand, width) %}
{% if operand.k_contiguous %}
      let k = block % 8u + block / {{ 2 * width }}u * 8u;
      let quad = block / 8u % {{ width // 4 }}u;
{% else %}
      let k = block / {{ width // 4 }}u;
      let quad = block % {{ width // 4 }}u;
{% endif %}
{% endmacro %}

{% macro load_f16(registers, source, operand, width, origin, count) %}
{% call(share) each_share(blocks_f16(operand, width) | int) %}
{{ place_f16(operand, width) }}
{% if operand.k_contiguous %}
{% for i in range(4) %}
      {{ registers }}{{ share }}_{{ i }} = {{ source }}[{{ operand.base // 4 }}u + ({{ within("%s + quad * 4u + %du" % (origin, i), count, width) }}) * {{ operand.stride // 4 }}u + (k0 >> 2u) + k];
{% endfor %}
{% else %}
      {{ registers }}{{ share }}_0 = {{ source }}[{{ operand.base // 4 }}u + (k0 + k) * {{ operand.stride // 4 }}u + {{ within("(%s >> 2u) + quad" % origin, count // 4, width // 4) }}];
{% endif %}
{% endcall %}
{% endmacro %}

{# TILE[k][m or n]; `twice`: every value twice, of an operand whose k lies along memory. #}
{% macro store_f16(tile, registers, operand, width, twice) %}
{% call(share) each_share(blocks_f16(operand, width) | int) %}
{{ place_f16(operand, width) }}
{% if operand.k_contiguous %}
{% for i in range(4) %}
      let row{{ i }} = {{ converted(operand, "%s%d_%d" % (registers, share, i)) }};
{% endfor %}
      let at = k * {{ width }}u + 2u * ((quad >> 1u) ^ (k % 8u)) + (quad & 1u);
{% for i in range(4) %}
{% if twice %}
      {{ tile }}[2u * at + {{ i * width // 2 }}u] = vec4<f16>(row0[{{ i }}], row0[{{ i }}], row1[{{ i }}], row1[{{ i }}]);
      {{ tile }}[2u * at + {{ i * width // 2 + 1 }}u] = vec4<f16>(row2[{{ i }}], row2[{{ i }}], row3[{{ i }}], row3[{{ i }}]);
{% else %}
      {{ tile }}[at + {{ i * width // 4 }}u] = {{ transposed("f16", "row", i) }};
{% endif %}
{% endfor %}
{% else %}
      {{ tile }}[k * {{ width // 4 }}u + 2u * ((quad >> 1u) ^ (k / 4u % 8u)) + (quad & 1u)] = {{ converted(operand, "%s%d_0" % (registers, share)) }};
{% endif %}
{% endcall %}
{% endmacro %}

{# int8 tiles: rows of 64 codes, four vectors each, as they come, padded by one vector against bank conflicts. `step`
   counts blocks of 64 along K, and THREADS is a multiple of four. #}
{% macro declare_int8(registers, width) %}{{ declare(registers, width * 4, 1, "vec4<u32>") }}{% endmacro %}

{% macro load_int8(registers, source, operand, width, origin, count) %}
{% call(share) each_share(width * 4) %}
      {{ registers }}{{ share }}_0 = {{ source }}[({{ within("%s + block / 4u" % origin, count, width) }}) * {{ operand.stride // 4 }}u + step * 4u + thread % 4u];
{% endcall %}
{% endmacro %}

{% macro store_int8(tile, registers, width) %}
{% call(share) each_share(width * 4) %}
      {{ tile }}[(block / 4u) * 5u + thread % 4u] = {{ registers }}{{ share }}_0;
{% endcall %}
{% endmacro %}
