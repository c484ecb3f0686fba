// Matmuls with LoRA's factors, one of whose sides is a rank of a few quads of columns. One launch each: a workgroup of 256
// splits the long sum among its invocations, in f32, and adds the parts up in workgroup memory, in a fixed tree order.
{% if mode == "rows" %}
// c [M, R] = alpha * a [M, K] op(b), with b [R, K] if it is transposed, else [K, R]; `=`.
// Grid: ceil(M / 4), folded.
{% else %}
// c = alpha * wide^T thin, [N, R] or, with `rank_first`, [R, N]; wide [T, N], thin [T, R]; `=` or `+=`.
// A workgroup makes {{ 4 * COLUMNS }} of the N for {{ 4 * QUADS }} of the R; groups of invocations make four of each
// and share T{{ ", %d rows of it: slice z writes its partial sums to c + z * N * R" % slice if SLICE_WORKGROUPS }}.
// Grid: ceil(N / {{ 4 * COLUMNS }}) * (R / {{ 4 * QUADS }}){{ " for each slice" if SLICE_WORKGROUPS }}, folded.
{% endif %}
{% include "lib/grid.wgsl" %}
{% from "lib/low_rank.wgsl" import PARTS, parts_added, rows_product with context %}
{{ parts_added() }}

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
{% if mode != "rows" and SLICE_WORKGROUPS %}
  let index = linear_workgroup(group, groups);
  let z = index / {{ SLICE_WORKGROUPS }}u;
  let workgroup = index % {{ SLICE_WORKGROUPS }}u;
  if (z * {{ slice }}u >= {{ T }}u) { return; }
{% else %}
  let workgroup = linear_workgroup(group, groups);
{% endif %}
{% if mode == "rows" %}
  {{ rows_product("a", "b", "c") }}
{% else %}
{% for j in range(4) %}
  var acc{{ j }} = vec4<f32>();
{% endfor %}
  let part = thread / {{ GROUPS }}u;
  let first = workgroup / {{ R // (4 * QUADS) }}u * {{ COLUMNS }}u;
  let quads = workgroup % {{ R // (4 * QUADS) }}u * {{ QUADS }}u;
  let column = first + thread % {{ COLUMNS }}u;
  let quad = quads + thread % {{ GROUPS }}u / {{ COLUMNS }}u;
  if (column < {{ N // 4 }}u) {
{% if SLICE_WORKGROUPS %}
    var t = z * {{ slice }}u + part;
    let end = min(z * {{ slice }}u + {{ slice }}u, {{ T }}u);
{% else %}
    var t = part;
    let end = {{ T }}u;
{% endif %}
{% for ahead in (AHEAD, 1) %}
    for (; t + {{ (ahead - 1) * PARTS }}u < end; t += {{ ahead * PARTS }}u) {
{% for u in range(ahead) %}
      let x{{ u }} = wide[(t + {{ u * PARTS }}u) * {{ N // 4 }}u + column];
      let p{{ u }} = thin[(t + {{ u * PARTS }}u) * {{ R // 4 }}u + quad];
{% endfor %}
{% for u in range(ahead) %}{% for j in range(4) %}
      acc{{ j }} += p{{ u }}.{{ "xyzw"[j] }} * x{{ u }};
{% endfor %}{% endfor %}
    }
{% endfor %}
  }
  let sum = f32({{ alpha }}) * add_parts(acc0, acc1, acc2, acc3, thread, thread);
  let g = thread % 64u;
  let n = first + g % {{ COLUMNS }}u;
  let r = (quads + g / {{ COLUMNS }}u) * 4u + thread / 64u;
  if (g < {{ GROUPS }}u && n < {{ N // 4 }}u) {
{% if rank_first %}
    c[{{ "z * %du + " % (R * N // 4) if SLICE_WORKGROUPS }}r * {{ N // 4 }}u + n] {{ "+=" if accumulate else "=" }} sum;
{% else %}
{% for j in range(4) %}
    c[{{ "z * %du + " % (R * N) if SLICE_WORKGROUPS }}(n * 4u + {{ j }}u) * {{ R }}u + r] {{ "+=" if accumulate else "=" }} sum.{{ "xyzw"[j] }};
{% endfor %}
{% endif %}
  }
{% endif %}
}
