// C [M, N] = alpha * A op(B) + beta * P op(Q) + bias + residual (= or, with an in-place residual, +=).
//
// A [M, K] f16; B [N, K] or, where its k is not contiguous, [K, N], f16 or narrowed on the way in from f32, bf16 or half;
// N a multiple of 4, K of BK; P [M, R], Q [N, R] or [R, N] f32; C f32 or f16. Products and their sums over one slice of BK
// steps are f16, the sums of slices f32: relative error 6e-4 to 1.2e-3 (docs/gemm.md).
// Grid: (ceil(M / BM), ceil(N / BN), slices of K); with several slices, slice z writes to C + z * M * N.
//
// Tiles lie k-major in workgroup memory, B as vec4 along n, A with every value twice, so that a product is two packed
// FMAs without a splat: taking one half of a register and doubling it costs as much as the FMAs. A thread stages 4x4
// blocks, transposed in registers where k is contiguous. Rows are swizzled: pair x of row k lies at x ^ (k / 4 % 8), else
// the eight threads that store one column of blocks would all hit one bank.
{% import "lib/low_precision_epilogue.wgsl" as epilogue with context %}
{% include "lib/widen.wgsl" %}
{% set TX = BN // TN %}{% set TY = BM // TM %}{% set THREADS = TX * TY %}
var<workgroup> tile_a: array<vec4<f16>, {{ BK * BM // 2 }}>;
var<workgroup> tile_b: array<vec4<f16>, {{ BK * BN // 4 }}>;

{% macro narrow(operand, value) %}
{% if operand.format in ("bf16", "half") %}
vec4<f16>(vec4<f32>(widen_{{ operand.format }}({{ value }}.x), widen_{{ operand.format }}({{ value }}.y)))
{%- else %}
{{ value if operand.format == "f16" else "vec4<f16>(%s)" % value }}
{%- endif %}
{% endmacro %}

{# A thread's share of a tile in registers: all loads are under way before the first is waited for. #}
{% macro shares(operand, width) %}{{ (BK * width // (16 if operand.k_contiguous else 4) + THREADS - 1) // THREADS }}{% endmacro %}
{% macro for_each_share(operand, width, share) %}
{% set blocks = BK * width // (16 if operand.k_contiguous else 4) %}
{% if (share + 1) * THREADS > blocks %}
    if (thread < {{ blocks - share * THREADS }}u) {
{% else %}
    {
{% endif %}
      let block = thread + {{ share * THREADS }}u;
{% if operand.k_contiguous %}
      let k = block % 8u + block / {{ 2 * width }}u * 8u;
      let quad = block / 8u % {{ width // 4 }}u;
{% else %}
      let k = block / {{ width // 4 }}u;
      let quad = block % {{ width // 4 }}u;
{% endif %}
{% endmacro %}
{% macro declare(registers, operand, width) %}
{% for share in range(shares(operand, width) | int) %}{% for i in range(4 if operand.k_contiguous else 1) %}
  var {{ registers }}{{ share }}_{{ i }}: {{ "vec2<u32>" if operand.format in ("bf16", "half") else "vec4<%s>" % operand.format }};
{% endfor %}{% endfor %}
{% endmacro %}
{# Rows of A and columns of C past the last are read as the last: what they make is not written. #}
{% macro within(index, count, step) %}{{ "min(%s, %du)" % (index, count - 1) if count % step else index }}{% endmacro %}
{% macro load(registers, source, operand, width, origin, count) %}
{% for share in range(shares(operand, width) | int) %}
{{ for_each_share(operand, width, share) }}
{% if operand.k_contiguous %}
{% for i in range(4) %}
      {{ registers }}{{ share }}_{{ i }} = {{ source }}[{{ operand.base // 4 }}u + ({{ within("%s + quad * 4u + %du" % (origin, i), count, width) }}) * {{ operand.stride // 4 }}u + (k0 >> 2u) + k];
{% endfor %}
{% else %}
      {{ registers }}{{ share }}_0 = {{ source }}[{{ operand.base // 4 }}u + (k0 + k) * {{ operand.stride // 4 }}u + {{ within("(%s >> 2u) + quad" % origin, count // 4, width // 4) }}];
{% endif %}
    }
{% endfor %}
{% endmacro %}
{% macro store(registers, operand, width, twice) %}
{% for share in range(shares(operand, width) | int) %}
{{ for_each_share(operand, width, share) }}
{% if operand.k_contiguous %}
{% for i in range(4) %}
      let row{{ i }} = {{ narrow(operand, "%s%d_%d" % (registers, share, i)) }};
{% endfor %}
      let at = k * {{ width }}u + 2u * ((quad >> 1u) ^ (k % 8u)) + (quad & 1u);
{% for i in range(4) %}
{% if twice %}
      tile_a[2u * at + {{ i * width // 2 }}u] = vec4<f16>(row0[{{ i }}], row0[{{ i }}], row1[{{ i }}], row1[{{ i }}]);
      tile_a[2u * at + {{ i * width // 2 + 1 }}u] = vec4<f16>(row2[{{ i }}], row2[{{ i }}], row3[{{ i }}], row3[{{ i }}]);
{% else %}
      tile_b[at + {{ i * width // 4 }}u] = vec4<f16>(row0[{{ i }}], row1[{{ i }}], row2[{{ i }}], row3[{{ i }}]);
{% endif %}
{% endfor %}
{% else %}
      tile_b[k * {{ width // 4 }}u + 2u * ((quad >> 1u) ^ (k / 4u % 8u)) + (quad & 1u)] = {{ narrow(operand, "%s%d_0" % (registers, share)) }};
{% endif %}
    }
{% endfor %}
{% endmacro %}

@compute @workgroup_size({{ THREADS }})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let tx = thread % {{ TX }}u;
  let ty = thread / {{ TX }}u;
  let m0 = group.x * {{ BM }}u;
  let n0 = group.y * {{ BN }}u;
{% for i in range(TM) %}{% for j in range(TN // 4) %}
  var acc{{ i }}_{{ j }} = vec4<f32>();
{% endfor %}{% endfor %}
{{ declare("ra", A, BM) }}
{{ declare("rb", B, BN) }}
  let from_k = group.z * {{ slice }}u;
  let to_k = min(from_k + {{ slice }}u, {{ K }}u);
  for (var k0 = from_k; k0 < to_k; k0 += {{ BK }}u) {
{{ load("ra", "a", A, BM, "m0", M) }}
{{ load("rb", "b", B, BN, "n0", N) }}
{{ store("ra", A, BM, true) }}
{{ store("rb", B, BN, false) }}
    workgroupBarrier();
{% for i in range(TM) %}{% for j in range(TN // 2) %}
    var h{{ i }}_{{ j }} = vec2<f16>();
{% endfor %}{% endfor %}
{% if unroll < BK %}
    for (var step = 0u; step < {{ BK }}u; step += {{ unroll }}u) {
{% else %}
    {
      let step = 0u;
{% endif %}
{% for u in range(unroll) %}
      {
        let k = step + {{ u }}u;
        let swizzle = {{ "%du" % (u // 4 % 8) if unroll % 32 == 0 else "k / 4u % 8u" }};
{% for i in range(TM // 8) %}
        let at{{ i }} = k * {{ BM // 2 }}u + 4u * ((ty * {{ TM // 8 }}u + {{ i }}u) ^ swizzle);
{% for part in range(4) %}
        let va{{ 4 * i + part }} = tile_a[at{{ i }} + {{ part }}u];
{% endfor %}
{% endfor %}
{% for j in range(TN // 8) %}
        let from{{ j }} = k * {{ BN // 4 }}u + 2u * ((tx * {{ TN // 8 }}u + {{ j }}u) ^ swizzle);
{% for part in range(2) %}
        let vb{{ 2 * j + part }} = tile_b[from{{ j }} + {{ part }}u];
{% endfor %}
{% endfor %}
{% for i in range(TM) %}{% for j in range(TN // 2) %}
        h{{ i }}_{{ j }} = fma(va{{ i // 2 }}.{{ "xy" if i % 2 == 0 else "zw" }}, vb{{ j // 2 }}.{{ "xy" if j % 2 == 0 else "zw" }}, h{{ i }}_{{ j }});
{% endfor %}{% endfor %}
      }
{% endfor %}
    }
{% for i in range(TM) %}{% for j in range(TN // 4) %}
    acc{{ i }}_{{ j }} += vec4<f32>(vec2<f32>(h{{ i }}_{{ 2 * j }}), vec2<f32>(h{{ i }}_{{ 2 * j + 1 }}));
{% endfor %}{% endfor %}
    workgroupBarrier();
  }
{% if alpha != 1.0 %}
{% for i in range(TM) %}{% for j in range(TN // 4) %}
  acc{{ i }}_{{ j }} *= f32({{ alpha }});
{% endfor %}{% endfor %}
{% endif %}
{% set rows = [] %}{% for i in range(TM) %}{{ rows.append("(m0 + ty * %du + %du)" % (TM, i)) or "" }}{% endfor %}
{% set columns = [] %}{% for j in range(TN // 4) %}{{ columns.append("n0 + tx * %du + %du" % (TN, 4 * j)) or "" }}{% endfor %}

{% if R %}
  {{ epilogue.add_pair(rows, columns, 4) }}
{% endif %}
  {{ epilogue.write(rows, columns, 4) }}
}
