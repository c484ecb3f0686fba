// C = alpha * op(A) op(B) + beta * op(P) op(Q) + bias + residual, all f32 sums.
//
// A [M, K] or, transposed, [K, M]; B [K, N] or, transposed, [N, K]; the optional pair P, Q has the same layouts with
// inner length R: an adapter's low-rank product rides along in the same accumulators. B may be bf16 or half, two
// to a u32. Offsets and leading dimensions let a launch work on a block of a larger matrix.
// Grid: (ceil(N / BN), ceil(M / BM)). C is overwritten (=); with an in-place residual it is added to (+=).
//
// Tiles lie k-major in workgroup memory as vec4 along m (A) or n (B). A thread stages 4x4 blocks: four vec4 loads along
// the contiguous axis, transposed in registers where that axis is k, so that no two threads write one vec4.
{% set TX = BN // TN %}{% set TY = BM // TM %}{% set THREADS = TX * TY %}

{% include "_widen.wgsl" %}
var<workgroup> tile_a: array<vec4<f32>, {{ BK * BM // 4 }}>;
var<workgroup> tile_b: array<vec4<f32>, {{ BK * BN // 4 }}>;

{% macro fetch(name, operand) %}
// Four elements of row `major` starting at `minor`, zero outside the matrix.
fn fetch_{{ name }}(major: u32, minor: u32) -> vec4<f32> {
  if (major >= {{ operand.majors }}u || minor >= {{ operand.minors }}u) { return vec4<f32>(); }
  let at = {{ operand.base }}u + major * {{ operand.stride }}u + minor;
{% if operand.vector and operand.format != "f32" %}
  let bits = {{ name }}[at >> 2u];
  return vec4<f32>(widen_{{ operand.format }}(bits.x), widen_{{ operand.format }}(bits.y));
{% elif operand.vector %}
  return {{ name }}[at >> 2u];
{% else %}
  var value = vec4<f32>();
{% for i in range(4) %}
  if (minor + {{ i }}u < {{ operand.minors }}u) {
{% if operand.format != "f32" %}
    value[{{ i }}] = widen_{{ operand.format }}({{ name }}[(at + {{ i }}u) >> 1u])[(at + {{ i }}u) & 1u];
{% else %}
    value[{{ i }}] = {{ name }}[at + {{ i }}u];
{% endif %}
  }
{% endfor %}
  return value;
{% endif %}
}
{% endmacro %}
{{ fetch("a", A) }}
{{ fetch("b", B) }}
{% if R %}
{{ fetch("p", P) }}
{{ fetch("q", Q) }}
{% endif %}

{% macro stage(tile, name, operand, width, origin, factor) %}
  for (var block = thread; block < {{ BK * width // 16 }}u; block += {{ THREADS }}u) {
{% if operand.k_contiguous %}
    let k = (block % {{ BK // 4 }}u) * 4u;
    let m = block / {{ BK // 4 }}u;
{% for i in range(4) %}
    let row{{ i }} = fetch_{{ name }}({{ origin }} + m * 4u + {{ i }}u, k0 + k){{ factor }};
{% endfor %}
{% for i in range(4) %}
    {{ tile }}[(k + {{ i }}u) * {{ width // 4 }}u + m] = vec4<f32>(row0[{{ i }}], row1[{{ i }}], row2[{{ i }}], row3[{{ i }}]);
{% endfor %}
{% else %}
    let m = block % {{ width // 4 }}u;
    let k = (block / {{ width // 4 }}u) * 4u;
{% for i in range(4) %}
    {{ tile }}[(k + {{ i }}u) * {{ width // 4 }}u + m] = fetch_{{ name }}(k0 + k + {{ i }}u, {{ origin }} + m * 4u){{ factor }};
{% endfor %}
{% endif %}
  }
{% endmacro %}

{% macro multiply(a, a_operand, b, b_operand, length, factor) %}
  for (var k0 = 0u; k0 < {{ length }}u; k0 += {{ BK }}u) {
  {{ stage("tile_a", a, a_operand, BM, "m0", factor) }}
  {{ stage("tile_b", b, b_operand, BN, "n0", "") }}
    workgroupBarrier();
    for (var k = 0u; k < {{ BK }}u; k++) {
{% for i in range(TM // 4) %}
      let va{{ i }} = tile_a[k * {{ BM // 4 }}u + {{ i * TY }}u + ty];
{% endfor %}
{% for j in range(TN // 4) %}
      let vb{{ j }} = tile_b[k * {{ BN // 4 }}u + {{ j * TX }}u + tx];
{% endfor %}
{% for i in range(TM) %}{% for j in range(TN // 4) %}
      acc{{ i }}_{{ j }} = fma(vec4<f32>(va{{ i // 4 }}[{{ i % 4 }}]), vb{{ j }}, acc{{ i }}_{{ j }});
{% endfor %}{% endfor %}
    }
    workgroupBarrier();
  }
{% endmacro %}

@compute @workgroup_size({{ THREADS }})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let tx = thread % {{ TX }}u;
  let ty = thread / {{ TX }}u;
  let m0 = group.y * {{ BM }}u;
  let n0 = group.x * {{ BN }}u;
{% for i in range(TM) %}{% for j in range(TN // 4) %}
  var acc{{ i }}_{{ j }} = vec4<f32>();
{% endfor %}{% endfor %}
{{ multiply("a", A, "b", B, K, "") }}
{% if alpha != 1.0 %}
{% for i in range(TM) %}{% for j in range(TN // 4) %}
  acc{{ i }}_{{ j }} *= f32({{ alpha }});
{% endfor %}{% endfor %}
{% endif %}
{% if R %}
{{ multiply("p", P, "q", Q, R, "" if beta == 1.0 else " * f32(%r)" % beta) }}
{% endif %}
{% for i in range(TM) %}
  {
    let m = m0 + {{ (i // 4) * TY * 4 + i % 4 }}u + ty * 4u;
    if (m < {{ M }}u) {
{% for j in range(TN // 4) %}
      {
        let n = n0 + {{ j * TX * 4 }}u + tx * 4u;
        let at = {{ c_base }}u + m * {{ ldc }}u + n;
{% if c_vector %}
        if (n < {{ N }}u) {
          var value = acc{{ i }}_{{ j }};
{% if bias %}
          value += bias[n >> 2u];
{% endif %}
{% if residual %}
          value += {{ residual }}[at >> 2u];
{% endif %}
          c[at >> 2u] = value;
        }
{% else %}
        for (var x = 0u; x < 4u; x++) {
          if (n + x < {{ N }}u) {
            var value = acc{{ i }}_{{ j }}[x];
{% if bias %}
            value += bias[n + x];
{% endif %}
{% if residual %}
            value += {{ residual }}[at + x];
{% endif %}
            c[at + x] = value;
          }
        }
{% endif %}
      }
{% endfor %}
    }
  }
{% endfor %}
}
