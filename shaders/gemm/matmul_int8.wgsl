// C [M, N] = A B^T + lora_scale * P op(Q) + bias + residual in int8 (= or, with an in-place residual, +=).
//
// A [M, K], B [N, K] int8, four to a u32, with scales a_scale [K / 64, M] and b_scale [K / 64, N] for blocks of 64 along
// K; N a multiple of BN, K of 64; P [M, R], Q [N, R] or [R, N] f32. A block's products are summed exactly in int32, and
// the scaled sums of blocks in f32.
// Grid: (ceil(M / BM), N / BN, slices of K); with several slices, slice z writes to C + z * M * N.
//
// A tile is one block long. The next tile is loaded into registers during the multiplication. Sums start at the bits of
// 1.5 * 2^23, so that reading them as a float and subtracting that converts them: |sum| <= 64 * 127^2 < 2^22.
{% set TX = BN // TN %}{% set TY = BM // TM %}{% set THREADS = TX * TY %}
{% set rows = [] %}{% for i in range(TM) %}{{ rows.append("(m0 + ty + %du)" % (i * TY)) or "" }}{% endfor %}
{% set columns = [] %}{% for j in range(TN) %}{{ columns.append("n0 + tx + %du" % (j * TX)) or "" }}{% endfor %}
{% import "lib/staging.wgsl" as staging with context %}
{% import "lib/epilogue.wgsl" as epilogue with context %}
var<workgroup> tile_a: array<vec4<u32>, {{ BM * 5 }}>;
var<workgroup> tile_b: array<vec4<u32>, {{ BN * 5 }}>;
const ZERO = 0x4b400000;

@compute @workgroup_size({{ THREADS }})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let tx = thread % {{ TX }}u;
  let ty = thread / {{ TX }}u;
  let m0 = group.x * {{ BM }}u;
  let n0 = group.y * {{ BN }}u;
{% for i in range(TM) %}{% for j in range(TN) %}
  var acc{{ i }}_{{ j }} = 0.0;
{% endfor %}{% endfor %}
  {{ staging.declare_int8("ra", BM) }}
  {{ staging.declare_int8("rb", BN) }}
  let z = group.z;
  var step = z * {{ slice // 64 }}u;
  let end = min(step + {{ slice // 64 }}u, {{ K // 64 }}u);
  {{ staging.load_int8("ra", "a", A, BM, "m0", M) }}
  {{ staging.load_int8("rb", "b", B, BN, "n0", N) }}
  while (step < end) {
{% for i in range(TM) %}
    let sa{{ i }} = a_scale[step * {{ M }}u + {{ staging.within("m0 + ty + %du" % (i * TY), M, BM) }}];
{% endfor %}
{% for j in range(TN) %}
    let sb{{ j }} = b_scale[step * {{ N }}u + n0 + tx + {{ j * TX }}u];
{% endfor %}
    {{ staging.store_int8("tile_a", "ra", BM) }}
    {{ staging.store_int8("tile_b", "rb", BN) }}
    workgroupBarrier();
    step += 1u;
    if (step < end) {
  {{ staging.load_int8("ra", "a", A, BM, "m0", M) }}
  {{ staging.load_int8("rb", "b", B, BN, "n0", N) }}
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
{% if R %}
  {{ epilogue.add_low_rank(rows, columns, 1) }}
{% endif %}
  {{ epilogue.write(rows, columns, 1, false) }}
}
