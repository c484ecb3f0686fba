// Rows of D of the tokens that have a label, whose numbers are in `order`, T where there is none. Taken {{ VECTOR }} at a time.
{% if mode == "gather" %}
// out[r] = x[order[first + r]], f32 or rounded to f16 (=).
// Grid: rows, folded; one workgroup each.
{% elif mode == "scatter" %}
// Row order[first + r] of dx: factor * sum over slices of row r of partial [slices, rows, D], one slice after the other (=).
// Grid: rows, folded; one workgroup each.
{% else %}
// dx[t] = 0 where the target of token t is no label (=).
// Grid: T, folded; one workgroup each.
{% endif %}
{% include "lib/grid.wgsl" %}
{% set values = "f32" if VECTOR == 1 else "vec4<f32>" %}
{% set stored = format if VECTOR == 1 else "vec4<%s>" % format %}
{% set WORDS = D // VECTOR %}

@compute @workgroup_size({{ WIDTH }})
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let row = linear_workgroup(group, groups);
  if (row >= {{ rows }}u) { return; }
{% if mode == "clear" %}
  if (targets[row] >= 0) { return; }
  for (var i = thread; i < {{ WORDS }}u; i += {{ WIDTH }}u) { dx[row * {{ WORDS }}u + i] = {{ values }}(); }
{% else %}
  let token = order[{{ first }}u + row];
  if (token >= {{ T }}u) { return; }
  for (var i = thread; i < {{ WORDS }}u; i += {{ WIDTH }}u) {
{% if mode == "gather" %}
    out[row * {{ WORDS }}u + i] = {{ stored }}(x[token * {{ WORDS }}u + i]);
{% else %}
    var sum = partial[row * {{ WORDS }}u + i];
{% for slice in range(1, slices) %}
    sum += partial[{{ slice * rows * WORDS }}u + row * {{ WORDS }}u + i];
{% endfor %}
    dx[token * {{ WORDS }}u + i] = sum{{ " * %s" % factor if factor else "" }};
{% endif %}
  }
{% endif %}
}
