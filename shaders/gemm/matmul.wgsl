// C = alpha * op(A) op(B) + lora_scale * op(P) op(Q) + bias + residual: the matmul of every op in f32. All sums are f32, over
// blocks of K of {{ block }}, which C adds up: an accumulator's error grows with what it sums.
//
// A [M, K] or, transposed, [K, M]; B [K, N] or, transposed, [N, K]; the optional low-rank factors P, Q have the same layouts
// with inner length R: an adapter rides along in the same accumulators. B may be bf16 or half, two to a u32.
// Offsets and leading dimensions let a launch work on a block of a larger matrix.
// Grid: (ceil(M / BM), ceil(N / BN), slices of K). C is overwritten (=); with an in-place residual it is added to (+=).
// With several slices, slice z writes its partial sum to C + z * M * N, and matmul_sum.wgsl adds them up.
// With a tail, only its columns, the last, have slices, whose sums go to partial [slices, M, tail]; their workgroups come
// last. Grid: (ceil(M / BM), (N - tail) / BN + slices * ceil(tail / BN)).
//
// Tiles lie k-major in workgroup memory as vec4 along m (A) or n (B). A thread stages 4x4 blocks: four vec4 loads along
// the contiguous axis, transposed in registers where that axis is k, so that no two threads write one vec4. The next
// tile is loaded into registers while this one is multiplied; with two buffers one barrier a tile is enough.
// Blocking and register tiles: Volkov & Demmel, "Benchmarking GPUs to tune dense linear algebra" (SC 2008).
{% set TX = BN // TN %}{% set TY = BM // TM %}{% set THREADS = TX * TY %}
{% set SIZE_A = BK * BM // 4 %}{% set SIZE_B = BK * BN // 4 %}
{% set rows = [] %}{% for i in range(TM) %}{{ rows.append("m0 + %du + ty * 4u" % ((i // 4) * TY * 4 + i % 4)) or "" }}{% endfor %}
{% set columns = [] %}{% for j in range(TN // 4) %}{{ columns.append("n0 + %du + tx * 4u" % (j * TX * 4)) or "" }}{% endfor %}
{% import "lib/staging.wgsl" as staging with context %}
{% import "lib/epilogue.wgsl" as epilogue with context %}
{% include "lib/widen.wgsl" %}
var<workgroup> tile_a: array<vec4<f32>, {{ SIZE_A * buffers }}>;
var<workgroup> tile_b: array<vec4<f32>, {{ SIZE_B * buffers }}>;

{{ staging.fetch("a", A) }}
{{ staging.fetch("b", B) }}
{% if R %}
{{ staging.fetch("p", P) }}
{{ staging.fetch("q", Q) }}
{% endif %}

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

{# acc += factor * op(a) op(b), summed from `from` to `to`. #}
{% macro matmul(a, a_operand, b, b_operand, from, to, factor) %}
  {{ staging.load_f32("ra", a, a_operand, BM, "m0", from) }}
  {{ staging.load_f32("rb", b, b_operand, BN, "n0", from) }}
{% if buffers == 2 %}
  {{ staging.store_f32("tile_a", "ra", a_operand, BM, "buffer_a", factor) }}
  {{ staging.store_f32("tile_b", "rb", b_operand, BN, "buffer_b", "") }}
  workgroupBarrier();
{% endif %}
  for (var k0 = {{ from }}; k0 < {{ to }}; k0 += {{ BK }}u) {
{% if buffers == 1 %}
    {{ staging.store_f32("tile_a", "ra", a_operand, BM, "buffer_a", factor) }}
    {{ staging.store_f32("tile_b", "rb", b_operand, BN, "buffer_b", "") }}
    workgroupBarrier();
{% endif %}
    if (k0 + {{ BK }}u < {{ to }}) {
    {{ staging.load_f32("ra", a, a_operand, BM, "m0", "k0 + %du" % BK) }}
    {{ staging.load_f32("rb", b, b_operand, BN, "n0", "k0 + %du" % BK) }}
    }
    {{ multiply() }}
{% if buffers == 2 %}
    buffer_a = {{ SIZE_A }}u - buffer_a;
    buffer_b = {{ SIZE_B }}u - buffer_b;
    if (k0 + {{ BK }}u < {{ to }}) {
    {{ staging.store_f32("tile_a", "ra", a_operand, BM, "buffer_a", factor) }}
    {{ staging.store_f32("tile_b", "rb", b_operand, BN, "buffer_b", "") }}
    }
{% endif %}
    workgroupBarrier();
  }
{% endmacro %}

{# Declared outside of blocks where it can be: after the slice's bounds, NVIDIA's compiler makes a slower loop of them. #}
{% macro accumulators() %}
{% for i in range(TM) %}{% for j in range(TN // 4) %}
  var acc{{ i }}_{{ j }} = vec4<f32>();
{% endfor %}{% endfor %}
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
{{ accumulators() if blocks == 1 }}
  {{ staging.declare_f32("ra", BM) }}
  {{ staging.declare_f32("rb", BN) }}
{% set from_k, to_k = "0u", "%du" % K %}
{% if slices > 1 %}
{% set from_k, to_k = "from_k", "to_k" %}
  let from_k = z * {{ slice }}u;
  let to_k = {{ "select(min(from_k + %du, %du), %du, whole)" % (slice, K, K) if tail else "min(from_k + %du, %du)" % (slice, K) }};
{% endif %}
{% call(from, to) epilogue.each_block(from_k, to_k) %}
{{ accumulators() if blocks > 1 }}
  {{ matmul("a", A, "b", B, from, to, "") }}
  {{ epilogue.scale(rows, columns) }}
{% if R %}
  {{ epilogue.once() }}{
  {{ matmul("p", P, "q", Q, "0u", "%du" % R, "" if lora_scale == 1.0 else " * f32(%r)" % lora_scale) }}
  }
{% endif %}
  {{ epilogue.write(rows, columns, 4, true) }}
{% endcall %}
}
