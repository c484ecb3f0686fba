// C [M, N] = a_scale * b_scale * A B^T + lora_scale * P op(Q) + bias + residual in int8 on matrix units (= or, with an in-place
// residual, +=).
//
// A [M, K], B [N, K] int8, sixteen to a vec4<u32>, in the order of ops/gemm/rotated.py, with one scale for each row, a_scale [M] and b_scale [N]; N a multiple of 64,
// K of BK; P [M, R], Q [N, R] or [R, N] f32, rounded to f16. C f32. Products with int8 are summed in int32: exact.
// A subgroup of {{ SUBGROUP }} makes TM x TN of the BM x BN sums of its workgroup, in matrices of {{ MM }} x {{ MN }}.
// Grid: (ceil(M / BM), ceil(N / BN), slices of K); with several slices, slice z writes to C + z * M * N.
//
// Tiles lie in workgroup memory by rows, padded by 16 bytes against bank conflicts. Matrices are opaque: sums
// go through the tiles' memory, some matrices of a row at a time (`groups` of the first and how many), where invocations turn them into f32 and add the rest.
{% set CODES = MK %}{% set MK = HALF_K %}{# of matrices of int8, and of f16 for what is of low rank #}
{% set DOWN = BM // TM %}{% set THREADS = DOWN * (BN // TN) * SUBGROUP %}
{% set WORDS = BK // 16 %}{% set ROW = WORDS + 1 %}{# words of a row of a tile, and with padding #}
{% set MOST = groups[0][1] * MN // 4 + 1 %}{# words of a row of sums, at most #}
{% set P_ROW = MK // 8 + 1 %}{% set Q_ROW = (MK if q_contiguous else BN) // 8 + 1 %}
{% set P_AT = DOWN * (BN // TN) * MM * MOST %}{% set Q_AT = P_AT + DOWN * MM * P_ROW %}
{% set B_AT = BM * ROW %}
{% set AFTER = Q_AT + (BN if q_contiguous else MK) * Q_ROW if R else P_AT %}
{% import "lib/matrix.wgsl" as matrix with context %}
{% import "lib/matrix_int8.wgsl" as int8 with context %}
{% import "lib/epilogue.wgsl" as epilogue with context %}
var<workgroup> tiles: array<vec4<u32>, {{ [(BM + BN) * ROW, AFTER] | max }}>;
{{ matrix.functions({"tiles": 8}, [("tiles", "tiles")]) }}
{{ int8.functions() }}
{% if R %}
{% import "lib/low_rank_tiles.wgsl" as low_rank with context %}
{{ low_rank.readers() }}
{% endif %}
{# A thread's share of a tile of `rows`, from row `row0` on, in the order in which they lie; past the last group, that. #}
{% macro load(registers, source, rows, row0, count) %}
{% for share in range(rows * WORDS // THREADS) %}
{% set at = "(thread + %du)" % (share * THREADS) %}
{% set eight = "%s / 8u + %s / %du" % (row0, at, 8 * WORDS) %}
{% set eight = "min(%s, %du)" % (eight, (count + 7) // 8 - 1) if count % rows else eight %}
    let {{ registers }}{{ share }} = {{ source }}[(({{ eight }}) * {{ K // BK }}u + step) * {{ 8 * WORDS }}u + {{ at }} % {{ 8 * WORDS }}u];
{% endfor %}
{% endmacro %}
{# Eight threads store one word of each of eight rows, which share no bank. #}
{% macro keep(first, registers, rows) %}
{% for share in range(rows * WORDS // THREADS) %}
{% set at = "(thread + %du)" % (share * THREADS) %}
    tiles[{{ first }}u + ({{ at }} / {{ 8 * WORDS }}u * 8u + {{ at }} % 8u) * {{ ROW }}u + {{ at }} / 8u % {{ WORDS }}u] = {{ registers }}{{ share }};
{% endfor %}
{% endmacro %}
{# SUMS += the products of a slice of K, by a `loop` over steps of BK. #}
{% macro multiply_slice(loop) %}
  {{ loop }}
{{ load("ra", "a", BM, "m0", M) }}
{{ load("rb", "b", BN, "n0", N) }}
    workgroupBarrier();
{{ keep(0, "ra", BM) }}
{{ keep(B_AT, "rb", BN) }}
    workgroupBarrier();
{% for k in range(0, BK, CODES) %}
    {
{% for i in range(TM // MM) %}
{{ int8.left("a%d" % i, "(sm + %du) * %du + %du" % (i * MM, ROW, k // 16), ROW) }}
{% endfor %}
{% for j in range(TN // MN) %}
{{ int8.right("b%d" % j, "%du + (sn + %du) * %du + %du" % (B_AT, j * MN, ROW, k // 16), ROW) }}
{% for i in range(TM // MM) %}
{{ int8.multiply("sums%d_%d" % (i, j), "a%d" % i, "b%d" % j) }}
{% endfor %}
{% endfor %}
    }
{% endfor %}
  }
{% endmacro %}
{# A loop that the compiler can count is faster. #}
{% macro multiply_counted(length) %}
{{ multiply_slice("for (var s = 0u; s < %du; s++) { let step = from_step + s;" % (length // BK)) }}
{% endmacro %}
@compute @workgroup_size({{ THREADS }}){{ " @subgroup_size(%d)" % SUBGROUP if pinned and dialect != "emulated" }}

fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let lane = thread % {{ SUBGROUP }}u;
  let subgroup = thread / {{ SUBGROUP }}u;
  let sm = subgroup % {{ DOWN }}u * {{ TM }}u;
  let sn = subgroup / {{ DOWN }}u * {{ TN }}u;
  let m0 = group.x * {{ BM }}u;
  let n0 = group.y * {{ BN }}u;
  let z = group.z;
{{ matrix.begin() }}
{% for i in range(TM // MM) %}{% for j in range(TN // MN) %}
{{ int8.result("sums%d_%d" % (i, j)) }}
{% endfor %}{% endfor %}
{% set last = K - (slices - 1) * slice %}
{% if slices == 1 %}
{{ multiply_slice("for (var step = 0u; step < %du; step++) {" % (K // BK)) }}
{% else %}
  let from_step = z * {{ slice // BK }}u;
{% if last == slice %}
{{ multiply_counted(slice) }}
{% else %}
  if (z < {{ slices - 1 }}u) {
{{ multiply_counted(slice) }}
  } else {
{{ multiply_counted(last) }}
  }
{% endif %}
{% endif %}
{% for i in range(TM // MM) %}
  {
{% if R %}
{% for j in range(TN // MN) %}
{{ matrix.result("low%d" % j) }}
{% endfor %}
  {{ "if (z == 0u) " if slices > 1 }}{
    for (var r0 = 0u; r0 < {{ R }}u; r0 += {{ MK }}u) {
      workgroupBarrier();
      for (var at = thread; at < {{ DOWN * MM * MK // 8 }}u; at += {{ THREADS }}u) {
        let p_row = at / {{ MK // 8 }}u;
        let p_word = at % {{ MK // 8 }}u;
        let from_row = min(m0 + p_row / {{ MM }}u * {{ TM }}u + {{ i * MM }}u + p_row % {{ MM }}u, {{ M - 1 }}u);
        tiles[{{ P_AT }}u + p_row * {{ P_ROW }}u + p_word] = low_rank_p(from_row, r0 + p_word * 8u);
      }
{% set words = MK // 8 if q_contiguous else BN // 8 %}
      for (var at = thread; at < {{ BN * MK // 8 }}u; at += {{ THREADS }}u) {
        let q_row = at / {{ words }}u;
        let q_word = at % {{ words }}u;
        tiles[{{ Q_AT }}u + q_row * {{ Q_ROW }}u + q_word] = {{ "low_rank_q(min(n0 + q_row, %du), r0 + q_word * 8u)" % (N - 1) if q_contiguous else "low_rank_q(r0 + q_row, n0 + q_word * 8u)" }};
      }
      workgroupBarrier();
{{ matrix.left("p", "tiles", 8, "%du + sm / %du * %du" % (P_AT, TM, MM * P_ROW), P_ROW) }}
{% for j in range(TN // MN) %}
{% set at = "%du + (sn + %du) * %du" % (Q_AT, j * MN, Q_ROW) if q_contiguous else "%du + (sn + %du) / 8u" % (Q_AT, j * MN) %}
{{ matrix.right("q%d" % j, "tiles", 8, at, Q_ROW, q_contiguous) }}
{{ matrix.multiply("low%d" % j, "p", "q%d" % j, "tiles", "tiles") }}
{% endfor %}
    }
  }
{% endif %}
{% for first, count in groups %}
{% set LANES = count * MN // 4 %}{% set STORED = LANES + 1 %}{% set AT_ONCE = SUBGROUP // LANES %}{# of four sums each #}
{% set rows = [] %}{% for part in range(MM // AT_ONCE) %}{{ rows.append("(m0 + sm + %du + row)" % (i * MM + part * AT_ONCE)) or "" }}{% endfor %}
{% set columns = ["n0 + sn + %du + column * 4u" % (first * MN)] %}
  {
    let at_stored = subgroup * {{ MM * STORED }}u;
    let row = lane / {{ LANES }}u;
    let column = lane % {{ LANES }}u;
{% if R %}
    workgroupBarrier();
{% for j in range(count) %}
{{ int8.store("at_stored + %du" % (j * MN // 4), "low%d" % (first + j), STORED) }}
{% endfor %}
    workgroupBarrier();
{% for part in range(MM // AT_ONCE) %}
    let low_sum{{ part }} = bitcast<vec4<f32>>(tiles[at_stored + ({{ part * AT_ONCE }}u + row) * {{ STORED }}u + column]);
{% endfor %}
{% endif %}
    workgroupBarrier();
{% for j in range(count) %}
{{ int8.store("at_stored + %du" % (j * MN // 4), "sums%d_%d" % (i, first + j), STORED) }}
{% endfor %}
    workgroupBarrier();
    let by_column = b_scale[min({{ columns[0] }}, {{ N - 4 }}u) / 4u];
{% for part in range(MM // AT_ONCE) %}
    let by{{ part }} = a_scale[min({{ rows[part] }}, {{ M - 1 }}u)] * by_column;
    let sum{{ part }} = vec4<f32>(bitcast<vec4<i32>>(tiles[at_stored + ({{ part * AT_ONCE }}u + row) * {{ STORED }}u + column]));
    var acc{{ part }}_0 = {{ "fma(sum%d, by%d, low_sum%d)" % (part, part, part) if R else "sum%d * by%d" % (part, part) }};
{% endfor %}
    {{ epilogue.write(rows, columns, 4, N % BN != 0) }}
  }
{% endfor %}
  }
{% endfor %}
}
