// Rows [M, K] as int8 with one scale each, after a rotation of every 64 values along K (lib/rotate.wgsl): operand of a matmul
// that contracts over K, a multiple of 64 (=).
// out [M, K] int8 in the order of ops/gemm/rotated.py, scales [M] f32: scale = absmax / 127, code = round(value / scale), of rotated values.
// Rows are x [M, K] f32. A value that is not finite, or an absmax from 2^117 on, makes the scale NaN, so that an overflow
// is not lost.
{% if GROUPS %}
// And what an adapter wants of the same rows: down [M, R] = x op(by), by workgroups of their own, which come first (=).
{% endif %}
// A workgroup takes {{ ROWS }} rows, {{ SHARE }} invocations each. An invocation reads four values of every sixteen of a block and writes
// sixteen side by side: between, four neighbours exchange what they hold.
// Grid: {{ "ceil(M / 4), then " if GROUPS }}ceil(M / ROWS), folded.
{% include "lib/grid.wgsl" %}
{% include "lib/int8.wgsl" %}
{% import "lib/rotate.wgsl" as rotate with context %}
{{ rotate.functions() }}
{% if GROUPS %}
{% from "lib/low_rank.wgsl" import parts_added, rows_product with context %}
{{ parts_added() }}
{% else %}
var<workgroup> parts: array<vec4<f32>, 1024>;
{% endif %}
{% set LANES = [SHARE, 16] | min %}{# of a row that look for its largest value #}

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
{% if GROUPS %}
  let linear = linear_workgroup(group, groups);
  if (linear < {{ (M + 3) // 4 }}u) {
    let workgroup = linear;
  {{ rows_product("x", "by", "down") }}
    return;
  }
  let workgroup = linear - {{ (M + 3) // 4 }}u;
{% else %}
  let workgroup = linear_workgroup(group, groups);
{% endif %}
  let share = thread / {{ SHARE }}u;
  let place = thread % {{ SHARE }}u;
  let quarter = thread & 3u;
  let row = workgroup * {{ ROWS }}u + share;
  let inside = share < {{ ROWS }}u && row < {{ M }}u;
  let row_in = min(row, {{ M - 1 }}u);
  var size = vec4<f32>();
  var broken = vec4<bool>();
{% for c in range(CHUNKS) %}
  let block{{ c }} = min(place / 4u + {{ c * SHARE // 4 }}u, {{ K // 64 - 1 }}u);
{% for j in range(4) %}
  var value{{ c }}_{{ j }} = x[row_in * {{ K // 4 }}u + block{{ c }} * 16u + {{ 4 * j }}u + quarter];
{% endfor %}
{% endfor %}
{% for c in range(CHUNKS) %}
{% for j in range(4) %}
  broken = broken | ((bitcast<vec4<u32>>(value{{ c }}_{{ j }}) & vec4<u32>(0x7f800000u)) == vec4<u32>(0x7f800000u));
  value{{ c }}_{{ j }} = rotated_four(value{{ c }}_{{ j }});
{% endfor %}
  {{ rotate.rotate_across("value%d_0" % c, "value%d_1" % c, "value%d_2" % c, "value%d_3" % c) }}
{% if c %}
  workgroupBarrier();
{% endif %}
  // Turned by j, so that neighbours use different banks.
{% for j in range(4) %}
  parts[{{ 256 * j }}u + (thread ^ {{ j }}u)] = value{{ c }}_{{ j }};
{% endfor %}
  workgroupBarrier();
{% for j in range(4) %}
  value{{ c }}_{{ j }} = parts[256u * quarter + (((thread & 252u) | {{ j }}u) ^ quarter)];
{% endfor %}
  {{ rotate.rotate_across("value%d_0" % c, "value%d_1" % c, "value%d_2" % c, "value%d_3" % c) }}
{% for j in range(4) %}
  size = max(size, abs(value{{ c }}_{{ j }}));
{% endfor %}
{% endfor %}
  workgroupBarrier();
  var largest = max(max(size.x, size.y), max(size.z, size.w));
  if (any(broken)) { largest = bitcast<f32>(0x7f800000u + min(thread, 0u)); }
  parts[thread].x = largest;
  workgroupBarrier();
  if (share < {{ ROWS }}u && place < {{ LANES }}u) {
    for (var i = place + {{ LANES }}u; i < {{ SHARE }}u; i += {{ LANES }}u) { largest = max(largest, parts[share * {{ SHARE }}u + i].x); }
    parts[256u + share * {{ LANES }}u + place].x = largest;
  }
  workgroupBarrier();
  if (inside) {
    var absmax = 0.0;
{% for i in range(LANES) %}
    absmax = max(absmax, parts[256u + share * {{ LANES }}u + {{ i }}u].x);
{% endfor %}
    let inverse = inverse_of(absmax);
{% for c in range(CHUNKS) %}
    {{ "if (place / 4u + %du < %du) " % (c * SHARE // 4, K // 64) if CHUNKS * SHARE > K // 16 else "" }}{
      out[((row >> 3u) * {{ K // 64 }}u + block{{ c }}) * 32u + quarter * 8u + (row & 7u)] = vec4<u32>({% for j in range(4) %}codes_of(value{{ c }}_{{ j }}, inverse){{ ", " if j < 3 }}{% endfor %});
    }
{% endfor %}
    if (place == 0u) {
      scales[row] = select(absmax * {{ scaled }}, bitcast<f32>(0x7fc00000u + min(thread, 0u)), bitcast<u32>(absmax) >= 0x7a000000u);
    }
  }
}
