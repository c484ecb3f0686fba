// Which of the tokens with targets [T] have a label, at least 0: their numbers in order [T], ascending, then T (=). Tokens
// without one get a loss and a log-sum-exp of 0 (=).
// And counts [launches, 3]: of the grid of every launch for a chunk of labelled tokens, as much as there are of these (=).
// Grid: one workgroup.
{% set EACH = (T + 255) // 256 %}
var<workgroup> found: array<u32, 256>;

@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) thread: u32) {
  let begin = min(thread * {{ EACH }}u, {{ T }}u);
  let end = min(begin + {{ EACH }}u, {{ T }}u);
  var own = 0u;
  for (var t = begin; t < end; t++) { own += select(0u, 1u, targets[t] >= 0); }
  found[thread] = own;
  workgroupBarrier();
  for (var reach = 1u; reach < 256u; reach <<= 1u) {
    let before = select(0u, found[max(thread, reach) - reach], thread >= reach);
    workgroupBarrier();
    found[thread] += before;
    workgroupBarrier();
  }
  let labelled = found[255];
  var place = found[thread] - own;
  for (var t = begin; t < end; t++) {
    if (targets[t] >= 0) {
      order[place] = t;
      place++;
    } else {
      losses[t] = 0.0;
      lse[t] = 0.0;
    }
  }
  for (var rest = labelled + thread; rest < {{ T }}u; rest += 256u) { order[rest] = {{ T }}u; }
{% for chunks in parts %}
  for (var chunk = thread; chunk < {{ chunks.count }}u; chunk += 256u) {
    let first = {{ chunks.first }}u + chunk * {{ chunks.size }}u;
    let rows = min(max(labelled, first) - first, {{ chunks.size }}u);
    let at = ({{ chunks.row }}u + chunk * {{ chunks.grids | length }}u) * 3u;
{% for x, y, z in chunks.grids %}
    counts[at + {{ 3 * loop.index0 }}u] = ({{ x }}u * rows + {{ chunks.size - 1 }}u) / {{ chunks.size }}u;
    counts[at + {{ 3 * loop.index0 + 1 }}u] = {{ y }}u;
    counts[at + {{ 3 * loop.index0 + 2 }}u] = {{ z }}u;
{% endfor %}
  }
{% endfor %}
}
