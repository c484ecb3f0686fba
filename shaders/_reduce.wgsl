{% set WIDTH = WIDTH | default(64) %}
// Sum and maximum over a workgroup of {{ WIDTH }}, in a fixed tree order. Every invocation must call; all get the result.
var<workgroup> partial: array<f32, {{ WIDTH }}>;

fn workgroup_sum(value: f32, thread: u32) -> f32 {
  workgroupBarrier();
  partial[thread] = value;
  workgroupBarrier();
  for (var half = {{ WIDTH // 2 }}u; half > 0u; half >>= 1u) {
    if (thread < half) { partial[thread] += partial[thread + half]; }
    workgroupBarrier();
  }
  return partial[0];
}

fn workgroup_max(value: f32, thread: u32) -> f32 {
  workgroupBarrier();
  partial[thread] = value;
  workgroupBarrier();
  for (var half = {{ WIDTH // 2 }}u; half > 0u; half >>= 1u) {
    if (thread < half) { partial[thread] = max(partial[thread], partial[thread + half]); }
    workgroupBarrier();
  }
  return partial[0];
}
