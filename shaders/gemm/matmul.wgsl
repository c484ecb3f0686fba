// C = alpha * op(A) op(B) + beta * op(P) op(Q) + bias + residual, all f32 sums.
//
// A [M, K] or, transposed, [K, M]; B [K, N] or, transposed, [N, K]; the optional pair P, Q has the same layouts with
// inner length R: an adapter's low-rank product rides along in the same accumulators. B may be bf16 or half, two
// to a u32. Offsets and leading dimensions let a launch work on a block of a larger matrix.
// Grid: (ceil(M / BM), ceil(N / BN), slices of K). C is overwritten (=); with an in-place residual it is added to (+=).
// With several slices, slice z writes its partial sum to C + z * M * N, and matmul_sum.wgsl adds them up.
// With a tail, only its columns, the last, have slices, whose sums go to partial [slices, M, tail]; their workgroups come
// last. Grid: (ceil(M / BM), (N - tail) / BN + slices * ceil(tail / BN)).
//
// Tiles lie k-major in workgroup memory as vec4 along m (A) or n (B). A thread stages 4x4 blocks: four vec4 loads along
// the contiguous axis, transposed in registers where that axis is k, so that no two threads write one vec4. The next
// tile is loaded into registers while this one is multiplied; with two buffers one barrier a tile is enough.
{% set TX = BN // TN %}{% set TY = BM // TM %}{% set THREADS = TX * TY %}
{% set SIZE_A = BK * BM // 4 %}{% set SIZE_B = BK * BN // 4 %}

{% include "lib/widen.wgsl" %}
var<workgroup> tile_a: array<vec4<f32>, {{ SIZE_A * buffers }}>;
var<workgroup> tile_b: array<vec4<f32>, {{ SIZE_B * buffers }}>;

{# Whether an operand is read as plain vectors, without guard and at most shifted from bf16. Then it is read in place: a
   function that is called, and a shift in an address, each cost a tenth of the speed. Vectors are counted in fours. #}
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
{{ fetch("a", A) }}
{{ fetch("b", B) }}
{% if R %}
{{ fetch("p", P) }}
{{ fetch("q", Q) }}
{% endif %}

{# A thread's share of a tile: `count` 4x4 blocks spread over the threads, in registers NAME{block}_{row}. #}
{% macro shares(width) %}{{ (BK * width // 16 + THREADS - 1) // THREADS }}{% endmacro %}
{% macro for_each_share(width, share) %}
{% if (share + 1) * THREADS > BK * width // 16 %}
    if (thread < {{ BK * width // 16 - share * THREADS }}u) {
{% else %}
    {
{% endif %}
      let block = thread + {{ share * THREADS }}u;
{% endmacro %}

{% macro declare(name, width) %}
{% for share in range(shares(width) | int) %}{% for i in range(4) %}
  var {{ name }}{{ share }}_{{ i }}: vec4<f32>;
{% endfor %}{% endfor %}
{% endmacro %}

{% macro load(registers, source, operand, width, origin, k0) %}
{% for share in range(shares(width) | int) %}
  {{ for_each_share(width, share) }}
{% if operand.k_contiguous %}
      let quad = ({{ k0 }}) / 4u + block % {{ BK // 4 }}u;
      let major = {{ origin }} + (block / {{ BK // 4 }}u) * 4u;
{% else %}
      let quad = {{ origin }} / 4u + block % {{ width // 4 }}u;
      let major = {{ k0 }} + (block / {{ width // 4 }}u) * 4u;
{% endif %}
  {{ read_block("%s%d" % (registers, share), source, operand, "major", "quad") }}
    }
{% endfor %}
{% endmacro %}

{% macro store(tile, registers, operand, width, buffer, factor) %}
{% for share in range(shares(width) | int) %}
  {{ for_each_share(width, share) }}
{% if operand.k_contiguous %}
      let at = {{ buffer }} + (block % {{ BK // 4 }}u) * {{ width }}u + block / {{ BK // 4 }}u;
{% for i in range(4) %}
      {{ tile }}[at + {{ i * width // 4 }}u] = vec4<f32>({% for j in range(4) %}{{ registers }}{{ share }}_{{ j }}[{{ i }}]{{ ", " if j < 3 }}{% endfor %}){{ factor }};
{% endfor %}
{% else %}
      let at = {{ buffer }} + (block / {{ width // 4 }}u) * {{ width }}u + block % {{ width // 4 }}u;
{% for i in range(4) %}
      {{ tile }}[at + {{ i * width // 4 }}u] = {{ registers }}{{ share }}_{{ i }}{{ factor }};
{% endfor %}
{% endif %}
    }
{% endfor %}
{% endmacro %}

{% macro multiply() %}
{% if unroll < BK %}
    for (var k = 0u; k < {{ BK }}u; k += {{ unroll }}u) {
{% else %}
    {
      let k = 0u;
{% endif %}
{% for u in range(unroll) %}
      {
{% for i in range(TM // 4) %}
        let va{{ i }} = tile_a[buffer_a + (k + {{ u }}u) * {{ BM // 4 }}u + {{ i * TY }}u + ty];
{% endfor %}
{% for j in range(TN // 4) %}
        let vb{{ j }} = tile_b[buffer_b + (k + {{ u }}u) * {{ BN // 4 }}u + {{ j * TX }}u + tx];
{% endfor %}
{% for i in range(TM) %}{% for j in range(TN // 4) %}
        acc{{ i }}_{{ j }} = fma(vec4<f32>(va{{ i // 4 }}[{{ i % 4 }}]), vb{{ j }}, acc{{ i }}_{{ j }});
{% endfor %}{% endfor %}
      }
{% endfor %}
    }
{% endmacro %}

{% macro product(a, a_operand, b, b_operand, from, to, factor) %}
  {{ load("ra", a, a_operand, BM, "m0", from) }}
  {{ load("rb", b, b_operand, BN, "n0", from) }}
{% if buffers == 2 %}
  {{ store("tile_a", "ra", a_operand, BM, "buffer_a", factor) }}
  {{ store("tile_b", "rb", b_operand, BN, "buffer_b", "") }}
  workgroupBarrier();
{% endif %}
  for (var k0 = {{ from }}; k0 < {{ to }}; k0 += {{ BK }}u) {
{% if buffers == 1 %}
    {{ store("tile_a", "ra", a_operand, BM, "buffer_a", factor) }}
    {{ store("tile_b", "rb", b_operand, BN, "buffer_b", "") }}
    workgroupBarrier();
{% endif %}
    if (k0 + {{ BK }}u < {{ to }}) {
    {{ load("ra", a, a_operand, BM, "m0", "k0 + %du" % BK) }}
    {{ load("rb", b, b_operand, BN, "n0", "k0 + %du" % BK) }}
    }
    {{ multiply() }}
{% if buffers == 2 %}
    buffer_a = {{ SIZE_A }}u - buffer_a;
    buffer_b = {{ SIZE_B }}u - buffer_b;
    if (k0 + {{ BK }}u < {{ to }}) {
    {{ store("tile_a", "ra", a_operand, BM, "buffer_a", factor) }}
    {{ store("tile_b", "rb", b_operand, BN, "buffer_b", "") }}
    }
{% endif %}
    workgroupBarrier();
  }
{% endmacro %}

@compute @workgroup_size({{ THREADS }})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let tx = thread % {{ TX }}u;
  let ty = thread / {{ TX }}u;
  let m0 = group.x * {{ BM }}u;
{% if tail %}
  let whole = group.y < {{ (N - tail) // BN }}u;
  let piece = group.y - {{ (N - tail) // BN }}u;
  let z = select(piece % {{ slices }}u, 0u, whole);
  let n0 = select({{ (N - tail) // BN }}u + piece / {{ slices }}u, group.y, whole) * {{ BN }}u;
{% else %}
  let z = group.z;
  let n0 = group.y * {{ BN }}u;
{% endif %}
  {{ "var" if buffers == 2 else "let" }} buffer_a = 0u;
  {{ "var" if buffers == 2 else "let" }} buffer_b = 0u;
{% for i in range(TM) %}{% for j in range(TN // 4) %}
  var acc{{ i }}_{{ j }} = vec4<f32>();
{% endfor %}{% endfor %}
  {{ declare("ra", BM) }}
  {{ declare("rb", BN) }}
{% if slices > 1 %}
  let from_k = z * {{ slice }}u;
  let to_k = {{ "select(min(from_k + %du, %du), %du, whole)" % (slice, K, K) if tail else "min(from_k + %du, %du)" % (slice, K) }};
  {{ product("a", A, "b", B, "from_k", "to_k", "") }}
{% else %}
  {{ product("a", A, "b", B, "0u", "%du" % K, "") }}
{% endif %}
{% if alpha != 1.0 %}
{% for i in range(TM) %}{% for j in range(TN // 4) %}
  acc{{ i }}_{{ j }} *= f32({{ alpha }});
{% endfor %}{% endfor %}
{% endif %}
{% if R %}
{% if slices > 1 %}
  if (z == 0u) {
{% endif %}
  {{ product("p", P, "q", Q, "0u", "%du" % R, "" if beta == 1.0 else " * f32(%r)" % beta) }}
{% if slices > 1 %}
  }
{% endif %}
{% endif %}
{% for i in range(TM) %}
  {
    let m = m0 + {{ (i // 4) * TY * 4 + i % 4 }}u + ty * 4u;
    if (m < {{ M }}u) {
{% for j in range(TN // 4) %}
      {
        let n = n0 + {{ j * TX * 4 }}u + tx * 4u;
        let at = {{ "z * %du + " % (M * N) if slices > 1 and not tail }}{{ c_base }}u + m * {{ ldc }}u + n;
{% if c_vector %}
        if (n < {{ N }}u) {
          var value = acc{{ i }}_{{ j }};
{% if tail %}
          if (!whole) {
            partial[(z * {{ M * tail }}u + m * {{ tail }}u + n - {{ N - tail }}u) >> 2u] = value;
          } else {
{% else %}
          {
{% endif %}
{% if bias %}
            value += bias[n >> 2u];
{% endif %}
{% if residual %}
            value += {{ residual }}[at >> 2u];
{% endif %}
            c[at >> 2u] = value;
          }
        }
{% else %}
        for (var x = 0u; x < 4u; x++) {
          if (n + x < {{ N }}u) {
            var value = acc{{ i }}_{{ j }}[x];
{% if bias %}
            value += bias[n + x];
{% endif %}
{% if residual %}
            value += {{ residual }}[at + x];
{% endif %}
            c[at + x] = value;
          }
        }
{% endif %}
      }
{% endfor %}
    }
  }
{% endfor %}
}
