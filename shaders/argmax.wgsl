// The index of the largest value of each of {{ ROWS }} rows, the first of equal ones; 2^32 - 1 where that value is not finite.
{% if mode == "values" %}
// Of x [ROWS, {{ N }}]: a workgroup of 256 takes {{ CHUNK }} values of a row. {{ "found [ROWS, CHUNKS, 2]: what it found (=)." if CHUNKS > 1 else "out [ROWS] (=)." }} Grid: {{ CHUNKS }} by ROWS.
{% else %}
// Of found [ROWS, {{ CHUNKS }}, 2], what chunks of the row had; out [ROWS] (=). Grid: 1 by ROWS.
{% endif %}
var<workgroup> keys: array<u32, 256>;
var<workgroup> places: array<u32, 256>;

// A number that orders as values do: one zero, and every NaN above all else.
fn key_of(value: f32) -> u32 {
  let bits = bitcast<u32>(value);
  let size = bits & 0x7fffffffu;
  if (size == 0u) { return 0x80000000u; }
  if (size > 0x7f800000u) { return 0xffffffffu; }
  return select(bits | 0x80000000u, ~bits, bits > 0x7fffffffu);
}

@compute @workgroup_size(256)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(local_invocation_index) thread: u32,
) {
  var key = 0u;  // below that of every value
  var place = 0u;
{% if mode == "values" %}
  for (var i = 0u; i < {{ CHUNK }}u; i += 256u) {
    let at = group.x * {{ CHUNK }}u + i + thread;
    let here = key_of(x[group.y * {{ N }}u + min(at, {{ N - 1 }}u)]);
    if (here > key && at < {{ N }}u) {
      key = here;
      place = at;
    }
  }
{% else %}
  for (var chunk = thread; chunk < {{ CHUNKS }}u; chunk += 256u) {
    let at = (group.y * {{ CHUNKS }}u + chunk) * 2u;
    if (found[at] > key) {
      key = found[at];
      place = found[at + 1u];
    }
  }
{% endif %}
  keys[thread] = key;
  places[thread] = place;
  workgroupBarrier();
  for (var half = 128u; half > 0u; half >>= 1u) {
    if (thread < half) {
      let other = keys[thread + half];
      if (other > keys[thread] || (other == keys[thread] && places[thread + half] < places[thread])) {
        keys[thread] = other;
        places[thread] = places[thread + half];
      }
    }
    workgroupBarrier();
  }
  if (thread == 0u) {
{% if mode == "values" and CHUNKS > 1 %}
    let at = (group.y * {{ CHUNKS }}u + group.x) * 2u;
    found[at] = keys[0];
    found[at + 1u] = places[0];
{% else %}
    // Keys of infinities, and of what is no number.
    let finite = keys[0] < 0xff800000u && keys[0] > 0x007fffffu;
    out[group.y] = select(0xffffffffu, places[0], finite);
{% endif %}
  }
}
