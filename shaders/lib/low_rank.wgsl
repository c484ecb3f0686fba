{# Sums over the parts of a workgroup of 256, and a matmul whose columns are a rank of GROUPS quads. #}
{% set PARTS = 256 // GROUPS %}
{% macro parts_added() %}
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
{% endmacro %}

{# out [M, R] = alpha * left [M, K] op(right), with right [R, K] if it is transposed, else [K, R]; `=`. A `workgroup` makes
   four rows; GROUPS groups of invocations make four columns each and share K, AHEAD steps of it under way at once. #}
{% macro rows_product(left, right, out) %}
{% for j in range(4) %}
  var acc{{ j }} = vec4<f32>();
{% endfor %}
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
    let b{{ u }}_{{ j }} = {{ right }}[(own * 4u + {{ j }}u) * {{ K // 4 }}u + k + {{ u * PARTS }}u];
{% else %}
    let b{{ u }}_{{ j }} = {{ right }}[(k * 4u + {{ 4 * u * PARTS + j }}u) * {{ GROUPS }}u + own];
{% endif %}
    let x{{ u }}_{{ j }} = {{ left }}[from{{ j }} + k + {{ u * PARTS }}u];
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
  if (thread % 64u < {{ GROUPS }}u && at < {{ M }}u) { {{ out }}[at * {{ GROUPS }}u + thread % 64u] = sum; }
{% endmacro %}
