// One row of logits [C, V] of the tokens first .. first + C{{ " in order, T where there is none" if labelled }}: its loss and log-sum-exp (=), and, in place of the logits,
// d(sum of losses)/d(logits) = softmax - (1 - s) onehot(target) - s / V, times `scale` and, in the backward pass, times
// upstream. Logits are f32 or f16, taken {{ VECTOR }} at a time, and bent to cap tanh(logit / cap) where there is a cap.
// Rows whose target is negative cost nothing; with weights a row's loss and dscores are multiplied by its own.
// Maximum and sum of exponentials are found in one pass, rescaled as the maximum grows (arXiv 1805.02867, algorithm 3).
// Sums are f32. One workgroup of 256 per row. Grid: C, folded.
{% include "lib/grid.wgsl" %}
{% include "lib/reduce.wgsl" %}
{% set weight = " * weight" if weighted else "" %}
{% set values = "f32" if VECTOR == 1 else "vec4<f32>" %}
{% set stored = format if VECTOR == 1 else "vec4<%s>" % format %}
{% macro largest(v) %}{{ v if VECTOR == 1 else "max(max(%s.x, %s.y), max(%s.z, %s.w))" % (v, v, v, v) }}{% endmacro %}
{% macro sum_of(v) %}{{ v if VECTOR == 1 else "dot(%s, vec4<f32>(1.0))" % v }}{% endmacro %}
{% macro capped(v) %}{{ "(tanh(clamp(%s * %s, %s(-20.0), %s(20.0))) * %s)" % (v, inverse_cap, values, values, cap) if cap else v }}{% endmacro %}

@compute @workgroup_size({{ WIDTH }})
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let row = linear_workgroup(group, groups);
{% if labelled %}
  let token = order[{{ first }}u + min(row, {{ C - 1 }}u)];
  let end = select(0u, {{ V // VECTOR }}u, row < {{ C }}u && token < {{ T }}u);
{% else %}
  let token = {{ first }}u + row;
  let end = select(0u, {{ V // VECTOR }}u, row < {{ C }}u);
{% endif %}
  let start = row * {{ V // VECTOR }}u;
  var goal = -1;
  if (end > 0u) { goal = min(targets[token], {{ V - 1 }}); }
{% if weighted %}
  var weight = 0.0;
  if (end > 0u) { weight = weights[token]; }
{% endif %}
{% if mode == "dscores" %}
  var top = 0.0;
  if (end > 0u) { top = lse[token]; }
  let factor = select(0.0, {{ scale }} * upstream[0]{{ weight }}, goal >= 0);
{% else %}
  var highest = -3.4e38;
  var total = 0.0;
{% if smoothed %}
  var sum = 0.0;
{% endif %}
  for (var i = thread; i < end; i += {{ WIDTH }}u) {
    let value = {{ capped("%s(logits[start + i])" % values) }};
    let before = highest;
    highest = max(highest, {{ largest("value") }});
    let e = exp(value - highest);
    total = total * exp(before - highest) + {{ sum_of("e") }};
{% if smoothed %}
    sum += {{ sum_of("value") }};
{% endif %}
  }
  let peak = workgroup_max(highest, thread);
  total = workgroup_sum(total * exp(highest - peak), thread);
{% if smoothed %}
  let mean = workgroup_sum(sum, thread) / {{ V }}.0;
{% endif %}
  let top = peak + log(total);
  let factor = select(0.0, {{ scale }}{{ weight }}, goal >= 0);
  if (end > 0u && thread == 0u) {
    lse[token] = top;
    var loss = 0.0;
    if (goal >= 0) {
{% if VECTOR == 1 %}
      let chosen = f32(logits[start + u32(goal)]);
{% else %}
      let chosen = f32(logits[start + u32(goal) / 4u][u32(goal) % 4u]);
{% endif %}
      loss = top - {{ capped("chosen").replace("vec4<f32>", "f32") }};
{% if smoothed %}
      loss = {{ keep }} * loss + {{ smoothing }} * (top - mean);
{% endif %}
    }
    losses[token] = loss{{ weight }};
  }
{% endif %}
{% if mode != "loss" %}
  // The loss reads the target's logit before any invocation overwrites it.
  workgroupBarrier();
  storageBarrier();
  for (var i = thread; i < end; i += {{ WIDTH }}u) {
    let logit = {{ capped("%s(logits[start + i])" % values) }};
    var dscore = exp(logit - top){{ " - " ~ share if smoothed else "" }};
{% if VECTOR == 1 %}
    if (i32(i) == goal) { dscore -= {{ keep }}; }
{% else %}
    dscore -= select(vec4<f32>(), vec4<f32>({{ keep }}), vec4<i32>(i32(i) * 4) + vec4<i32>(0, 1, 2, 3) == vec4<i32>(goal));
{% endif %}
{% if cap %}
    dscore *= {{ values }}(1.0) - logit * logit * {{ inverse_cap }} * {{ inverse_cap }};
{% endif %}
    logits[start + i] = {{ stored }}(dscore * factor);
  }
{% endif %}
}
