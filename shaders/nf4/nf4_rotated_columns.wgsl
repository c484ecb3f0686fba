// An NF4 weight [N, K] transposed, both multiples of 64, as int8 with one scale for each of its K columns, after a rotation of
// every 64 values along N (lib/rotate.wgsl): operand of a matmul that contracts over N (=). Three launches:
{% if stage == "maxima" %}
// this first one leaves the largest rotated value of each 64 in maxima [N / 64, K]. Grid: (K / 64, N / 64).
{% elif stage == "scales" %}
// this second one has the largest of maxima [N / 64, K] in its first row, and makes scales [K] of them. Grid: K / 64.
{% else %}
// this third one writes out [K, N] int8, in the order of ops/gemm/rotated.py, by the absmax in the first row of maxima. Grid: (K / 64, N / 64).
{% endif %}
{% if stage == "scales" %}
var<workgroup> largest: array<f32, 256>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let column = group.x * 64u + thread % 64u;
  var absmax = 0.0;
  for (var row = thread / 64u; row < {{ N // 64 }}u; row += 4u) { absmax = max(absmax, maxima[row * {{ K }}u + column]); }
  largest[thread] = absmax;
  workgroupBarrier();
  if (thread < 64u) {
    absmax = max(max(absmax, largest[thread + 64u]), max(largest[thread + 128u], largest[thread + 192u]));
    maxima[column] = absmax;
    scales[column] = absmax * {{ scaled }};
  }
}
{% else %}
// A workgroup takes 64 rows and 64 columns, an invocation a column. A row is one block: its sixteen values are made once, to
// be looked up. Of two codes in a byte, the first is in the high nibble.
{% include "lib/nf4.wgsl" %}
{% include "lib/int8.wgsl" %}
{% import "lib/rotate.wgsl" as rotate with context %}
{{ rotate.functions() }}
{# Words of a row's codes, and its values: one more each, against bank conflicts. #}
{% set CODES = 9 %}{% set VALUES = 17 %}
var<workgroup> tile: array<u32, {{ 64 * CODES }}>;
var<workgroup> values: array<f32, {{ 64 * VALUES }}>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let block = (group.y * 64u + thread) * {{ K // 64 }}u + group.x;
  let scale = scale_of(block);
{% for half in range(2) %}
  let words{{ half }} = codes[block * 2u + {{ half }}u];
{% for i in range(4) %}
  tile[thread * {{ CODES }}u + {{ half * 4 + i }}u] = words{{ half }}[{{ i }}];
{% endfor %}
{% endfor %}
{% for i in range(16) %}
  values[thread * {{ VALUES }}u + {{ i }}u] = rounded({{ codebook[i] }} * scale);
{% endfor %}
  workgroupBarrier();
  let word = thread / 8u;
  let shift = thread % 8u / 2u * 8u + 4u - thread % 2u * 4u;
{% for v in range(16) %}
  var value{{ v }} = rotated_four(vec4<f32>({% for i in range(4) %}values[{{ (4 * v + i) * VALUES }}u + ((tile[{{ (4 * v + i) * CODES }}u + word] >> shift) & 15u)]{{ ", " if i < 3 }}{% endfor %}));
{% endfor %}
{% for v in range(4) %}
  {{ rotate.rotate_across("value%d" % v, "value%d" % (v + 4), "value%d" % (v + 8), "value%d" % (v + 12)) }}
{% endfor %}
{% for v in range(0, 16, 4) %}
  {{ rotate.rotate_across("value%d" % v, "value%d" % (v + 1), "value%d" % (v + 2), "value%d" % (v + 3)) }}
{% endfor %}
  let column = group.x * 64u + thread;
{% if stage == "maxima" %}
  var size = abs(value0);
{% for v in range(1, 16) %}
  size = max(size, abs(value{{ v }}));
{% endfor %}
  maxima[group.y * {{ K }}u + column] = max(max(size.x, size.y), max(size.z, size.w));
{% else %}
  let inverse = inverse_of(maxima[column]);
  let to = ((column >> 3u) * {{ N // 64 }}u + group.y) * 32u + (column & 7u);
{% for part in range(4) %}
  out[to + {{ 8 * part }}u] = vec4<u32>({% for v in range(4 * part, 4 * part + 4) %}pack4xI8(vec4<i32>(round(value{{ v }} * inverse))){{ ", " if v % 4 < 3 }}{% endfor %});
{% endfor %}
{% endif %}
}
{% endif %}
