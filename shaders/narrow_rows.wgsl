// x [M, K] f32 as operand of a low-precision product that contracts over K, a multiple of 64 (=).
{% if arithmetic == "f16" %}
// out [M, K] f16, each value rounded; what passes 65,504 becomes infinite.
{% else %}
// out [M, K] int8, four to a u32, and scales [K / 64, M] f32: blocks of 64 along K, scale = absmax / 127,
// code = round(x / scale). A value that is not finite makes its block's scale NaN, so that it is not lost.
{% endif %}
// One invocation four consecutive values, sixteen to a block. Grid: ceil(M * K / 1024), folded.
{% include "_grid.wgsl" %}
{% if arithmetic == "int8" %}
var<workgroup> largest: array<f32, 256>;
{% endif %}

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let i = linear_workgroup(group, groups) * 256u + thread;
{% if arithmetic == "f16" %}
  if (i < {{ M * K // 4 }}u) { out[i] = vec4<f16>(x[i]); }
{% else %}
  let inside = i < {{ M * K // 4 }}u;
  let value = x[min(i, {{ M * K // 4 - 1 }}u)];
  let size = abs(value);
  largest[thread] = max(max(size.x, size.y), max(size.z, size.w));
  let finite = all((bitcast<vec4<u32>>(value) & vec4<u32>(0x7f800000u)) != vec4<u32>(0x7f800000u));
  if (!finite) { largest[thread] = bitcast<f32>(0x7f800000u + min(thread, 0u)); }
  workgroupBarrier();
  var absmax = 0.0;
  for (var j = 0u; j < 16u; j++) { absmax = max(absmax, largest[(thread & 240u) + j]); }
  let inverse = select(0.0, 127.0 / absmax, absmax > 0.0);
  if (inside) {
    out[i] = pack4xI8(vec4<i32>(round(value * inverse)));
    if ((thread & 15u) == 0u) {
      let block = i >> 4u;
      let broken = (bitcast<u32>(absmax) & 0x7f800000u) == 0x7f800000u;
      let scale = select(absmax * {{ over_127 }}, bitcast<f32>(0x7fc00000u + min(thread, 0u)), broken);
      scales[(block % {{ K // 64 }}u) * {{ M }}u + block / {{ K // 64 }}u] = scale;
    }
  }
{% endif %}
}
