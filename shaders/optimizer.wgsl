// One optimizer step over a page of N parameters, in place (ops/optimizer.py has the formulas and their papers); the
// gradient page is left at zero for the next step. Nothing moves when state says not to apply. f32. `=`.
// Grid: ceil(N / 256), folded.
{% include "lib/grid.wgsl" %}

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let i = linear_workgroup(group, groups) * 256u + thread;
  if (i >= {{ N }}u) { return; }
  if (state[{{ apply }}] == 1.0) {
    let rate = lr[0];
    var p = page[i];
    var g = grad[i] * state[{{ clip }}];
{% if decays and decoupled %}
    p *= 1.0 - rate * {{ decay }};
{% elif decays %}
    g += {{ decay }} * p;
{% endif %}
{% if mode == "adam" %}
    let first = {{ beta1 }} * m[i] + {{ rest1 }} * g;
    let second = {{ beta2 }} * v[i] + {{ rest2 }} * g * g;
    m[i] = first;
    v[i] = second;
    let root = sqrt(second) / sqrt(state[{{ correction2 }}]) + {{ eps }};
    page[i] = p - rate / state[{{ correction1 }}] * first / root;
{% elif mode == "momentum" %}
    let step = {{ momentum }} * v[i] + g;
    v[i] = step;
    page[i] = p - rate * step;
{% else %}
    page[i] = p - rate * g;
{% endif %}
  }
  grad[i] = 0.0;
}
