// out [T, ALL] from its column START on = {{ "alpha " if alpha }}x W^T{{ " + what is added" if added }}, of x [T, K] and rows W [N, K] as they are stored
// ({{ kind }}); `=`. Sums are f32.
// A row of W is cut into steps of {{ STEP }} values. Chain v takes steps v, v + {{ CHAINS }}, ... one after the other; chains p, p + {{ PARTS }}, ... are
// added up in that order, then these {{ PARTS }} parts. That is the order of every row, whatever else is computed beside it:
// {{ LANES }} lanes share a row here, each with {{ CHAINS // LANES }} chains in turn, and make {{ COLUMNS }} rows of W times {{ ROWS }} of x.
// Grid: ceil(N / {{ THREADS // LANES * COLUMNS }}), folded, by ceil(T / {{ ROWS }}).
{% set GROUPS = THREADS // LANES %}
{% set SUMS = ROWS * COLUMNS %}
{% set WIDE = STEP % 4 == 0 %}
{% set SCALED = kind == "nf4" and rounded == "float32" %}
{% set PIECES = STEP // 4 if WIDE else STEP %}
{% set STEPS = K // STEP %}
{% set TURNED = kind == "nf4" and WORDS == 2 and not software %}
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
{# What a step needs of the rows of W, read before anything waits for it. #}
{% macro read_step(u) %}
{% for c in range(COLUMNS) %}{% set at = "row%d + step + %du" % (c, u * CHAINS) %}
{% if kind == "nf4" and STEP > 1 %}
    let bits{{ c }}_{{ u }} = codes[{{ at }}];
    let scale{{ c }}_{{ u }} = scale_of(({{ at }}) / {{ 64 // STEP }}u);
{% elif kind == "nf4" %}
    let bits{{ c }}_{{ u }} = codes[({{ at }}) / 8u] >> (({{ at }}) % 8u / 2u * 8u + 4u - ({{ at }}) % 2u * 4u);
    let scale{{ c }}_{{ u }} = scale_of(({{ at }}) / 64u);
{% elif kind == "f32" or STEP > 1 %}
    let bits{{ c }}_{{ u }} = weight[{{ at }}];
{% else %}
    let bits{{ c }}_{{ u }} = vec2<f32>(widen_{{ kind }}(weight[({{ at }}) / 2u])[({{ at }}) % 2u]);
{% endif %}
{% endfor %}
{% endmacro %}
{# Values of piece p of a step, as {{ floats }}. #}
{% macro value(c, u, p) %}
{% if kind == "nf4" %}
{% set factor = " * scale%d_%d" % (c, u) if not SCALED or not WIDE else "" %}
{% if WIDE %}
vec4<f32>({% for i in range(4 * p, 4 * p + 4) %}{{ "rounded" if rounded != "float32" }}(code(bits{{ c }}_{{ u }}{{ "." ~ "xyzw"[i // 8] if WORDS > 1 }}, {{ i % 8 // 2 * 8 + (4 if i % 2 == 0 else 0) }}u){{ factor }}){{ ", " if i % 4 != 3 }}{% endfor %})
{%- else %}
{{ "rounded" if rounded != "float32" }}(code(bits{{ c }}_{{ u }}, 0u){{ factor }})
{%- endif %}
{% elif kind == "f32" %}
bits{{ c }}_{{ u }}
{%- elif WIDE %}
vec4<f32>(widen_{{ kind }}(bits{{ c }}_{{ u }}{{ "." ~ "xyzw"[2 * p] if WORDS > 1 }}), widen_{{ kind }}(bits{{ c }}_{{ u }}{{ "." ~ "xyzw"[2 * p + 1] if WORDS > 1 }}))
{%- elif STEP > 1 %}
widen_{{ kind }}(bits{{ c }}_{{ u }})[{{ p }}]
{%- else %}
bits{{ c }}_{{ u }}[{{ p }}]
{%- endif %}
{% endmacro %}
{% macro add_step(u) %}
{% if TURNED %}
    // Neighbours begin at other pieces of their steps: those that they read of x then lie in different banks.
{% for p in range(4) %}
    let piece{{ p }}_{{ u }} = ((step + {{ u * CHAINS }}u) / 2u + {{ p }}u) & 3u;
{% for c in range(COLUMNS) %}
    let half{{ c }}_{{ p }}_{{ u }} = select(bits{{ c }}_{{ u }}.x, bits{{ c }}_{{ u }}.y, piece{{ p }}_{{ u }} > 1u) >> ((piece{{ p }}_{{ u }} & 1u) * 16u);
    let w{{ c }}_{{ p }}_{{ u }} = vec4<f32>({% for shift in (4, 0, 12, 8) %}{{ "rounded" if rounded != "float32" }}(code(half{{ c }}_{{ p }}_{{ u }}, {{ shift }}u){{ " * scale%d_%d" % (c, u) if not SCALED }}){{ ", " if not loop.last }}{% endfor %});
{% endfor %}
{% endfor %}
{% else %}
{% for c in range(COLUMNS) %}{% for p in range(PIECES) %}
    let w{{ c }}_{{ p }}_{{ u }} = {{ value(c, u, p).replace("\n", "") }};
{% endfor %}{% endfor %}
{% endif %}
{% for t in range(ROWS) %}
{% for p in range(PIECES) %}
    let x{{ t }}_{{ p }}_{{ u }} = x[x{{ t }} + (step + {{ u * CHAINS }}u) * {{ PIECES }}u + {{ "piece%d_%d" % (p, u) if TURNED else "%du" % p }}];
{% endfor %}
{% for c in range(COLUMNS) %}{% set sum, part = "sum%d_%d" % (c, t), "part%d_%d_%d" % (c, t, u) %}
{% if PIECES > 1 and WIDE %}
    var {{ part }} = w{{ c }}_0_{{ u }} * x{{ t }}_0_{{ u }};
{% for p in range(1, PIECES) %}
    {{ part }} = fma(w{{ c }}_{{ p }}_{{ u }}, x{{ t }}_{{ p }}_{{ u }}, {{ part }});
{% endfor %}
{% set whole = "(%s.x + %s.y) + (%s.z + %s.w)" % (part, part, part, part) %}
{% if SCALED %}
    {{ sum }} = fma({{ whole }}, scale{{ c }}_{{ u }}, {{ sum }});
{% else %}
    {{ sum }} += {{ whole }};
{% endif %}
{% elif WIDE %}
{% for i in "xyzw" %}
    {{ sum }} = fma(w{{ c }}_0_{{ u }}.{{ i }}, x{{ t }}_0_{{ u }}.{{ i }}, {{ sum }});
{% endfor %}
{% else %}
{% for p in range(PIECES) %}
    {{ sum }} = fma(w{{ c }}_{{ p }}_{{ u }}, x{{ t }}_{{ p }}_{{ u }}, {{ sum }});
{% endfor %}
{% endif %}
{% endfor %}
{% endfor %}
{% endmacro %}

@compute @workgroup_size({{ THREADS }})
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
{% if kind == "nf4" %}
  fill_codebook(thread);
{% endif %}
  let first = (linear_workgroup(group, groups) * {{ GROUPS }}u + thread / {{ LANES }}u) * {{ COLUMNS }}u;
  let first_row = group.z * {{ ROWS }}u;
{% for c in range(COLUMNS) %}
  let row{{ c }} = min(first + {{ c }}u, {{ N - 1 }}u) * {{ STEPS }}u;
{% for t in range(ROWS) %}
  var total{{ c }}_{{ t }} = 0.0;
{% endfor %}
{% endfor %}
{% for t in range(ROWS) %}
  let x{{ t }} = min(first_row + {{ t }}u, {{ T - 1 }}u) * {{ STEPS * PIECES }}u;
{% endfor %}
  for (var chain = thread % {{ LANES }}u; chain < {{ CHAINS }}u; chain += {{ LANES }}u) {
{% for c in range(COLUMNS) %}{% for t in range(ROWS) %}
    var sum{{ c }}_{{ t }} = 0.0;
{% endfor %}{% endfor %}
    var step = chain;
{% for ahead in ((AHEAD, 1) if AHEAD > 1 else (1,)) %}
    for (; step{{ " + %du" % ((ahead - 1) * CHAINS) if ahead > 1 }} < {{ STEPS }}u; step += {{ ahead * CHAINS }}u) {
{% for u in range(ahead) %}
{{ read_step(u) -}}
{% endfor %}
{% for u in range(ahead) %}
{{ add_step(u) -}}
{% endfor %}
    }
{% endfor %}
{% for c in range(COLUMNS) %}{% for t in range(ROWS) %}
    total{{ c }}_{{ t }} += sum{{ c }}_{{ t }};
{% endfor %}{% endfor %}
  }
{% for c in range(COLUMNS) %}
{% for t in range(ROWS) %}
  partial[{{ (t * COLUMNS + c) * (THREADS + 1) }}u + thread] = total{{ c }}_{{ t }};
{% endfor %}
{% endfor %}
  workgroupBarrier();
  for (var i = thread; i < {{ GROUPS * SUMS }}u; i += {{ THREADS }}u) {
    // Neighbours take neighbouring columns of one row of x.
    let which = i / {{ GROUPS * COLUMNS }}u;
    let column = i % {{ GROUPS * COLUMNS }}u;
    let from_place = (which * {{ COLUMNS }}u + column % {{ COLUMNS }}u) * {{ THREADS + 1 }}u + column / {{ COLUMNS }}u * {{ LANES }}u;
    var total = 0.0;
    for (var p = 0u; p < {{ PARTS }}u; p++) {
      var part = partial[from_place + p];
{% for l in range(PARTS, LANES, PARTS) %}
      part += partial[from_place + p + {{ l }}u];
{% endfor %}
      total += part;
    }
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
