{% import "lib/attention.wgsl" as parts with context %}
{% import "lib/visible.wgsl" as visible with context %}
// The second half of attention's gradient (FlashAttention-2, arXiv 2307.08691, algorithm 2): matmuls of the blocks that
// attention_dscores left.
//   dq = scale dS k, dk = scale dS^T q, dv = P^T dout
// A workgroup owns 64 tokens of one of the three; dk and dv are by query head, [rows, S, OUT_HEADS, E], to be summed over
// the group where there is one. `=`; keys before query block FIRST have been met by earlier launches: `+=`. Sums are f32,
// and after {{ parts.AT_ONCE }} tokens go to dq, dk or dv and start again.
// Grid: (rows * HEADS, 3 for dq, dk and dv, END), the longest sums first.
{% set T = parts.T %}
{% set LONG = END * 64 > parts.AT_ONCE %}

{# Adds the sums to what is there of them, or writes them where nothing is. #}
{% macro leave() %}
{% set scaled = [" * " ~ scale] * 8 %}
{% set so_far = "flushed" if LONG else "" %}
{% set before = (["flushed"] * LONG + ["own < %du" % FIRST] * (FIRST > 0)) | join(" || ") %}
  if (of_query) {
    if (own >= {{ FIRST }}u) {
      {{ parts.store("dq", "o", 2, "own0", "head", H, scaled, so_far) }}
    }
  } else if (group.y == 1u) {
    {{ parts.store("dk", "o", 2, "own0", "head", OUT_HEADS, scaled, before) }}
  } else {
    {{ parts.store("dv", "o", 2, "own0", "head", OUT_HEADS, [""] * 8, before) }}
  }
{% endmacro %}
var<workgroup> tile_a: array<vec4<{{ T }}>, {{ CK * 16 }}>;
var<workgroup> tile_b: array<vec4<{{ T }}>, {{ CK * EP // 4 }}>;

@compute @workgroup_size({{ THREADS }})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let tx = thread % {{ TX }}u;
  let ty = thread / {{ TX }}u;
{{ visible.blocks_of_gradient() }}
  let own0 = own * 64u;
  {{ parts.declare("o", 2) }}
{% if LONG %}
  var flushed = false;
{% endif %}
  for (var block = begin; block < stop; block++) {
    if (!of_query && {{ parts.first_key("segment_start[segments + block * 64u]", "block * 64u") }} >= own * 64u + 64u) { break; }
    let i = select(block, own, of_query);
    let j = select(own, block, of_query);
    let pair = i * (i + 1u) / 2u - {{ FIRST * (FIRST + 1) // 2 }}u + j;
    let start = (group.x * {{ PAIRS }}u + pair) * 2048u + select(1024u, 0u, group.y == 2u);
    for (var c = 0u; c < 64u; c += {{ CK }}u) {
      let first = block * 64u + c;
      workgroupBarrier();
      if (of_query) {
        for (var n = thread; n < {{ CK * 4 }}u; n += {{ THREADS }}u) {
          let key = n % {{ CK // 4 }}u;
          let query = n / {{ CK // 4 }}u;
{% for i in range(4) %}
          let value{{ i }} = dscores[start + (query * 4u + {{ i }}u) * 16u + c / 4u + key];
{% endfor %}
{% for i in range(4) %}
          tile_a[{{ parts.place("key * 4u + %du" % i, "query", 16) }}] =
            vec4<{{ T }}>(value0[{{ i }}], value1[{{ i }}], value2[{{ i }}], value3[{{ i }}]);
{% endfor %}
        }
        {{ parts.stage("tile_b", "k", "first", CK, "kv_head", K) }}
      } else {
        for (var n = thread; n < {{ CK * 16 }}u; n += {{ THREADS }}u) {
          tile_a[{{ parts.place("n / 16u", "n % 16u", 16) }}] = dscores[start + c * 16u + n];
        }
        if (group.y == 1u) {
          {{ parts.stage("tile_b", "q", "first", CK, "head", H) }}
        } else {
          {{ parts.stage("tile_b", "dout", "first", CK, "head", H) }}
        }
      }
      workgroupBarrier();
      {{ parts.multiply("o", "tile_a", "0u", 16, "tile_b", "0u", EP // 4, false, 2, CK) }}
    }
{% if LONG %}
    if ((block - begin + 1u) % {{ parts.AT_ONCE // 64 }}u == 0u) {
      {{ leave() }}
      {{ parts.clear("o", 2) }}
      flushed = true;
    }
{% endif %}
  }
  {{ leave() }}
}
