// Undoes the two-dimensional fold of a long one-dimensional grid (graph.grid_of).
fn linear_workgroup(group: vec3<u32>, count: vec3<u32>) -> u32 {
  return group.x + group.y * count.x;
}
