// The step's verdict (ops/optimizer.py, decide): norm of all gradients from the partial sums of squares, whether the
// step is applied, the clip factor, and the counters; sets the accumulated loss back to 0. Sums are f32. `=`.
// One workgroup of 256.
// Finiteness is read from the bits: a compiler may assume that NaN does not happen.
{% include "lib/reduce.wgsl" %}
{% set unscaled = " / scale[0]" if adapts else "" %}

fn finite(value: f32) -> bool {
  return (bitcast<u32>(value) & 0x7f800000u) != 0x7f800000u;
}

@compute @workgroup_size({{ WIDTH }})
fn main(@builtin(local_invocation_index) thread: u32) {
  var total = 0.0;
{% for size in sizes %}
  for (var i = thread; i < {{ size }}u; i += {{ WIDTH }}u) { total += part{{ loop.index0 }}[i]; }
{% endfor %}
  total = workgroup_sum(total, thread);
  if (thread > 0u) { return; }
{% if not first %}
  total += state[{{ spare }}];
{% endif %}
{% if not last %}
  state[{{ spare }}] = total;
{% else %}
  let norm = sqrt(total){{ unscaled }};
  let loss = loss_sum[0];
  let good = finite(total) && finite(loss);
  state[{{ loss }}] = loss;
  state[{{ grad_norm }}] = select(total, norm, finite(total));
  state[{{ apply }}] = select(0.0, 1.0, good);
  state[{{ clip }}] = 1.0{{ unscaled }};
{% if adapts %}
  state[{{ steady }}] = select(0.0, state[{{ steady }}] + 1.0, good);
{% endif %}
  if (good) {
{% if clips %}
    state[{{ clip }}] = min(1.0, {{ limit }} / (norm + 1e-6)){{ unscaled }};
{% endif %}
{% if adapts %}
    if (state[{{ steady }}] >= {{ steps_to_double }}) {
      scale[0] = min(scale[0] * 2.0, {{ largest }});
      state[{{ steady }}] = 0.0;
    }
{% endif %}
    state[{{ taken }}] += 1.0;
    state[{{ in_a_row }}] = 0.0;
    state[{{ correction1 }}] = state[{{ correction1 }}] * {{ beta1 }} + {{ rest1 }};
    state[{{ correction2 }}] = state[{{ correction2 }}] * {{ beta2 }} + {{ rest2 }};
  } else {
{% if adapts %}
    scale[0] = max(scale[0] * 0.5, 1.0);
{% endif %}
    state[{{ skipped }}] += 1.0;
    state[{{ in_a_row }}] += 1.0;
  }
  loss_sum[0] = 0.0;
{% endif %}
}
