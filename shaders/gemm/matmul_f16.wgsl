// C [M, N] = alpha * A op(B) + lora_scale * P op(Q) + bias + residual in f16 (= or, with an in-place residual, +=).
//
// A [M, K] f16; B [N, K] or, where its k is not contiguous, [K, N], f16 or converted on the way in from f32, bf16 or half;
// N a multiple of 4, K of BK; P [M, R], Q [N, R] or [R, N] f32; C f32 or f16. Products and their sums over one slice of BK
// steps are f16, the sums of up to 1,024 slices f32: relative error 6e-4 to 1.2e-3 (docs/gemm.md).
// Grid: (ceil(M / BM), ceil(N / BN), slices of K); with several slices, slice z writes to C + z * M * N.
//
// Tiles lie k-major in workgroup memory, B as vec4 along n, A with every value twice, so that a product is two packed
// FMAs without a splat: taking one half of a register and doubling it costs as much as the FMAs.
{% set TX = BN // TN %}{% set TY = BM // TM %}{% set THREADS = TX * TY %}
{% set rows = [] %}{% for i in range(TM) %}{{ rows.append("(m0 + ty * %du + %du)" % (TM, i)) or "" }}{% endfor %}
{% set columns = [] %}{% for j in range(TN // 4) %}{{ columns.append("n0 + tx * %du + %du" % (TN, 4 * j)) or "" }}{% endfor %}
{% import "lib/staging.wgsl" as staging with context %}
{% import "lib/epilogue.wgsl" as epilogue with context %}
{% include "lib/widen.wgsl" %}
var<workgroup> tile_a: array<vec4<f16>, {{ BK * BM // 2 }}>;
var<workgroup> tile_b: array<vec4<f16>, {{ BK * BN // 4 }}>;

@compute @workgroup_size({{ THREADS }})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let tx = thread % {{ TX }}u;
  let ty = thread / {{ TX }}u;
  let m0 = group.x * {{ BM }}u;
  let n0 = group.y * {{ BN }}u;
{{ staging.declare_f16("ra", A, BM) }}
{{ staging.declare_f16("rb", B, BN) }}
  let z = group.z;
  let from_k = z * {{ slice }}u;
  let to_k = min(from_k + {{ slice }}u, {{ K }}u);
{% call(from, to) epilogue.each_block("from_k", "to_k") %}
{% for i in range(TM) %}{% for j in range(TN // 4) %}
  var acc{{ i }}_{{ j }} = vec4<f32>();
{% endfor %}{% endfor %}
  for (var k0 = {{ from }}; k0 < {{ to }}; k0 += {{ BK }}u) {
{{ staging.load_f16("ra", "a", A, BM, "m0", M) }}
{{ staging.load_f16("rb", "b", B, BN, "n0", N) }}
{{ staging.store_f16("tile_a", "ra", A, BM, true) }}
{{ staging.store_f16("tile_b", "rb", B, BN, false) }}
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
  {{ epilogue.scale(rows, columns) }}
{% if R %}
  {{ epilogue.add_low_rank(rows, columns, 4) }}
{% endif %}
  {{ epilogue.write(rows, columns, 4, N % BN != 0) }}
{% endcall %}
}
