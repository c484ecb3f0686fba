// x [M, K] f32 as operand of a low-precision matmul that contracts over K, a multiple of 64 (=).
{% if arithmetic == "f16" %}
// out [M, K] f16, each value rounded; what passes 65,504 becomes infinite{{ "; in panels of 8 rows and 32 columns, which hold eight columns of every row side by side" if PANELS }}. One invocation four consecutive values.
{% else %}
// out [M, K] int8, four to a u32, and scales [K / 64, M] f32: blocks of 64 along K, scale = absmax / 127,
// code = round(x / scale). A value from 2^117 on makes its block's scale NaN, so that an overflow is not lost.
// One invocation sixteen consecutive values, four to a block.
{% endif %}
{% if GROUPS %}
// And what an adapter wants of the same rows: down [M, R] = x op(by), by workgroups of their own, which come first (=).
// Grid: ceil(M / 4), then one invocation each, 256 a workgroup; folded.
{% else %}
// Grid: one invocation each, 256 a workgroup, folded.
{% endif %}
{% include "lib/grid.wgsl" %}
{% if GROUPS %}
{% from "lib/low_rank.wgsl" import parts_added, rows_product with context %}
{{ parts_added() }}
{% endif %}
{% if arithmetic == "int8" %}
{% include "lib/int8.wgsl" %}
{# Together they would pass the 16 KiB that every device has. #}
{% if not GROUPS %}
var<workgroup> largest: array<f32, 256>;
{% endif %}
{% endif %}
{% macro largest(i) %}{{ "parts[%s].x" % i if GROUPS else "largest[%s]" % i }}{% endmacro %}

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
{% if GROUPS %}
  let workgroup = linear_workgroup(group, groups);
  if (workgroup < {{ (M + 3) // 4 }}u) {
  {{ rows_product("x", "by", "down") }}
    return;
  }
  let i = (workgroup - {{ (M + 3) // 4 }}u) * 256u + thread;
{% else %}
  let i = linear_workgroup(group, groups) * 256u + thread;
{% endif %}
{% if arithmetic == "f16" %}
{% if PANELS %}
  let row = min(i / {{ 2 * K }}u * 8u + i / 2u % 8u, {{ M - 1 }}u);
  let at = row * {{ K // 4 }}u + i / 64u % {{ K // 32 }}u * 8u + i / 16u % 4u * 2u + i % 2u;
  if (i < {{ (M + 7) // 8 * 2 * K }}u) { out[i] = vec4<f16>(x[at]); }
{% else %}
  if (i < {{ M * K // 4 }}u) { out[i] = vec4<f16>(x[i]); }
{% endif %}
{% else %}
  let at = min(i, {{ M * K // 16 - 1 }}u);
{% for j in range(4) %}
  let value{{ j }} = x[at * 4u + {{ j }}u];
{% endfor %}
  let size = max(max(abs(value0), abs(value1)), max(abs(value2), abs(value3)));
  {{ largest("thread") }} = max(max(size.x, size.y), max(size.z, size.w));
{% for j in range(4) %}
  let broken{{ j }} = (bitcast<vec4<u32>>(value{{ j }}) & vec4<u32>(0x7f800000u)) == vec4<u32>(0x7f800000u);
{% endfor %}
  if (any(broken0) || any(broken1) || any(broken2) || any(broken3)) {
    {{ largest("thread") }} = bitcast<f32>(0x7f800000u + min(thread, 0u));
  }
  workgroupBarrier();
  let four = thread & 252u;
  let absmax = max(max({{ largest("four") }}, {{ largest("four + 1u") }}), max({{ largest("four + 2u") }}, {{ largest("four + 3u") }}));
  let inverse = inverse_of(absmax);
  if (i == at) {
    out[i] = vec4<u32>({% for j in range(4) %}pack4xI8(vec4<i32>(round(value{{ j }} * inverse))){{ ", " if j < 3 }}{% endfor %});
    if ((thread & 3u) == 0u) {
      let block = i >> 2u;
      let scale = select(absmax * {{ over_127 }}, bitcast<f32>(0x7fc00000u + min(thread, 0u)), bitcast<u32>(absmax) >= 0x7a000000u);
      scales[(block % {{ K // 64 }}u) * {{ M }}u + block / {{ K // 64 }}u] = scale;
    }
  }
{% endif %}
}
