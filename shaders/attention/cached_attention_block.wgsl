// cached_attention.wgsl for a prompt's tokens: softmax(scale q k^T) v of T tokens against keys and values of their slots in
// caches [SLOTS, CONTEXT, K E] of f16, up to their own positions. out [T, H E] `=`. Queries and weights are f16 too, sums
// f32; up to {{ BK }} products are summed in f16 before. Weights are to the base 2.
// A workgroup takes {{ TOKENS }} tokens and the {{ GROUP }} query heads that read one key/value head, as {{ ROWS }} rows, of which an invocation has
// four, and meets {{ BK }} keys at a time, counted from position 0: what a row becomes follows from itself alone. Tokens of
// different slots come one slot after the other. Grid: (K, ceil(T / {{ TOKENS }})), the last tokens first, as they see the most keys.
{% set QUADS = E // 4 %}{% set PITCH = QUADS + 1 %}{# of a row of the tile of keys, against bank conflicts #}
{% set EACH = (QUADS + 15) // 16 %}{# quads of a row's columns that an invocation has #}
const MASKED = -3e38;
var<workgroup> queries: array<vec4<f16>, {{ QUADS * ROWS }}>; // [E / 4, ROWS]
var<workgroup> tile: array<vec4<f16>, {{ BK * PITCH }}>;
var<workgroup> weights: array<vec4<f16>, {{ BK * 16 }}>; // [BK, ROWS / 4]
var<workgroup> shared_rows: array<vec4<f32>, 256>;

fn slot_of(t: u32) -> u32 { return select({{ SLOTS }}u, slots[min(t, {{ T - 1 }}u)], t < {{ T }}u); }

fn position_of(t: u32) -> u32 { return min(positions[min(t, {{ T - 1 }}u)], {{ CONTEXT - 1 }}u); }

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let tx = thread % 16u;
  let ty = thread / 16u;
  let t0 = ({{ (T + TOKENS - 1) // TOKENS - 1 }}u - group.y) * {{ TOKENS }}u;
  let kv_head = group.x;
  for (var i = thread; i < {{ QUADS * ROWS }}u; i += 256u) {
    let row = i % {{ ROWS }}u;
    let t = min(t0 + row / {{ GROUP }}u, {{ T - 1 }}u);
    let head = kv_head * {{ GROUP }}u + row % {{ GROUP }}u;
    queries[i] = vec4<f16>({{ scale }} * q[(t * {{ H }}u + head) * {{ QUADS }}u + i / {{ ROWS }}u]);
  }
{% for i in range(4) %}
  let t_{{ i }} = t0 + (ty * 4u + {{ i }}u) / {{ GROUP }}u;
  let slot_{{ i }} = select({{ SLOTS }}u, slot_of(t_{{ i }}), ty * 4u + {{ i }}u < {{ TOKENS * GROUP }}u);
  let end_{{ i }} = position_of(t_{{ i }}) + 1u;
{% for j in range(EACH) %}
  var sum{{ i }}_{{ j }} = vec4<f32>();
{% endfor %}
{% endfor %}
  var peak = vec4<f32>(MASKED); // of the four rows
  var total = vec4<f32>(); // over this invocation's own keys
  for (var lead = 0u; lead < {{ TOKENS }}u; lead++) {
    let slot = slot_of(t0 + lead);
    var fresh = slot < {{ SLOTS }}u;
    for (var i = 0u; i < lead; i++) { fresh = fresh && slot_of(t0 + i) != slot; }
    if (!fresh) { continue; }
    var last = 0u;
    var first = {{ CONTEXT }}u;
    for (var i = lead; i < {{ TOKENS }}u; i++) {
      if (slot_of(t0 + i) == slot) {
        last = max(last, position_of(t0 + i));
        first = min(first, {{ "max(position_of(t0 + i) + 1u, %du) - %du" % (WINDOW, WINDOW) if WINDOW else "0u" }});
      }
    }
    let base = (slot * {{ CONTEXT * K }}u + kv_head) * {{ QUADS }}u;
    for (var k0 = first / {{ BK }}u * {{ BK }}u; k0 <= last; k0 += {{ BK }}u) {
      workgroupBarrier();
      for (var i = thread; i < {{ BK * QUADS }}u; i += 256u) {
        let key = min(k0 + i / {{ QUADS }}u, {{ CONTEXT - 1 }}u);
        tile[i / {{ QUADS }}u * {{ PITCH }}u + i % {{ QUADS }}u] = keys[base + key * {{ K * QUADS }}u + i % {{ QUADS }}u];
      }
      workgroupBarrier();
{% for i in range(4) %}{% for n in range(BK // 16) %}
      var dot{{ i }}_{{ n }} = vec4<f32>();
{% endfor %}{% endfor %}
      for (var e0 = 0u; e0 < {{ QUADS }}u; e0 += 8u) {
{% for i in range(4) %}{% for n in range(BK // 16) %}
        var half{{ i }}_{{ n }} = vec4<f16>();
{% endfor %}{% endfor %}
        for (var e = e0; e < min(e0 + 8u, {{ QUADS }}u); e++) {
{% for n in range(BK // 16) %}
          let key{{ n }} = tile[(tx + {{ 16 * n }}u) * {{ PITCH }}u + e];
{% endfor %}
{% for i in range(4) %}
          let query{{ i }} = queries[e * {{ ROWS }}u + ty * 4u + {{ i }}u];
{% for n in range(BK // 16) %}
          half{{ i }}_{{ n }} = fma(query{{ i }}, key{{ n }}, half{{ i }}_{{ n }});
{% endfor %}{% endfor %}
        }
{% for i in range(4) %}{% for n in range(BK // 16) %}
        dot{{ i }}_{{ n }} += vec4<f32>(half{{ i }}_{{ n }});
{% endfor %}{% endfor %}
      }
      workgroupBarrier(); // every key is read
      for (var i = thread; i < {{ BK * QUADS }}u; i += 256u) {
        let key = min(k0 + i / {{ QUADS }}u, {{ CONTEXT - 1 }}u);
        tile[i / {{ QUADS }}u * {{ PITCH }}u + i % {{ QUADS }}u] = values[base + key * {{ K * QUADS }}u + i % {{ QUADS }}u];
      }
{% for n in range(BK // 16) %}
      let at{{ n }} = k0 + tx + {{ 16 * n }}u;
      var score{{ n }} = vec4<f32>({% for i in range(4) %}(dot{{ i }}_{{ n }}.x + dot{{ i }}_{{ n }}.y) + (dot{{ i }}_{{ n }}.z + dot{{ i }}_{{ n }}.w){{ ", " if i < 3 }}{% endfor %});
{% if cap %}
      score{{ n }} = {{ cap }} * tanh(clamp(score{{ n }} * {{ inverse_cap }}, vec4<f32>(-10.0), vec4<f32>(10.0)));
{% endif %}
      let seen{{ n }} = vec4<bool>({% for i in range(4) %}slot_{{ i }} == slot && at{{ n }} < end_{{ i }}{{ " && at%d + %du >= end_%d" % (n, WINDOW, i) if WINDOW }}{{ ", " if i < 3 }}{% endfor %});
      score{{ n }} = select(vec4<f32>(MASKED), score{{ n }}, seen{{ n }});
{% endfor %}
      var most = score0;
{% for n in range(1, BK // 16) %}
      most = max(most, score{{ n }});
{% endfor %}
      shared_rows[thread] = most;
      workgroupBarrier();
      for (var x = 0u; x < 16u; x++) { most = max(most, shared_rows[ty * 16u + x]); }
      most = max(most, peak);
      let shrink = exp2(peak - most);
      peak = most;
      total *= shrink;
{% for n in range(BK // 16) %}
      {
        let weight = select(vec4<f32>(), exp2(score{{ n }} - peak), seen{{ n }});
        total += weight;
        weights[(tx + {{ 16 * n }}u) * 16u + ty] = vec4<f16>(weight);
      }
{% endfor %}
      workgroupBarrier();
{% for i in range(4) %}{% for j in range(EACH) %}
      var fresh{{ i }}_{{ j }} = vec4<f16>();
{% endfor %}{% endfor %}
      for (var key = 0u; key < {{ BK }}u; key++) {
        let weight = weights[key * 16u + ty];
{% for j in range(EACH) %}
        let value{{ j }} = tile[key * {{ PITCH }}u + min(tx + {{ 16 * j }}u, {{ QUADS - 1 }}u)];
{% for i in range(4) %}
        fresh{{ i }}_{{ j }} = fma(vec4<f16>(weight.{{ "xyzw"[i] }}), value{{ j }}, fresh{{ i }}_{{ j }});
{% endfor %}{% endfor %}
      }
{% for i in range(4) %}{% for j in range(EACH) %}
      sum{{ i }}_{{ j }} = fma(sum{{ i }}_{{ j }}, vec4<f32>(shrink.{{ "xyzw"[i] }}), vec4<f32>(fresh{{ i }}_{{ j }}));
{% endfor %}{% endfor %}
    }
  }
  workgroupBarrier();
  shared_rows[thread] = total;
  workgroupBarrier();
  total = vec4<f32>();
  for (var x = 0u; x < 16u; x++) { total += shared_rows[ty * 16u + x]; }
{% for i in range(4) %}
  if (ty * 4u + {{ i }}u < {{ TOKENS * GROUP }}u && t_{{ i }} < {{ T }}u) {
    let head = kv_head * {{ GROUP }}u + (ty * 4u + {{ i }}u) % {{ GROUP }}u;
{% for j in range(EACH) %}
    if (tx + {{ 16 * j }}u < {{ QUADS }}u) {
      out[(t_{{ i }} * {{ H }}u + head) * {{ QUADS }}u + tx + {{ 16 * j }}u] = select(vec4<f32>(), sum{{ i }}_{{ j }} / total.{{ "xyzw"[i] }}, slot_{{ i }} < {{ SLOTS }}u);
    }
{% endfor %}
  }
{% endfor %}
}
