{% set WIDTH = WIDTH | default(64) %}
{% set SUMMED = SUMMED | default(WIDTH) %}
// Sum and maximum over each run of {{ SUMMED }} invocations of a workgroup of {{ WIDTH }}, in a fixed tree order. Every invocation
// must call; all get their run's.
var<workgroup> partial: array<f32, {{ WIDTH }}>;

fn workgroup_sum(value: f32, thread: u32) -> f32 {
  let lane = thread % {{ SUMMED }}u;
  workgroupBarrier();
  partial[thread] = value;
  workgroupBarrier();
  for (var half = {{ SUMMED // 2 }}u; half > 0u; half >>= 1u) {
    if (lane < half) { partial[thread] += partial[thread + half]; }
    workgroupBarrier();
  }
  return partial[thread - lane];
}

fn workgroup_max(value: f32, thread: u32) -> f32 {
  let lane = thread % {{ SUMMED }}u;
  workgroupBarrier();
  partial[thread] = value;
  workgroupBarrier();
  for (var half = {{ SUMMED // 2 }}u; half > 0u; half >>= 1u) {
    if (lane < half) { partial[thread] = max(partial[thread], partial[thread + half]); }
    workgroupBarrier();
  }
  return partial[thread - lane];
}
