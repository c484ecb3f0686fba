// C [M, N] = A B^T + beta * P op(Q) + bias + residual (= or, with an in-place residual, +=).
//
// A [M, K], B [N, K] f16; N a multiple of BN, K of BK; P [M, R], Q [N, R] or [R, N] f32. Products and their sums over one
// slice of BK steps are f16, the sums of slices f32: relative error 6e-4 to 1.2e-3 (docs/gemm.md).
// Grid: (ceil(M / BM), N / BN, slices of K); with several slices, slice z writes to C + z * M * N.
//
// Tiles lie k-major in workgroup memory as vec4 along m or n, so that one product is two packed FMAs. A thread stages
// 4x4 blocks, transposed in registers. Rows are swizzled: vec4 x of row k lies at x ^ (k / 4 * SWIZZLE), else the eight
// threads that store one column of blocks would all hit one bank.
{% import "_narrow_epilogue.wgsl" as epilogue with context %}
{% set TX = BN // TN %}{% set TY = BM // TM %}{% set THREADS = TX * TY %}
{% set SWIZZLE = 16 // (BK // 4) %}
var<workgroup> tile_a: array<vec4<f16>, {{ BK * BM // 4 }}>;
var<workgroup> tile_b: array<vec4<f16>, {{ BK * BN // 4 }}>;

{# Rows of A past the last are read as the last: what they make is not written. #}
{% macro row_of(row, edge) %}{{ "min(%s, %du)" % (row, M - 1) if edge else row }}{% endmacro %}
{% macro stage(tile, source, width, origin, edge) %}
    for (var block = thread; block < {{ BK * width // 16 }}u; block += {{ THREADS }}u) {
      let k = block % {{ BK // 4 }}u;
      let m = block / {{ BK // 4 }}u;
{% for i in range(4) %}
      let row{{ i }} = {{ source }}[({{ row_of("%s + m * 4u + %du" % (origin, i), edge) }}) * {{ K // 4 }}u + (k0 >> 2u) + k];
{% endfor %}
      let at = k * {{ width }}u + (m ^ (k * {{ SWIZZLE }}u));
{% for i in range(4) %}
      {{ tile }}[at + {{ i * width // 4 }}u] = vec4<f16>(row0[{{ i }}], row1[{{ i }}], row2[{{ i }}], row3[{{ i }}]);
{% endfor %}
    }
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
  let from_k = group.z * {{ slice }}u;
  let to_k = min(from_k + {{ slice }}u, {{ K }}u);
  for (var k0 = from_k; k0 < to_k; k0 += {{ BK }}u) {
    {{ stage("tile_a", "a", BM, "m0", M % BM != 0) }}
    {{ stage("tile_b", "b", BN, "n0", false) }}
    workgroupBarrier();
{% for i in range(TM) %}{% for j in range(TN // 4) %}
    var h{{ i }}_{{ j }} = vec4<f16>();
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
        let swizzle = (k / 4u) * {{ SWIZZLE }}u;
{% for i in range(TM // 4) %}
        let va{{ i }} = tile_a[k * {{ BM // 4 }}u + ((ty * {{ TM // 4 }}u + {{ i }}u) ^ swizzle)];
{% endfor %}
{% for j in range(TN // 4) %}
        let vb{{ j }} = tile_b[k * {{ BN // 4 }}u + ((tx * {{ TN // 4 }}u + {{ j }}u) ^ swizzle)];
{% endfor %}
{% for i in range(TM) %}{% for j in range(TN // 4) %}
        h{{ i }}_{{ j }} = fma(vec4<f16>(va{{ i // 4 }}[{{ i % 4 }}]), vb{{ j }}, h{{ i }}_{{ j }});
{% endfor %}{% endfor %}
      }
{% endfor %}
    }
{% for i in range(TM) %}{% for j in range(TN // 4) %}
    acc{{ i }}_{{ j }} += vec4<f32>(h{{ i }}_{{ j }});
{% endfor %}{% endfor %}
    workgroupBarrier();
  }
{% set rows = [] %}{% for i in range(TM) %}{{ rows.append("(m0 + ty * %du + %du)" % (TM, i)) or "" }}{% endfor %}
{% set columns = [] %}{% for j in range(TN // 4) %}{{ columns.append("n0 + tx * %du + %du" % (TN, 4 * j)) or "" }}{% endfor %}

{% if R %}
  {{ epilogue.add_pair(rows, columns, 4) }}
{% endif %}
  {{ epilogue.write(rows, columns, 4) }}
}
