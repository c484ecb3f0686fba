// C [M, N] = alpha * A op(B) + beta * P op(Q) + bias + residual on matrix units (= or, with an in-place residual, +=).
//
// A [M, K] f16; B [N, K] or [K, N], f16 or converted to it on the way in from f32, bf16 or half; N a multiple of 64, K of BK;
// P [M, R], Q [N, R] or [R, N] f32; C f32 or f16. Products are exact, their sums f32: the error is the rounding of A and B.
// A subgroup of {{ SUBGROUP }} makes TM x TN of the BM x BN sums of its workgroup, in matrices of {{ MM }} x {{ MN }}.
// Grid: (ceil(M / BM), ceil(N / BN), slices of K); with several slices, slice z writes to C + z * M * N.
//
// Tiles lie in workgroup memory as they lie in storage, by whole words, rows padded by 16 bytes against bank conflicts.
// Matrices are opaque: what is to be added to sums, or converted, goes through workgroup memory, a row of matrices at a time.
{% set DOWN = BM // TM %}{% set THREADS = DOWN * (BN // TN) * SUBGROUP %}
{% set A_ROW = BK // 8 + 1 %}
{% set B_ROW = (BK if B.k_contiguous else BN) // 8 + 1 %}{% set B_ROWS = BN if B.k_contiguous else BK %}
{% set STORED = TN + 4 %}{% set LANES = TN // 4 %}{% set AT_ONCE = SUBGROUP // LANES %}
{% import "lib/matrix.wgsl" as matrix with context %}
{% import "lib/epilogue.wgsl" as epilogue with context %}
{% include "lib/widen.wgsl" %}
var<workgroup> tile_a: array<vec4<u32>, {{ BM * A_ROW }}>;
var<workgroup> tile_b: array<vec4<u32>, {{ B_ROWS * B_ROW }}>;
{% if not direct %}
var<workgroup> stored: array<f32, {{ DOWN * (BN // TN) * MM * STORED }}>;
{% endif %}
{{ matrix.functions() }}
{# Eight elements of an operand as f16, from element `at` on, a multiple of eight. #}
{% macro eight(source, format, at) %}
{% if format == "f32" %}
vec4<u32>(pack2x16float({{ source }}[({{ at }}) / 4u].xy), pack2x16float({{ source }}[({{ at }}) / 4u].zw), pack2x16float({{ source }}[({{ at }}) / 4u + 1u].xy), pack2x16float({{ source }}[({{ at }}) / 4u + 1u].zw))
{%- elif format == "bf16" %}
vec4<u32>({% for word in "xyzw" %}pack2x16float(widen_bf16({{ source }}[({{ at }}) / 8u].{{ word }})){{ ", " if not loop.last }}{% endfor %})
{%- else %}
{{ source }}[({{ at }}) / 8u]
{%- endif %}
{% endmacro %}
{# A thread's share of a tile of `rows` x `columns`, from row `row0` and column `column0`; rows past the last are the last. #}
{% macro load(registers, source, operand, rows, columns, row0, column0, count) %}
{% for share in range((rows * columns // 8 + THREADS - 1) // THREADS) %}
{% set at = "(thread + %du)" % (share * THREADS) %}
{% set row = "%s + %s / %du" % (row0, at, columns // 8) %}
{% set row = "min(%s, %du)" % (row, count - 1) if operand.guard_majors or rows * columns // 8 % THREADS else row %}
    let {{ registers }}{{ share }} = {{ eight(source, operand.format, "%du + (%s) * %du + %s + %s %% %du * 8u" % (operand.base, row, operand.stride, column0, at, columns // 8)) }};
{% endfor %}
{% endmacro %}
{% macro keep(tile, registers, rows, columns, row_words) %}
{% for share in range((rows * columns // 8 + THREADS - 1) // THREADS) %}
{% set at = "(thread + %du)" % (share * THREADS) %}
    {{ "if (%s < %du) " % (at, rows * columns // 8) if (share + 1) * THREADS > rows * columns // 8 }}{ {{ tile }}[{{ at }} / {{ columns // 8 }}u * {{ row_words }}u + {{ at }} % {{ columns // 8 }}u] = {{ registers }}{{ share }}; }
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
{% for i in range(TM // MM) %}{% for j in range(TN // MN) %}
{{ matrix.result("sums%d_%d" % (i, j)) }}
{% endfor %}{% endfor %}
  let z = group.z;
{% if slices == 1 and dialect != "emulated" %}
  const from_k = 0u;
  const to_k = {{ K }}u;
{% else %}
  let from_k = z * {{ slice }}u;
  let to_k = min(from_k + {{ slice }}u, {{ K }}u);
{% endif %}
  for (var k0 = from_k; k0 < to_k; k0 += {{ BK }}u) {
{{ load("ra", "a", A, BM, BK, "m0", "k0", M) }}
{% if B.k_contiguous %}
{{ load("rb", "b", B, BN, BK, "n0", "k0", N) }}
{% else %}
{% set columns = BN // 8 %}
{% for share in range((BK * columns + THREADS - 1) // THREADS) %}
{% set at = "(thread + %du)" % (share * THREADS) %}
{% set column = "n0 + %s %% %du * 8u" % (at, columns) %}
    let rb{{ share }} = {{ eight("b", B.format, "%du + min(k0 + %s / %du, %du) * %du + %s" % (B.base, at, columns, K - 1, B.stride, "min(%s, %du)" % (column, N - 8) if N % BN else column)) }};
{% endfor %}
{% endif %}
    workgroupBarrier();
{{ keep("tile_a", "ra", BM, BK, A_ROW) }}
{{ keep("tile_b", "rb", B_ROWS, BK if B.k_contiguous else BN, B_ROW) }}
    workgroupBarrier();
{% for k in range(0, BK, MK) %}
    {
{% for i in range(TM // MM) %}
{{ matrix.left("a%d" % i, "(sm + %du) * %du + %du" % (i * MM, A_ROW, k // 8), A_ROW) }}
{% endfor %}
{% for j in range(TN // MN) %}
{% if B.k_contiguous %}
{{ matrix.right("b%d" % j, "(sn + %du) * %du + %du" % (j * MN, B_ROW, k // 8), B_ROW, true) }}
{% else %}
{{ matrix.right("b%d" % j, "%du + (sn + %du) / 8u" % (k * B_ROW, j * MN), B_ROW, false) }}
{% endif %}
{% for i in range(TM // MM) %}
{{ matrix.multiply("sums%d_%d" % (i, j), "a%d" % i, "b%d" % j) }}
{% endfor %}
{% endfor %}
    }
{% endfor %}
  }
{% if direct %}
  let at_c = {{ c_base }}u + ({{ "z * %du + " % M if slices > 1 }}m0 + sm) * {{ ldc }}u + n0 + sn;
{% for i in range(TM // MM) %}{% for j in range(TN // MN) %}
{{ matrix.store("c", "at_c + %du" % (i * MM * ldc + j * MN), "sums%d_%d" % (i, j), ldc) }}
{% endfor %}{% endfor %}
{% else %}
  let at_stored = subgroup * {{ MM * STORED }}u;
  let row = lane / {{ LANES }}u;
  let column = lane % {{ LANES }}u * 4u;
{% for i in range(TM // MM) %}
{% set rows = [] %}{% for part in range(MM // AT_ONCE) %}{{ rows.append("(m0 + sm + %du + row)" % (i * MM + part * AT_ONCE)) or "" }}{% endfor %}
{% set columns = ["n0 + sn + column"] %}
  workgroupBarrier();
{% for j in range(TN // MN) %}
{{ matrix.store("stored", "at_stored + %du" % (j * MN), "sums%d_%d" % (i, j), STORED) }}
{% endfor %}
  workgroupBarrier();
  {
{% for part in range(MM // AT_ONCE) %}
    let from{{ part }} = at_stored + ({{ part * AT_ONCE }}u + row) * {{ STORED }}u + column;
    var acc{{ part }}_0 = vec4<f32>(stored[from{{ part }}], stored[from{{ part }} + 1u], stored[from{{ part }} + 2u], stored[from{{ part }} + 3u]);
{% endfor %}
    {{ epilogue.scale(rows, columns) }}
{% if R %}
    {{ epilogue.add_low_rank(rows, columns, 4) }}
{% endif %}
    {{ epilogue.write(rows, columns, 4, N % BN != 0) }}
  }
{% endfor %}
{% endif %}
}
