// out [T, ALL] from its column START on = {{ "alpha " if alpha else "" }}x W^T{{ " + what is added" if added }}, of x [T, K] and rows W [N, K] as they are stored
// ({{ kind }}); `=`. Sums are f32.
// {{ LANES }} lanes share {{ COLUMNS }} rows of W and {{ ROWS }} of x. A lane takes every {{ LANES }}th step of {{ STEP }} values; lanes are added in
// their order. Nothing here depends on which other rows of x there are.
// Grid: ceil(N / {{ THREADS // LANES * COLUMNS }}), folded, by ceil(T / {{ ROWS }}).
{% set GROUPS = THREADS // LANES %}
{% set SUMS = ROWS * COLUMNS %}
{% set WIDE = STEP % 4 == 0 %}
{% set floats = "vec4<f32>" if WIDE else "f32" %}
{% set SCALED = kind == "nf4" and rounded == "float32" %}
{% set PIECES = STEP // 4 if WIDE else STEP %}
{% include "lib/grid.wgsl" %}
{% if kind == "nf4" %}
{% include "lib/nf4.wgsl" %}
{% elif kind != "f32" %}
{% include "lib/widen.wgsl" %}
{% endif %}
// One word more between the sums than there are lanes: neighbours then read different banks.
var<workgroup> partial: array<f32, {{ SUMS * (THREADS + 1) }}>;

{% if kind == "nf4" %}
fn code(bits: u32, shift: u32) -> f32 {
  return codebook[(bits >> shift) & 15u];
}
{% endif %}
@compute @workgroup_size({{ THREADS }})
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
{% if kind == "nf4" %}
  fill_codebook(thread);
{% endif %}
  let lane = thread % {{ LANES }}u;
  let first = (linear_workgroup(group, groups) * {{ GROUPS }}u + thread / {{ LANES }}u) * {{ COLUMNS }}u;
  let first_row = group.z * {{ ROWS }}u;
{% for c in range(COLUMNS) %}
  let row{{ c }} = min(first + {{ c }}u, {{ N - 1 }}u) * {{ K // STEP }}u;
{% for t in range(ROWS) %}
  var sum{{ c }}_{{ t }} = 0.0;
{% endfor %}
{% endfor %}
{% for t in range(ROWS) %}
  let x{{ t }} = min(first_row + {{ t }}u, {{ T - 1 }}u) * {{ K // STEP * PIECES }}u;
{% endfor %}
  for (var step = lane; step < {{ K // STEP }}u; step += {{ LANES }}u) {
{% for c in range(COLUMNS) %}
{% if kind == "nf4" and STEP > 1 %}
    let bits{{ c }} = codes[row{{ c }} + step];
    let scale{{ c }} = scale_of((row{{ c }} + step) / {{ 64 // STEP }}u);
{% for p in range(PIECES) %}
    let w{{ c }}_{{ p }} = vec4<f32>(
{% for i in range(4 * p, 4 * p + 4) %}
      {{ "rounded" if rounded != "float32" }}(code(bits{{ c }}{{ "." ~ "xyzw"[i // 8] if WORDS > 1 }}, {{ i % 8 // 2 * 8 + (4 if i % 2 == 0 else 0) }}u){{ " * scale%d" % c if rounded != "float32" }}){{ "," if i % 4 != 3 }}
{% endfor %}
    );
{% endfor %}
{% elif kind == "nf4" %}
    let place{{ c }} = row{{ c }} + step;
    let scale{{ c }} = scale_of(place{{ c }} / 64u);
    let w{{ c }}_0 = {{ "rounded" if rounded != "float32" }}(code(codes[place{{ c }} / 8u], place{{ c }} % 8u / 2u * 8u + 4u - place{{ c }} % 2u * 4u){{ " * scale%d" % c if rounded != "float32" }});
{% elif kind == "f32" %}
    let w{{ c }}_0 = weight[row{{ c }} + step];
{% elif STEP > 1 %}
    let bits{{ c }} = weight[row{{ c }} + step];
{% for p in range(PIECES) %}
{% if WIDE %}
    let w{{ c }}_{{ p }} = vec4<f32>(widen_{{ kind }}(bits{{ c }}{{ "." ~ "xyzw"[2 * p] if WORDS > 1 }}), widen_{{ kind }}(bits{{ c }}{{ "." ~ "xyzw"[2 * p + 1] if WORDS > 1 }}));
{% else %}
    let w{{ c }}_{{ p }} = widen_{{ kind }}(bits{{ c }})[{{ p }}];
{% endif %}
{% endfor %}
{% else %}
    let w{{ c }}_0 = widen_{{ kind }}(weight[(row{{ c }} + step) / 2u])[(row{{ c }} + step) % 2u];
{% endif %}
{% endfor %}
{% for t in range(ROWS) %}
{% for p in range(PIECES) %}
    let x{{ t }}_{{ p }} = x[x{{ t }} + step * {{ PIECES }}u + {{ p }}u];
{% endfor %}
{% for c in range(COLUMNS) %}{% set w, x, sum, part = "w%d" % c, "x%d" % t, "sum%d_%d" % (c, t), "part%d_%d" % (c, t) %}
{% if PIECES > 1 and WIDE %}
    var {{ part }} = {{ w }}_0 * {{ x }}_0;
{% for p in range(1, PIECES) %}
    {{ part }} = fma({{ w }}_{{ p }}, {{ x }}_{{ p }}, {{ part }});
{% endfor %}
{% set whole = "(%s.x + %s.y) + (%s.z + %s.w)" % (part, part, part, part) %}
{% if SCALED %}
    {{ sum }} = fma({{ whole }}, scale{{ c }}, {{ sum }});
{% else %}
    {{ sum }} += {{ whole }};
{% endif %}
{% elif WIDE %}
{% for i in "xyzw" %}
    {{ sum }} = fma({{ w }}_0.{{ i }}, {{ x }}_0.{{ i }}, {{ sum }});
{% endfor %}
{% else %}
{% for p in range(PIECES) %}
    {{ sum }} = fma({{ w }}_{{ p }}{{ " * scale%d" % c if SCALED }}, {{ x }}_{{ p }}, {{ sum }});
{% endfor %}
{% endif %}
{% endfor %}
{% endfor %}
  }
{% for c in range(COLUMNS) %}
{% for t in range(ROWS) %}
  partial[{{ (t * COLUMNS + c) * (THREADS + 1) }}u + thread] = sum{{ c }}_{{ t }};
{% endfor %}
{% endfor %}
  workgroupBarrier();
  for (var i = thread; i < {{ GROUPS * SUMS }}u; i += {{ THREADS }}u) {
    // Neighbours take neighbouring columns of one row of x.
    let which = i / {{ GROUPS * COLUMNS }}u;
    let column = i % {{ GROUPS * COLUMNS }}u;
    let from_place = (which * {{ COLUMNS }}u + column % {{ COLUMNS }}u) * {{ THREADS + 1 }}u + column / {{ COLUMNS }}u * {{ LANES }}u;
    var total = partial[from_place];
{% if LANES > 1 %}
    for (var l = 1u; l < {{ LANES }}u; l++) { total += partial[from_place + l]; }
{% endif %}
    let n = linear_workgroup(group, groups) * {{ GROUPS * COLUMNS }}u + column;
    let t = first_row + which;
    if (n < {{ N }}u && t < {{ T }}u) {
      let at = t * {{ ALL }}u + n;
{% for term in added %}
      total = {{ "fma(total, %s, %s)" % (alpha, term) if alpha and loop.first else "total + %s" % term }};
{% endfor %}
      out[{{ START }}u + at] = total{{ " * " ~ alpha if alpha and not added }};
    }
  }
}
