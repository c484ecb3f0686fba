
// Sum over the row of which every invocation brings a part.
fn row_sum(part: {{ floats }}, thread: u32) -> f32 {
  return workgroup_sum({{ "dot(part, vec4<f32>(1.0))" if VEC == 4 else "part" }}, thread);
}
