// An NF4 weight [N, K], both multiples of 64, as rows that matrix units multiply, in the order in which a workgroup takes them:
// operand of a matmul (=). Rows are {{ "K, of N values: the weight transposed" if transposed else "N, of K values" }}.
{% if stage == "halves" %}
// out [{{ ROWS }}, {{ LENGTH }}] f16, in panels of 8 rows and 32 columns, which hold eight columns of every row side by side.
{% else %}
// In int8 with one scale for each row, after a rotation of every 64 values along it (lib/rotate.wgsl). Three launches:
{% endif %}
{% if stage == "maxima" %}
// this first one leaves the largest rotated value of each 64 in maxima [{{ LENGTH // 64 }}, {{ ROWS }}].
{% elif stage == "largest" %}
// this second one leaves the largest of each row in largest [{{ ROWS }}]. Grid: ROWS / 64.
{% elif stage == "codes" %}
// this last one writes out [{{ ROWS }}, {{ LENGTH }}] int8, in the order of ops/gemm/rotated.py, and scales [{{ ROWS }}], by largest [{{ ROWS }}].
{% endif %}
{% if stage == "largest" %}
var<workgroup> parts: array<f32, 256>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let row = group.x * 64u + thread % 64u;
  var absmax = 0.0;
  for (var block = thread / 64u; block < {{ LENGTH // 64 }}u; block += 4u) { absmax = max(absmax, maxima[block * {{ ROWS }}u + row]); }
  parts[thread] = absmax;
  workgroupBarrier();
  if (thread < 64u) {
    largest[row] = max(max(absmax, parts[thread + 64u]), max(parts[thread + 128u], parts[thread + 192u]));
  }
}
{% else %}
// Of two codes in a byte, the first is in the high nibble. An invocation holds 64 values of a row, so that nothing is exchanged.
{% include "lib/nf4.wgsl" %}
{% if stage != "halves" %}
{% include "lib/int8.wgsl" %}
{% import "lib/rotate.wgsl" as rotate with context %}
{{ rotate.functions() }}
{% endif %}
{% if transposed %}
// A workgroup takes 64 rows and 64 columns of the weight, an invocation a column. A row is one block of NF4: its sixteen values
// are made once, to be looked up. Grid: (K / 64, N / 64).
{# Words of a row's codes, and its values: one more each, against bank conflicts. #}
{% set CODES = 9 %}{% set VALUES = 17 %}
var<workgroup> tile: array<u32, {{ 64 * CODES }}>;
var<workgroup> values: array<f32, {{ 64 * VALUES }}>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let source = (group.y * 64u + thread) * {{ K // 64 }}u + group.x;
  let scale = scale_of(source);
{% for half in range(2) %}
  let words{{ half }} = codes[source * 2u + {{ half }}u];
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
  var value{{ v }} = vec4<f32>({% for i in range(4) %}values[{{ (4 * v + i) * VALUES }}u + ((tile[{{ (4 * v + i) * CODES }}u + word] >> shift) & 15u)]{{ ", " if i < 3 }}{% endfor %});
{% endfor %}
  let row = group.x * 64u + thread;
  let block = group.y;
  let inside = true;
{% else %}
// An invocation takes a block of NF4, eight neighbours one of eight rows, so that they write side by side.
// Grid: one invocation each, 128 a workgroup, folded.
{% include "lib/grid.wgsl" %}
@compute @workgroup_size(128)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let i = linear_workgroup(group, groups) * 128u + thread;
  let place = min(i, {{ N * K // 64 - 1 }}u);
  let inside = i == place;
  let block = place / 8u % {{ K // 64 }}u;
  let row = place / {{ K // 8 }}u * 8u + place % 8u;
  let source = row * {{ K // 64 }}u + block;
  let words0 = codes[source * 2u];
  let words1 = codes[source * 2u + 1u];
  let scale = scale_of(source);
  fill_codebook(thread);
{% for v in range(16) %}
  var value{{ v }} = vec4<f32>({% for i in range(4) %}{% set bit = v % 2 * 16 + i // 2 * 8 + 4 - i % 2 * 4 %}rounded(codebook[(words{{ v // 8 }}[{{ v // 2 % 4 }}] >> {{ bit }}u) & 15u] * scale){{ ", " if i < 3 }}{% endfor %});
{% endfor %}
{% endif %}
{% if stage == "halves" %}
  let to = ((row >> 3u) * {{ LENGTH // 64 }}u + block) * 128u + (row & 7u) * 2u;
  if (inside) {
{% for v in range(16) %}
    out[to + {{ v // 2 * 16 + v % 2 }}u] = vec4<f16>(value{{ v }});
{% endfor %}
  }
{% else %}
{% for v in range(16) %}
  value{{ v }} = rotated_four(value{{ v }});
{% endfor %}
{% for v in range(4) %}
  {{ rotate.rotate_across("value%d" % v, "value%d" % (v + 4), "value%d" % (v + 8), "value%d" % (v + 12)) }}
{% endfor %}
{% for v in range(0, 16, 4) %}
  {{ rotate.rotate_across("value%d" % v, "value%d" % (v + 1), "value%d" % (v + 2), "value%d" % (v + 3)) }}
{% endfor %}
{% if stage == "maxima" %}
  var size = abs(value0);
{% for v in range(1, 16) %}
  size = max(size, abs(value{{ v }}));
{% endfor %}
  if (inside) { maxima[block * {{ ROWS }}u + row] = max(max(size.x, size.y), max(size.z, size.w)); }
{% else %}
  let absmax = largest[row];
  let inverse = inverse_of(absmax);
  let to = ((row >> 3u) * {{ LENGTH // 64 }}u + block) * 32u + (row & 7u);
  if (inside) {
{% for part in range(4) %}
    out[to + {{ 8 * part }}u] = vec4<u32>({% for v in range(4 * part, 4 * part + 4) %}codes_of(value{{ v }}, inverse){{ ", " if v % 4 < 3 }}{% endfor %});
{% endfor %}
    if (block == 0u) { scales[row] = absmax * {{ scaled }}; }
  }
{% endif %}
{% endif %}
}
{% endif %}
