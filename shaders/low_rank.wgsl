// Products with adapters, one of whose sides is a rank of a few quads of columns. One launch each: a workgroup of 256
// splits the long sum among its invocations and adds the parts up in workgroup memory, in a fixed tree order.
{% if mode == "rows" %}
// c [M, R] = alpha * a [M, K] op(b), with b [R, K] if it is transposed, else [K, R]; `=`.
// A workgroup makes four rows of c; {{ GROUPS }} groups of invocations make four columns each and share K.
// Grid: ceil(M / 4), folded.
{% else %}
// c = alpha * wide^T narrow, [N, R] or, with `rank_first`, [R, N]; wide [T, N], narrow [T, R]; `=` or `+=`.
// A workgroup makes {{ 4 * COLUMNS }} of the N for {{ 4 * QUADS }} of the R; groups of invocations make four of each
// and share T.
// Grid: ceil(N / {{ 4 * COLUMNS }}) * (R / {{ 4 * QUADS }}), folded.
{% endif %}
{% include "_grid.wgsl" %}
{% set PARTS = 256 // GROUPS %}
var<workgroup> parts: array<vec4<f32>, 1024>;

// Sums over all parts of four values of every group. The i-th value of group g comes back to invocation 64 i + g.
// Neighbours read and write neighbouring words.
fn add_parts(v0: vec4<f32>, v1: vec4<f32>, v2: vec4<f32>, v3: vec4<f32>, place: u32, thread: u32) -> vec4<f32> {
  parts[place] = v0;
  parts[256u + place] = v1;
  parts[512u + place] = v2;
  parts[768u + place] = v3;
  workgroupBarrier();
  let lane = thread % 64u;
  let first = thread / 64u * 256u + lane;
  let sum = (parts[first] + parts[first + 64u]) + (parts[first + 128u] + parts[first + 192u]);
  workgroupBarrier();
  parts[first] = sum;
  workgroupBarrier();
  for (var half = 32u; half >= {{ GROUPS }}u; half >>= 1u) {
    if (lane < half) { parts[first] += parts[first + half]; }
    workgroupBarrier();
  }
  return parts[first];
}

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let workgroup = linear_workgroup(group, groups);
{% for j in range(4) %}
  var acc{{ j }} = vec4<f32>();
{% endfor %}
{% if mode == "rows" %}
  // Neighbours read along K what lies along K.
  let own = {{ "thread / %du" % PARTS if b_transposed else "thread %% %du" % GROUPS }};
  let part = {{ "thread %% %du" % PARTS if b_transposed else "thread / %du" % GROUPS }};
  let row = workgroup * 4u;
{% for j in range(4) %}
  let from{{ j }} = min(row + {{ j }}u, {{ M - 1 }}u) * {{ K // 4 }}u;
{% endfor %}
  var k = part;
{% for ahead in (AHEAD, 1) %}
  for (; k + {{ (ahead - 1) * PARTS }}u < {{ K // 4 }}u; k += {{ ahead * PARTS }}u) {
{% for u in range(ahead) %}{% for j in range(4) %}
{% if b_transposed %}
    let b{{ u }}_{{ j }} = b[(own * 4u + {{ j }}u) * {{ K // 4 }}u + k + {{ u * PARTS }}u];
{% else %}
    let b{{ u }}_{{ j }} = b[(k * 4u + {{ 4 * u * PARTS + j }}u) * {{ GROUPS }}u + own];
{% endif %}
    let x{{ u }}_{{ j }} = a[from{{ j }} + k + {{ u * PARTS }}u];
{% endfor %}{% endfor %}
{% for u in range(ahead) %}{% for j in range(4) %}{% set x, b = "x%d_%d" % (u, j), "b%d" % u %}
{% if b_transposed %}
    acc{{ j }} += vec4<f32>(dot({{ x }}, {{ b }}_0), dot({{ x }}, {{ b }}_1), dot({{ x }}, {{ b }}_2), dot({{ x }}, {{ b }}_3));
{% else %}
    acc{{ j }} += {{ x }}.x * {{ b }}_0 + {{ x }}.y * {{ b }}_1 + {{ x }}.z * {{ b }}_2 + {{ x }}.w * {{ b }}_3;
{% endif %}
{% endfor %}{% endfor %}
  }
{% endfor %}
  let sum = f32({{ alpha }}) * add_parts(acc0, acc1, acc2, acc3, part * {{ GROUPS }}u + own, thread);
  let at = row + thread / 64u;
  if (thread % 64u < {{ GROUPS }}u && at < {{ M }}u) { c[at * {{ GROUPS }}u + thread % 64u] = sum; }
{% else %}
  let part = thread / {{ GROUPS }}u;
  let first = workgroup / {{ R // (4 * QUADS) }}u * {{ COLUMNS }}u;
  let quads = workgroup % {{ R // (4 * QUADS) }}u * {{ QUADS }}u;
  let column = first + thread % {{ COLUMNS }}u;
  let quad = quads + thread % {{ GROUPS }}u / {{ COLUMNS }}u;
  if (column < {{ N // 4 }}u) {
    var t = part;
{% for ahead in (AHEAD, 1) %}
    for (; t + {{ (ahead - 1) * PARTS }}u < {{ T }}u; t += {{ ahead * PARTS }}u) {
{% for u in range(ahead) %}
      let x{{ u }} = wide[(t + {{ u * PARTS }}u) * {{ N // 4 }}u + column];
      let p{{ u }} = narrow[(t + {{ u * PARTS }}u) * {{ R // 4 }}u + quad];
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
    c[r * {{ N // 4 }}u + n] {{ "+=" if accumulate else "=" }} sum;
{% else %}
{% for j in range(4) %}
    c[(n * 4u + {{ j }}u) * {{ R }}u + r] {{ "+=" if accumulate else "=" }} sum.{{ "xyzw"[j] }};
{% endfor %}
{% endif %}
  }
{% endif %}
}
