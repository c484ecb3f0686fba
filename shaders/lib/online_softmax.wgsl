// Puts the sums of one more run of keys to those so far: both are relative to 2^peak. In fused operations alone, which no
// compiler can round in two ways.
fn added_weight(total: f32, old: f32, weight: f32, fresh: f32) -> f32 {
  return fma(weight, fresh, total * old);
}

fn added_values(total: {{ floats }}, old: f32, sum: {{ floats }}, fresh: f32) -> {{ floats }} {
  return fma(sum, {{ floats }}(fresh), total * old);
}
