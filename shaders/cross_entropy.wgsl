// One row of logits [C, V] of the tokens first .. first + C: its loss and log-sum-exp (=), and, in place of the logits,
// d(sum of losses)/d(logits) = softmax - (1 - s) onehot(target) - s / V, times upstream in the backward pass.
// Rows whose target is negative cost nothing. One workgroup of 256 a row. Grid: C, folded.
{% include "_grid.wgsl" %}
{% include "_reduce.wgsl" %}

@compute @workgroup_size({{ WIDTH }})
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let row = linear_workgroup(group, groups);
  let end = select(0u, {{ V }}u, row < {{ C }}u);
  let start = row * {{ V }}u;
  let token = {{ first }}u + row;
  var goal = -1;
  if (end > 0u) { goal = targets[token]; }
{% if mode == "slopes" %}
  var top = 0.0;
  if (end > 0u) { top = lse[token]; }
  let factor = select(0.0, upstream[0], goal >= 0);
{% else %}
  var highest = -3.4e38;
  for (var i = thread; i < end; i += {{ WIDTH }}u) { highest = max(highest, logits[start + i]); }
  highest = workgroup_max(highest, thread);
  var total = 0.0;
{% if smoothed %}
  var sum = 0.0;
{% endif %}
  for (var i = thread; i < end; i += {{ WIDTH }}u) {
    total += exp(logits[start + i] - highest);
{% if smoothed %}
    sum += logits[start + i];
{% endif %}
  }
  total = workgroup_sum(total, thread);
{% if smoothed %}
  let mean = workgroup_sum(sum, thread) / {{ V }}.0;
{% endif %}
  let top = highest + log(total);
  let factor = select(0.0, 1.0, goal >= 0);
  if (end > 0u && thread == 0u) {
    lse[token] = top;
    var loss = 0.0;
    if (goal >= 0) {
      loss = top - logits[start + u32(goal)];
{% if smoothed %}
      loss = {{ keep }} * loss + {{ smoothing }} * (top - mean);
{% endif %}
    }
    losses[token] = loss;
  }
{% endif %}
{% if mode != "loss" %}
  // The loss reads the target's logit before any invocation overwrites it.
  workgroupBarrier();
  storageBarrier();
  for (var i = thread; i < end; i += {{ WIDTH }}u) {
    var slope = exp(logits[start + i] - top){{ " - " ~ share if smoothed else "" }};
    if (i32(i) == goal) { slope -= {{ keep }}; }
    logits[start + i] = slope * factor;
  }
{% endif %}
}
