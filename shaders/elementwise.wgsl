// One value an invocation: out[i] = f(a[i], b[i mod period], ...), f given as WGSL text by ops/elementwise.py.
// Every output is overwritten (=). Grid: ceil(size / 256) workgroups, folded.
{% include "_grid.wgsl" %}
{{ functions }}

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  let i = linear_workgroup(group, groups) * 256u + thread;
  if (i >= {{ size }}u) { return; }
{% for name, text in loads %}
  let {{ name }} = {{ text }};
{% endfor %}
{% for target, text in stores %}
  let value{{ loop.index0 }} = {{ text }};
{% endfor %}
{% for target, text in stores %}
  {{ target }}[i] = value{{ loop.index0 }};
{% endfor %}
}
