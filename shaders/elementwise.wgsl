// out[i] = f(a[i], b[i mod period], ...), f given as WGSL text by ops/elementwise.py. Every output is overwritten (=).
// One value an invocation, or four if `wide`. Grid: ceil(size / 256) or ceil(size / 1024) workgroups, folded.
{% set wide = wide | default(false) %}
{% include "lib/grid.wgsl" %}
{{ functions }}

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let i = linear_workgroup(group, groups) * 256u + thread;
  if (i >= {{ size // 4 if wide else size }}u) { return; }
{% if wide %}
{% for name, text in loads %}
  let four_{{ name }} = {{ text }};
{% endfor %}
{% for target, text in stores %}
  var value{{ loop.index0 }}: vec4<f32>;
{% endfor %}
{% for x in "xyzw" %}
  {
{% for name, text in loads %}
    let {{ name }} = four_{{ name }}.{{ x }};
{% endfor %}
{% for target, text in stores %}
    value{{ loop.index0 }}.{{ x }} = {{ text }};
{% endfor %}
  }
{% endfor %}
{% else %}
{% for name, text in loads %}
  let {{ name }} = {{ text }};
{% endfor %}
{% for target, text in stores %}
  let value{{ loop.index0 }} = {{ text }};
{% endfor %}
{% endif %}
{% for target, text in stores %}
  {{ target }}[i] = value{{ loop.index0 }};
{% endfor %}
}
