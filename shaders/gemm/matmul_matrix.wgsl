// C [M, N] = alpha * A op(B) + lora_scale * P op(Q) + bias + residual on matrix units (= or, with an in-place residual, +=).
//
// A [M, K]; B [N, K] or [K, N], f16, or f32, bf16 or half, converted on the way in to what matrices are made of: f16 or, where
// the device has matrices of f32 alone, f32; N a multiple of {{ 16 // BYTES }}, K of BK; P [M, R], Q [N, R] or [R, N] f32, converted
// too: they are {{ R }} more steps of K. C f32 or f16. Products of f16 are exact, their sums f32: the error is the rounding of the
// operands. Of f32, {{ block }} steps of K are summed at once.
// A subgroup of {{ SUBGROUP }} makes TM x TN of the BM x BN sums of its workgroup, in matrices of {{ MM }} x {{ MN }}.
// Grid: (ceil(M / BM), ceil(N / BN), slices of K); with several slices, slice z writes to C + z * M * N.
//
// Tiles lie in workgroup memory as they lie in storage, by whole words, rows padded by 16 bytes against bank conflicts.
// Matrices are opaque: sums that are `direct` go to C as they are; where something is to be added to them, or they are
// converted, they go through A's tile, some matrices of a row at a time: `groups` of (the first, how many).
{% set E = 16 // BYTES %}{# elements of a word of 16 bytes in workgroup memory #}
{% set DOWN = BM // TM %}{% set THREADS = DOWN * (BN // TN) * SUBGROUP %}
{% set A_ROW = BK // E + 1 %}
{% set B_ROW = (BK if B.k_contiguous else BN) // E + 1 %}{% set B_ROWS = BN if B.k_contiguous else BK %}
{% set RK = [BK, (R + MK - 1) // MK * MK] | min %}{# steps of R that are staged at a time #}
{% set P_ROW = RK // E + 1 %}{% set Q_ROW = (RK if q_contiguous else BN) // E + 1 %}
{% import "lib/matrix.wgsl" as matrix with context %}
{% import "lib/epilogue.wgsl" as epilogue with context %}
{% include "lib/widen.wgsl" %}
var<workgroup> tile_a: array<vec4<u32>, {{ BM * A_ROW }}>;
var<workgroup> tile_b: array<vec4<u32>, {{ [B_ROWS * B_ROW, (BN if q_contiguous else RK) * Q_ROW] | max if R else B_ROWS * B_ROW }}>;
{{ matrix.functions({"tile_a": E, "tile_b": E}, [("tile_a", "tile_b")]) }}
{% if R %}
{% import "lib/low_rank_tiles.wgsl" as low_rank with context %}
{{ low_rank.readers() }}
{% endif %}
{# A word of workgroup memory: E elements of an operand from element `at` on, a multiple of E. #}
{% macro word(source, format, at) %}
{% if BYTES == 4 %}
{% if format == "f32" %}
bitcast<vec4<u32>>({{ source }}[({{ at }}) / 4u])
{%- else %}
{% set widen = "widen_bf16" if format == "bf16" else "unpack2x16float" %}
bitcast<vec4<u32>>(vec4<f32>({{ widen }}({{ source }}[({{ at }}) / 4u].x), {{ widen }}({{ source }}[({{ at }}) / 4u].y)))
{%- endif %}
{% elif format == "f32" %}
vec4<u32>(pack2x16float({{ source }}[({{ at }}) / 4u].xy), pack2x16float({{ source }}[({{ at }}) / 4u].zw), pack2x16float({{ source }}[({{ at }}) / 4u + 1u].xy), pack2x16float({{ source }}[({{ at }}) / 4u + 1u].zw))
{%- elif format == "bf16" %}
vec4<u32>({% for part in "xyzw" %}pack2x16float(widen_bf16({{ source }}[({{ at }}) / 8u].{{ part }})){{ ", " if not loop.last }}{% endfor %})
{%- else %}
{{ source }}[({{ at }}) / 8u]
{%- endif %}
{% endmacro %}
{# A thread's share of a tile of `rows` x `columns`, from row `row0` and column `column0`; rows past the last are the last.
   Panels of 8 rows and 32 columns are read from end to end. #}
{% macro load(registers, source, operand, rows, columns, row0, column0, count) %}
{% for share in range((rows * columns // E + THREADS - 1) // THREADS) %}
{% set at = "(thread + %du)" % (share * THREADS) %}
{% set clamped = operand.guard_majors or rows * columns // E % THREADS %}
{% if operand.panels %}
{% set panel = "%s / 8u + %s / 32u" % (row0, at) %}
{% set panel = "min(%s, %du)" % (panel, (count + 7) // 8 - 1) if clamped else panel %}
    let {{ registers }}{{ share }} = {{ source }}[((({{ panel }}) * {{ operand.stride // 32 }}u + {{ column0 }} / 32u) * 32u + {{ at }} % 32u)];
{% else %}
{% set row = "%s + %s" % (row0, matrix.row_of(at, columns // E)) %}
{% set row = "min(%s, %du)" % (row, count - 1) if clamped else row %}
    let {{ registers }}{{ share }} = {{ word(source, operand.format, "%du + (%s) * %du + %s + %s %% %du * %du" % (operand.base, row, operand.stride, column0, at, columns // E, E)) }};
{% endif %}
{% endfor %}
{% endmacro %}
{% macro keep(tile, registers, panels, rows, columns, row_words) %}
{% for share in range((rows * columns // E + THREADS - 1) // THREADS) %}
{% set at = "(thread + %du)" % (share * THREADS) %}
{% set place = "(%s / 32u * 8u + %s %% 8u) * %du + %s / 8u %% 4u" % (at, at, row_words, at) if panels else "%s * %du + %s %% %du" % (matrix.row_of(at, columns // E), row_words, at, columns // E) %}
    {{ "if (%s < %du) " % (at, rows * columns // E) if (share + 1) * THREADS > rows * columns // E }}{ {{ tile }}[{{ place }}] = {{ registers }}{{ share }}; }
{% endfor %}
{% endmacro %}
{# SUMS += the tiles' product: `steps` of k, in rows of `a_row` and `b_row` words. #}
{% macro multiply_tiles(steps, a_row, b_row, b_contiguous) %}
{% for k in range(0, steps, MK) %}
    {
{% for i in range(TM // MM) %}
{{ matrix.left("a%d" % i, "tile_a", E, "(sm + %du) * %du + %du" % (i * MM, a_row, k // E), a_row) }}
{% endfor %}
{% for j in range(TN // MN) %}
{% set at = "(sn + %du) * %du + %du" % (j * MN, b_row, k // E) if b_contiguous else "%du + (sn + %du) / %du" % (k * b_row, j * MN, E) %}
{{ matrix.right("b%d" % j, "tile_b", E, at, b_row, b_contiguous) }}
{% for i in range(TM // MM) %}
{{ matrix.multiply("sums%d_%d" % (i, j), "a%d" % i, "b%d" % j, "tile_a", "tile_b") }}
{% endfor %}
{% endfor %}
    }
{% endfor %}
{% endmacro %}
{# SUMS += the products of a slice of K, by a `loop` over k0. #}
{% macro multiply_slice(loop) %}
  {{ loop }}
{{ load("ra", "a", A, BM, BK, "m0", "k0", M) }}
{% if B.k_contiguous %}
{{ load("rb", "b", B, BN, BK, "n0", "k0", N) }}
{% else %}
{% set columns = BN // E %}
{% for share in range((BK * columns + THREADS - 1) // THREADS) %}
{% set at = "(thread + %du)" % (share * THREADS) %}
{% set column = "n0 + %s %% %du * %du" % (at, columns, E) %}
    let rb{{ share }} = {{ word("b", B.format, "%du + min(k0 + %s / %du, %du) * %du + %s" % (B.base, at, columns, K - 1, B.stride, "min(%s, %du)" % (column, N - E) if N % BN else column)) }};
{% endfor %}
{% endif %}
    workgroupBarrier();
{{ keep("tile_a", "ra", A.panels, BM, BK, A_ROW) }}
{{ keep("tile_b", "rb", B.panels, B_ROWS, BK if B.k_contiguous else BN, B_ROW) }}
    workgroupBarrier();
{{ multiply_tiles(BK, A_ROW, B_ROW, B.k_contiguous) }}
  }
{% endmacro %}
{# A loop that the compiler can count is a fifth faster. #}
{% macro multiply_counted(length) %}
{{ multiply_slice("for (var step = 0u; step < %du; step++) { let k0 = from_k + step * %du;" % (length // BK, BK)) }}
{% endmacro %}
{# SUMS += the adapter's product, with the first slice of K. #}
{% macro multiply_low_rank(once) %}
{% if R %}
  {{ once }}{
    for (var r0 = 0u; r0 < {{ R }}u; r0 += {{ RK }}u) {
{{ low_rank.stage() }}
{{ multiply_tiles(RK, P_ROW, Q_ROW, q_contiguous) }}
    }
  }
{% endif %}
{% endmacro %}
{# The sums to C, by way of A's tile, with what is added to them. #}
{% macro put_away() %}
{% for i in range(TM // MM) %}
{% for first_matrix, count in groups %}
{% set STORED = count * MN // 4 + 1 %}{% set LANES = count * MN // 4 %}{% set AT_ONCE = SUBGROUP // LANES %}{# of four sums each #}
{% set rows = [] %}{% for part in range(MM // AT_ONCE) %}{{ rows.append("(m0 + sm + %du + row)" % (i * MM + part * AT_ONCE)) or "" }}{% endfor %}
{% set columns = ["n0 + sn + %du + column" % (first_matrix * MN)] %}
  {
  let at_stored = subgroup * {{ MM * STORED }}u;
  let row = lane / {{ LANES }}u;
  let column = lane % {{ LANES }}u * 4u;
  workgroupBarrier();
{% for j in range(count) %}
{{ matrix.store_words("tile_a", "at_stored + %du" % (j * MN // 4), "sums%d_%d" % (i, first_matrix + j), STORED) }}
{% endfor %}
  workgroupBarrier();
{% for part in range(MM // AT_ONCE) %}
    var acc{{ part }}_0 = bitcast<vec4<f32>>(tile_a[at_stored + ({{ part * AT_ONCE }}u + row) * {{ STORED }}u + column / 4u]);
{% endfor %}
    {{ epilogue.scale(rows, columns) }}
    {{ epilogue.write(rows, columns, 4, N % BN != 0) }}
  }
{% endfor %}
{% endfor %}
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
{% if direct %}
  let at_c = {{ c_base }}u + ({{ "z * %du + " % M if slices > 1 }}m0 + sm) * {{ ldc }}u + n0 + sn;
{% endif %}
{% for i in range(TM // MM) %}{% for j in range(TN // MN) %}
{{ matrix.result("sums%d_%d" % (i, j)) }}
{% endfor %}{% endfor %}
{% if blocks > 1 %}
  let from_slice = z * {{ slice }}u;
  let to_slice = min(from_slice + {{ slice }}u, {{ K }}u);
{% call(from, to) epilogue.each_block("from_slice", "to_slice") %}
{% for i in range(TM // MM) %}{% for j in range(TN // MN) %}
{{ matrix.clear("sums%d_%d" % (i, j)) }}
{% endfor %}{% endfor %}
{{ multiply_slice("for (var k0 = %s; k0 < %s; k0 += %du) {" % (from, to, BK)) }}
{{ multiply_low_rank(epilogue.once()) }}
{{ put_away() }}
{% endcall %}
{% else %}
{% set last = K - (slices - 1) * slice %}
{% if slices == 1 %}
{{ multiply_slice("for (var k0 = 0u; k0 < %du; k0 += %du) {" % (K, BK)) }}
{% else %}
  let from_k = z * {{ slice }}u;
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
{{ multiply_low_rank("if (z == 0u) " if slices > 1 else "") }}
{% if direct %}
{% for i in range(TM // MM) %}{% for j in range(TN // MN) %}
{{ matrix.store("c", "at_c + %du" % (i * MM * ldc + j * MN), "sums%d_%d" % (i, j), ldc) }}
{% endfor %}{% endfor %}
{% else %}
{{ put_away() }}
{% endif %}
{% endif %}
}
