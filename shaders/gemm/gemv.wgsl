// out [T, ALL] from its column START on = {{ "alpha " if alpha }}x W^T{{ " + what is added" if weights[0].added }}, of x [T, K] and rows W [N, K] as they are stored
// ({{ kind }}); `=`. Sums are f32.
{% if gate %}
// Of two weights it is what the first makes, through a gate, times what the second makes.
{% elif weights | length > 1 %}
// Workgroups share out {{ weights | length }} weights, each with an out of its own.
{% endif %}
// A row of W is cut into steps of {{ STEP }} values. Chain v takes steps v, v + {{ CHAINS }}, ... one after the other; chains are added by halves
// until {{ PARTS }} are left, and these in turn. That is the order of every row, whatever else is computed beside it:
// {{ LANES }} lanes share a row here, each with {{ CHAINS // LANES }} chains, and make {{ COLUMNS }} rows of W times {{ ROWS }} of x.
// Grid: the sum of ceil(N / {{ THREADS // LANES * COLUMNS }}), folded, by ceil(T / {{ ROWS }}).
{% set GROUPS = THREADS // LANES %}
{% set SUMS = ROWS * COLUMNS * (2 if gate else 1) %}
{% set WIDE = STEP % 4 == 0 %}
{% set rounded = weights[0].rounded %}
{% set SCALED = kind == "nf4" and rounded == "float32" %}
{% set PIECES = STEP // 4 if WIDE else STEP %}
{% set STEPS = K // STEP %}
{% set TURNED = kind == "nf4" and WORDS == 2 and not software %}
{% include "lib/grid.wgsl" %}
{% if kind == "nf4" %}
{% set part, double = weights[0].name, weights[0].double %}
{% include "lib/nf4.wgsl" %}
{% for other in weights[1:] %}{% set part, double = other.name, other.double %}
{% include "lib/nf4_scale.wgsl" %}
{% endfor %}
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
{{ functions }}
{# What a step needs of the rows of W, read before anything waits for it. #}
{% macro read_step(of, u) %}
{% for c in range(of | length * COLUMNS) %}{% set name = of[c // COLUMNS].name %}{% set at = "row%d + step + %du" % (c, u * CHAINS) %}
{% if kind == "nf4" and STEP > 1 %}
    let bits{{ c }}_{{ u }} = codes{{ name }}[{{ at }}];
    let scale{{ c }}_{{ u }} = scale_of{{ name }}(({{ at }}) / {{ 64 // STEP }}u);
{% elif kind == "nf4" %}
    let bits{{ c }}_{{ u }} = codes{{ name }}[({{ at }}) / 8u] >> (({{ at }}) % 8u / 2u * 8u + 4u - ({{ at }}) % 2u * 4u);
    let scale{{ c }}_{{ u }} = scale_of{{ name }}(({{ at }}) / 64u);
{% elif kind == "f32" or STEP > 1 %}
    let bits{{ c }}_{{ u }} = weight{{ name }}[{{ at }}];
{% else %}
    let bits{{ c }}_{{ u }} = vec2<f32>(widen_{{ kind }}(weight{{ name }}[({{ at }}) / 2u])[({{ at }}) % 2u]);
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
{% macro add_step(of, u) %}
{% if TURNED %}
    // Neighbours begin at other pieces of their steps: those that they read of x then lie in different banks.
{% for p in range(4) %}
    let piece{{ p }}_{{ u }} = ((step + {{ u * CHAINS }}u) / 2u + {{ p }}u) & 3u;
{% for c in range(of | length * COLUMNS) %}
    let half{{ c }}_{{ p }}_{{ u }} = select(bits{{ c }}_{{ u }}.x, bits{{ c }}_{{ u }}.y, piece{{ p }}_{{ u }} > 1u) >> ((piece{{ p }}_{{ u }} & 1u) * 16u);
    let w{{ c }}_{{ p }}_{{ u }} = vec4<f32>({% for shift in (4, 0, 12, 8) %}{{ "rounded" if rounded != "float32" }}(code(half{{ c }}_{{ p }}_{{ u }}, {{ shift }}u){{ " * scale%d_%d" % (c, u) if not SCALED }}){{ ", " if not loop.last }}{% endfor %});
{% endfor %}
{% endfor %}
{% else %}
{% for c in range(of | length * COLUMNS) %}{% for p in range(PIECES) %}
    let w{{ c }}_{{ p }}_{{ u }} = {{ value(c, u, p).replace("\n", "") }};
{% endfor %}{% endfor %}
{% endif %}
{% for from in range(0, ROWS, HELD) %}
{% for t in range(from, [from + HELD, ROWS] | min) %}
{% for p in range(PIECES) %}
    let x{{ t }}_{{ p }}_{{ u }} = x[x{{ t }} + (step + {{ u * CHAINS }}u) * {{ PIECES }}u + {{ "piece%d_%d" % (p, u) if TURNED else "%du" % p }}];
{% endfor %}
{% endfor %}
{% for t in range(from, [from + HELD, ROWS] | min) %}
{% for c in range(of | length * COLUMNS) %}{% set sum, part = "sum%d_%d" % (c, t), "part%d_%d_%d" % (c, t, u) %}
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
{% endfor %}
{% endmacro %}

{# Everything that one or, with a gate, two weights are multiplied by, for a workgroup counted from `from_group`. #}
{% macro product(of, from_group) %}
{% set SOURCES = of | length * COLUMNS %}
  let first = ((workgroup - {{ from_group }}u) * {{ GROUPS }}u + thread / {{ LANES }}u) * {{ COLUMNS }}u;
{% for c in range(SOURCES) %}
  let row{{ c }} = min(first + {{ c % COLUMNS }}u, {{ of[0].N - 1 }}u) * {{ STEPS }}u;
{% for t in range(ROWS) %}
  var total{{ c }}_{{ t }} = 0.0;
{% endfor %}
{% endfor %}
  for (var chain = thread % {{ LANES }}u; chain < {{ CHAINS }}u; chain += {{ LANES }}u) {
{% for c in range(SOURCES) %}{% for t in range(ROWS) %}
    var sum{{ c }}_{{ t }} = 0.0;
{% endfor %}{% endfor %}
    var step = chain;
{% for ahead in ((AHEAD, 1) if AHEAD > 1 else (1,)) %}
    for (; step{{ " + %du" % ((ahead - 1) * CHAINS) if ahead > 1 }} < {{ STEPS }}u; step += {{ ahead * CHAINS }}u) {
{% for u in range(ahead) %}
{{ read_step(of, u) -}}
{% endfor %}
{% for u in range(ahead) %}
{{ add_step(of, u) -}}
{% endfor %}
    }
{% endfor %}
{% for c in range(SOURCES) %}{% for t in range(ROWS) %}
    total{{ c }}_{{ t }} += sum{{ c }}_{{ t }};
{% endfor %}{% endfor %}
  }
{% for c in range(SOURCES) %}
{% for t in range(ROWS) %}
  partial[{{ (t * SOURCES + c) * (THREADS + 1) }}u + thread] = total{{ c }}_{{ t }};
{% endfor %}
{% endfor %}
  workgroupBarrier();
  for (var i = thread; i < {{ GROUPS * ROWS * COLUMNS }}u; i += {{ THREADS }}u) {
    // Neighbours take neighbouring columns of one row of x.
    let which = i / {{ GROUPS * COLUMNS }}u;
    let column = i % {{ GROUPS * COLUMNS }}u;
    let lanes = column / {{ COLUMNS }}u * {{ LANES }}u;
    let n = (workgroup - {{ from_group }}u) * {{ GROUPS * COLUMNS }}u + column;
    let t = first_row + which;
    if (n < {{ of[0].N }}u && t < {{ T }}u) {
      let at = t * {{ of[0].ALL }}u + n;
{% for source in of %}{% set total = "total%s" % source.name %}
      var {{ total }} = row_total((which * {{ SOURCES }}u + {{ loop.index0 * COLUMNS }}u + column % {{ COLUMNS }}u) * {{ THREADS + 1 }}u + lanes);
{% for term in source.added %}
      {{ total }} = {{ "fma(%s, %s, %s)" % (total, alpha, term) if alpha and loop.first else "%s + %s" % (total, term) }};
{% endfor %}
{% endfor %}
{% if gate %}
      let a = total{{ of[0].name }};
      out[{{ of[0].START }}u + at] = {{ gate }} * total{{ of[1].name }};
{% else %}
      out{{ of[0].name }}[{{ of[0].START }}u + at] = total{{ of[0].name }}{{ " * " ~ alpha if alpha and not of[0].added }};
{% endif %}
    }
  }
{% endmacro %}
{# What is left of lane p + `lane` when the lanes have been halved to `many`. #}
{% macro halved(lane, many) -%}
{{ "partial[start + p + %du]" % lane if many == LANES else "(%s + %s)" % (halved(lane, 2 * many), halved(lane + many, 2 * many)) }}
{%- endmacro %}
// What the lanes of a row left from place `start` on, in the order of all rows.
fn row_total(start: u32) -> f32 {
  var total = 0.0;
  for (var p = 0u; p < {{ PARTS }}u; p++) {
    total += {{ halved(0, PARTS) }};
  }
  return total;
}

@compute @workgroup_size({{ THREADS }})
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
{% if kind == "nf4" %}
  fill_codebook(thread);
{% endif %}
  let workgroup = linear_workgroup(group, groups);
  let first_row = group.z * {{ ROWS }}u;
{% for t in range(ROWS) %}
  let x{{ t }} = min(first_row + {{ t }}u, {{ T - 1 }}u) * {{ STEPS * PIECES }}u;
{% endfor %}
{% if gate or weights | length == 1 %}
{{ product(weights, 0) -}}
{% else %}
{% for weight in weights %}
  {{ "} else " if not loop.first }}{{ "if (workgroup < %du) " % (weight.FIRST + weight.GROUPS) if not loop.last }}{
{{ product([weight], weight.FIRST) -}}
{% endfor %}
  }
{% endif %}
}
