// C [M, N] = A B^T on the device's matrix units, f16 in and f32 sums (=).
//
// A [M, K], B [N, K] f16; M a multiple of BM, N of BN, K of EDGE. A matrix of EDGE x EDGE belongs to a subgroup, whose
// size WGSL does not tell: the subgroups of a workgroup share its 2x2 groups of matrices among them, however many they are.
// coopLoadT and coopStoreT take rows one after the other, coopLoad columns: B^T, with K contiguous, lies by columns.
// Grid: (M / BM, N / BN).
{% set GROUP = 2 * EDGE %}{% set ACROSS = BN // GROUP %}
@compute @workgroup_size(128)
fn main(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(subgroup_id) subgroup: u32,
  @builtin(num_subgroups) subgroups: u32,
) {
  for (var part = subgroup; part < {{ BM // GROUP * ACROSS }}u; part += subgroups) {
    let m = group.x * {{ BM }}u + (part / {{ ACROSS }}u) * {{ GROUP }}u;
    let n = group.y * {{ BN }}u + (part % {{ ACROSS }}u) * {{ GROUP }}u;
{% for i in range(2) %}{% for j in range(2) %}
    var acc{{ i }}{{ j }} = coop_mat{{ EDGE }}x{{ EDGE }}<f32, C>();
{% endfor %}{% endfor %}
    for (var k = 0u; k < {{ K }}u; k += {{ EDGE }}u) {
{% for i in range(2) %}
      let a{{ i }} = coopLoadT<coop_mat{{ EDGE }}x{{ EDGE }}<f16, A>>(&a[(m + {{ i * EDGE }}u) * {{ K }}u + k], {{ K }}u);
      let b{{ i }} = coopLoad<coop_mat{{ EDGE }}x{{ EDGE }}<f16, B>>(&b[(n + {{ i * EDGE }}u) * {{ K }}u + k], {{ K }}u);
{% endfor %}
{% for i in range(2) %}{% for j in range(2) %}
      acc{{ i }}{{ j }} = coopMultiplyAdd(a{{ i }}, b{{ j }}, acc{{ i }}{{ j }});
{% endfor %}{% endfor %}
    }
{% for i in range(2) %}{% for j in range(2) %}
    coopStoreT(acc{{ i }}{{ j }}, &c[(m + {{ i * EDGE }}u) * {{ N }}u + n + {{ j * EDGE }}u], {{ N }}u);
{% endfor %}{% endfor %}
  }
}
