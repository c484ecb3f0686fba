// C [M, N] = A B^T + beta * P op(Q) + bias + residual (= or, with an in-place residual, +=).
//
// A [M, K], B [N, K] int8, four to a u32, with scales a_scale [K / 64, M] and b_scale [K / 64, N] for blocks of 64 along
// K; N a multiple of BN, K of 64; P [M, R], Q [N, R] or [R, N] f32. A block's products are summed exactly in int32, and
// the scaled sums of blocks in f32.
// Grid: (ceil(M / BM), N / BN, slices of K); with several slices, slice z writes to C + z * M * N.
//
// A tile is one block long. Its rows stay as they come, vec4 = 16 codes along k, padded by one vec4 against bank
// conflicts; the next tile is loaded into registers during the multiplication. Sums start at the bits of 1.5 * 2^23, so
// that reading them as a float and subtracting that converts them: |sum| <= 64 * 127^2 < 2^22.
{% import "lib/low_precision_epilogue.wgsl" as epilogue with context %}
{% set TX = BN // TN %}{% set TY = BM // TM %}{% set THREADS = TX * TY %}
{% set SHARE_A = BM * 4 // THREADS %}{% set SHARE_B = BN * 4 // THREADS %}
var<workgroup> tile_a: array<vec4<u32>, {{ BM * 5 }}>;
var<workgroup> tile_b: array<vec4<u32>, {{ BN * 5 }}>;
const ZERO = 0x4b400000;

{# Rows of A past the last are read as the last: what they make is not written. #}
{% macro row_of(row, edge) %}{{ "min(%s, %du)" % (row, M - 1) if edge else row }}{% endmacro %}
{% macro load(source, registers, share, origin, edge) %}
{% for i in range(share) %}
    {{ registers }}{{ i }} = {{ source }}[({{ row_of("%s + (thread + %du) / 4u" % (origin, i * THREADS), edge) }}) * {{ K // 16 }}u + block * 4u + thread % 4u];
{% endfor %}
{% endmacro %}

@compute @workgroup_size({{ THREADS }})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let tx = thread % {{ TX }}u;
  let ty = thread / {{ TX }}u;
  let m0 = group.x * {{ BM }}u;
  let n0 = group.y * {{ BN }}u;
{% for i in range(TM) %}{% for j in range(TN) %}
  var acc{{ i }}_{{ j }} = 0.0;
{% endfor %}{% endfor %}
{% for i in range(SHARE_A) %}
  var ra{{ i }}: vec4<u32>;
{% endfor %}
{% for i in range(SHARE_B) %}
  var rb{{ i }}: vec4<u32>;
{% endfor %}
  var block = group.z * {{ slice // 64 }}u;
  let end = min(block + {{ slice // 64 }}u, {{ K // 64 }}u);
  {{ load("a", "ra", SHARE_A, "m0", M % BM != 0) }}
  {{ load("b", "rb", SHARE_B, "n0", false) }}
  while (block < end) {
{% for i in range(TM) %}
    let sa{{ i }} = a_scale[block * {{ M }}u + {{ row_of("m0 + ty + %du" % (i * TY), M % BM != 0) }}];
{% endfor %}
{% for j in range(TN) %}
    let sb{{ j }} = b_scale[block * {{ N }}u + n0 + tx + {{ j * TX }}u];
{% endfor %}
{% for i in range(SHARE_A) %}
    tile_a[((thread + {{ i * THREADS }}u) / 4u) * 5u + thread % 4u] = ra{{ i }};
{% endfor %}
{% for i in range(SHARE_B) %}
    tile_b[((thread + {{ i * THREADS }}u) / 4u) * 5u + thread % 4u] = rb{{ i }};
{% endfor %}
    workgroupBarrier();
    block += 1u;
    if (block < end) {
  {{ load("a", "ra", SHARE_A, "m0", M % BM != 0) }}
  {{ load("b", "rb", SHARE_B, "n0", false) }}
    }
{% for i in range(TM) %}{% for j in range(TN) %}
    var h{{ i }}_{{ j }} = ZERO;
{% endfor %}{% endfor %}
{% if unroll < 4 %}
    for (var k = 0u; k < 4u; k++) {
{% endif %}
{% for u in range(unroll) %}
    {
{% if unroll == 4 %}
      let k = {{ u }}u;
{% endif %}
{% for j in range(TN) %}
      let vb{{ j }} = tile_b[(tx + {{ j * TX }}u) * 5u + k];
{% endfor %}
{% for i in range(TM) %}
      let va{{ i }} = tile_a[(ty + {{ i * TY }}u) * 5u + k];
{% for j in range(TN) %}{% for word in "xyzw" %}
      h{{ i }}_{{ j }} += dot4I8Packed(va{{ i }}.{{ word }}, vb{{ j }}.{{ word }});
{% endfor %}{% endfor %}
{% endfor %}
    }
{% endfor %}
{% if unroll < 4 %}
    }
{% endif %}
{% for i in range(TM) %}{% for j in range(TN) %}
    acc{{ i }}_{{ j }} = fma((bitcast<f32>(h{{ i }}_{{ j }}) - 12582912.0) * sa{{ i }}, sb{{ j }}, acc{{ i }}_{{ j }});
{% endfor %}{% endfor %}
    workgroupBarrier();
  }
{% set rows = [] %}{% for i in range(TM) %}{{ rows.append("(m0 + ty + %du)" % (i * TY)) or "" }}{% endfor %}
{% set columns = [] %}{% for j in range(TN) %}{{ columns.append("n0 + tx + %du" % (j * TX)) or "" }}{% endfor %}

{% if R %}
  {{ epilogue.add_pair(rows, columns, 1) }}
{% endif %}
  {{ epilogue.write(rows, columns, 1) }}
}
