"""Where tensors lie: nothing alive is overwritten, nothing is wasted, and what WebGPU forbids is not planned."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar_gpu import ops
from entrenar_gpu.compiler.autodiff import backward
from entrenar_gpu.compiler.pages import Slice, page_layout, page_sizes
from entrenar_gpu.compiler.plan import Plan, make_plan
from entrenar_gpu.errors import UserError
from entrenar_gpu.graph.caps import Caps
from entrenar_gpu.graph.launch import Launch, reads, writes
from entrenar_gpu.graph.tensor import Graph, Node, Tensor
from entrenar_gpu.ops.registry import OPS, Op, in_place, keep, record, same_as
from tests.helpers.cases import CASES
from tests.helpers.equivalence import build, plan_of
from tests.helpers.made_graphs import random_graph


def overlap(a: Slice, b: Slice) -> bool:
    return a.buffer == b.buffer and a.offset < b.offset + b.nbytes and b.offset < a.offset + a.nbytes


def check_storage(plan: Plan, graphs: dict[str, Graph]) -> None:
    """Follows, node by node, which tensor each stretch of each buffer holds, and that every read finds its tensor."""
    held: list[tuple[Slice, int]] = []
    for name, graph in graphs.items():
        held = [(plan.slices[t.id], t.id) for t in graph.persistents.values()]
        for step in plan.steps[name]:
            node = step.node
            for tensor in node.inputs.values():
                assert (plan.slices[tensor.id], tensor.id) in held, f"{node.label()} reads {tensor!r}, overwritten"
            allowed = {(node.outputs[out].id, node.inputs[source].id) for out, source in OPS[node.op].inplace(node)}
            for made in (*node.outputs, *step.workspace):
                place = plan.slices[made.id]
                assert place.nbytes == made.nbytes
                for tensor in node.inputs.values():
                    shares = overlap(place, plan.slices[tensor.id])
                    assert not shares or (made.id, tensor.id) in allowed, f"{node.label()} overwrites {tensor!r}"
                held = [(p, i) for p, i in held if not overlap(p, place)]
            held += [(plan.slices[t.id], t.id) for t in node.outputs]
            for tensor in node.outputs:  # two outputs that overlap would have only the last one held
                assert sum(overlap(plan.slices[tensor.id], p) for p, _ in held) == 1
                if tensor.updates is not None:  # later graph nodes may name the persistent tensor itself
                    held.append((plan.slices[tensor.id], tensor.updates.id))


def check_bindings(plan: Plan) -> None:
    for steps in plan.steps.values():
        for launch in (launch for step in steps for launch in step.launches):
            places = [(plan.slices[(b.tensor.updates or b.tensor).id].buffer, b.write) for b in launch.bindings]
            assert not {p for p, write in places if write} & {p for p, write in places if not write}
            assert len(launch.bindings) <= plan.caps.max_storage_buffers
            assert max(launch.grid) <= plan.caps.max_workgroups


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_no_case_overwrites_what_is_still_read(name, keep):
    program = build(CASES[name])
    plan = plan_of(CASES[name], program, Caps(), keep)
    check_storage(plan, {name: program.graph})
    check_bindings(plan)
    pool = [plan.slices[t.id] for n in program.graph.nodes for t in n.outputs if t.updates is None]
    if keep:
        assert len({p.buffer for p in pool}) == len(pool)


def pool_bytes(plan: Plan) -> int:
    """Bytes of the buffers that temporaries share."""
    return sum(size for name, size in plan.buffers.items() if name.startswith("pool."))


@given(st.integers(0, 2**32 - 1))
def test_no_random_graph_overwrites_what_is_still_read(seed):
    graphs = {f"g{i}": random_graph(np.random.default_rng([seed, i]), 25, differentiate=i == 0) for i in range(2)}
    plan = make_plan(graphs, Caps())
    check_storage(plan, graphs)
    check_bindings(plan)
    for name in graphs:  # as if one ran after the other, so together they need what the larger one does
        assert pool_bytes(plan) >= pool_bytes(make_plan({name: graphs[name]}, Caps()))


def test_the_check_sees_an_overlap():
    """Two tensors that live at once are put into one buffer by hand."""
    graph, (a, b, _) = branches()
    plan = make_plan({"g": graph}, Caps(), launches=False)
    plan.slices[b.id] = plan.slices[a.id]
    with pytest.raises(AssertionError, match=r"overwritten|overwrites"):
        check_storage(plan, {"g": graph})


def branches() -> tuple[Graph, tuple[Tensor, Tensor, Tensor]]:
    graph = Graph("g")
    x = graph.tensor("x", (10,))
    a, b = ops.scale(x, 2.0), ops.softmax(x)
    return graph, (a, b, ops.mul(a, b))


def test_an_output_takes_the_storage_of_an_input_that_dies():
    graph = Graph("g")
    x = graph.tensor("x", (10,))
    a = ops.scale(x, 2.0)
    b = ops.scale(a, 3.0)
    c = ops.swish(b)
    plan = make_plan({"g": graph}, Caps())
    assert plan.slices[a.id] == plan.slices[b.id] == plan.slices[c.id]
    assert plan.slices[x.id].buffer == "x"
    assert pool_bytes(plan) == 40


def test_an_output_leaves_alone_what_is_read_later_or_twice():
    graph = Graph("g")
    a = ops.scale(graph.tensor("x", (10,)), 2.0)
    b = ops.scale(a, 3.0)
    c = ops.mul(a, a)
    plan = make_plan({"g": graph}, Caps())
    assert plan.slices[a.id] != plan.slices[b.id]
    assert plan.slices[c.id] != plan.slices[a.id]


def test_an_input_of_another_size_is_not_taken():
    graph = Graph("g")
    row = ops.scale(graph.tensor("x", (10,)), 2.0)
    total = ops.add(graph.tensor("y", (3, 10)), row)
    plan = make_plan({"g": graph}, Caps())
    assert plan.slices[row.id].buffer != plan.slices[total.id].buffer


def test_a_matmul_adds_onto_a_residual_that_dies():
    graph = Graph("g")
    x, w = graph.tensor("x", (4, 8)), graph.tensor("w", (8, 6), role="weight")
    residual = ops.scale(graph.tensor("r", (4, 6)), 2.0)
    y = ops.matmul(x, w, residual=residual)
    plan = make_plan({"g": graph}, Caps())
    assert plan.slices[y.id] == plan.slices[residual.id]
    (launch,) = plan.steps["g"][-1].launches
    assert [b.name for b in launch.bindings] == ["a", "b", "c"]


def test_updates_lie_in_the_tensor_they_update():
    graph = Graph("g")
    w = graph.parameter("w", (8, 6))
    total = ops.in_place(ops.add(w.grad, ops.scale(w, 2.0)), w.grad)
    kept = keep(ops.scale(w, 3.0), "tripled")
    plan = make_plan({"g": graph}, Caps())
    assert plan.slices[total.id] == plan.slices[w.grad.id]
    assert plan.slices[kept.id] == Slice("tripled", 0, 192)


def test_an_op_that_cannot_work_in_place_may_not_update_what_it_reads():
    graph = Graph("g")
    state = graph.tensor("state", (8, 8), role="state")
    in_place(ops.softmax(state), state)
    with pytest.raises(ValueError, match="softmax cannot update state"):
        make_plan({"g": graph}, Caps())


def test_graphs_share_persistent_tensors_and_pages():
    def graph(name: str) -> Graph:
        made = Graph(name)
        x = made.tensor("x", (5, 8))
        for index, shape in enumerate([(8, 3), (3,), (3, 70)]):
            x = (
                ops.matmul(x, made.parameter(f"w{index}", shape))
                if len(shape) == 2
                else ops.add(x, made.parameter("b", shape))
            )
        return made

    graphs = {"one": graph("one"), "two": graph("two")}
    plan = make_plan(graphs, Caps())
    for name, tensor in graphs["one"].persistents.items():
        assert plan.slices[tensor.id] == plan.slices[graphs["two"].persistents[name].id]
    one = graphs["one"].persistents
    assert plan.slices[one["w0"].id] == Slice("param.matrix.0", 0, 96)
    assert plan.slices[one["w2"].id] == Slice("param.matrix.0", 256, 840)
    assert plan.slices[one["w2.grad"].id] == Slice("grad.matrix.0", 256, 840)
    assert plan.slices[one["b"].id] == Slice("param.vector.0", 0, 12)
    assert {k: v for k, v in plan.buffers.items() if not k.startswith("pool")} == {
        "x": 160,
        "param.matrix.0": 1096,
        "param.vector.0": 12,
        "grad.matrix.0": 1096,
        "grad.vector.0": 12,
    }


def test_one_name_for_two_shapes_is_refused():
    graphs = {}
    for number in (3, 4):
        graphs[str(number)] = graph = Graph(str(number))
        ops.scale(graph.tensor("x", (number,)), 2.0)
    with pytest.raises(ValueError, match="x: "):
        make_plan(graphs, Caps())


def test_pages_are_split_where_they_are_full():
    graph = Graph("g")
    tensors = [graph.tensor(f"w{i}", (4, n)) for i, n in enumerate([16, 10, 16, 100, 1])]  # bytes: 256 160 256 1600 16
    layout = page_layout(tensors, "param", page_bytes=700)
    assert [(s.buffer[-1], s.offset) for s in layout] == [("0", 0), ("0", 256), ("1", 0), ("2", 0), ("3", 0)]
    sizes = {"param.matrix.0": 416, "param.matrix.1": 256, "param.matrix.2": 1600, "param.matrix.3": 16}
    assert page_sizes(layout) == sizes


def test_buffers_take_exact_sizes_and_the_tightest_fit():
    """Of two free buffers a tensor gets the smaller one that holds it; what is left over is not rounded."""
    graph = Graph("g")
    x = graph.tensor("x", (1, 1000))
    w = [graph.tensor(f"w{n}", (1000, n), role="weight") for n in (101, 57)]
    large, small = ops.matmul(x, w[0]), ops.matmul(x, w[1])  # 404 and 228 bytes
    ops.sum(large)
    ops.sum(small)  # both are dead after this
    again = ops.matmul(x, w[1])
    ops.sum(again)
    plan = make_plan({"g": graph}, replace(Caps(), software=True))  # which does not split such products
    assert sorted(size for name, size in plan.buffers.items() if name.startswith("pool.")) == [4, 228, 404]
    assert plan.slices[again.id].buffer == plan.slices[small.id].buffer
    assert plan.peak_bytes == 4000 + 404_000 + 228_000 + 4 + 228 + 404


def test_workspace_lives_for_one_node():
    graph = Graph("g")
    x = graph.tensor("x", (9, 4096))
    ops.sum(x)
    ops.mean(x)
    plan = make_plan({"g": graph}, Caps())
    assert plan.buffers["pool.0"] == 9 * 4
    assert pool_bytes(plan) == 36 + 4
    assert plan.scratch == {"pool.0"}


GOLDEN = """\
step:
  forward   matmul: pool.0<-[3, 6] (1)
  forward   mlp/relu: pool.1<-[3, 6] (1)
  forward   sum: pool.2<-[1] (1)
  backward  fill: pool.3<-[1] (1)
  backward  expand: pool.1<-[3, 6] (1)
  backward  mlp/relu_grad: pool.0<-[3, 6] (1)
  backward  matmul: grad.matrix.0<-[4, 6] (1)"""


def test_the_plan_of_a_small_graph_reads_as_recorded():
    graph = Graph("step")
    x, w = graph.tensor("x", (3, 4)), graph.parameter("w", (4, 6))
    y = ops.matmul(x, w)
    with graph.within("mlp"):
        y = ops.relu(y)
    backward(ops.sum(y), [w])
    plan = make_plan({"step": graph}, Caps())
    assert plan.describe() == GOLDEN
    assert plan.describe() == make_plan({"step": graph}, Caps()).describe()


def test_a_launch_that_reads_what_it_writes_is_refused(monkeypatch):
    def launch(node: Node, caps: Caps, placed) -> list[Launch]:
        return [Launch("elementwise", (reads("a", node.output), writes("b", node.output)), {}, (1, 1, 1))]

    monkeypatch.setitem(OPS, "both", Op("both", same_as("x"), lambda node, x: [x], launch))
    graph = Graph("g")
    record("both", x=graph.tensor("x", (4,)))
    with pytest.raises(ValueError, match="both: elementwise reads and writes pool"):
        make_plan({"g": graph}, Caps())


def test_more_bindings_than_the_device_has_are_refused():
    program = build(CASES["matmul-nn-pair-bias-residual-17x33x20"])
    with pytest.raises(ValueError, match="matmul: matmul binds 6 buffers"):
        make_plan({"g": program.graph}, replace(Caps(), max_storage_buffers=5))


def test_a_tensor_that_cannot_be_bound_is_named():
    graph = Graph("g")
    ops.scale(graph.tensor("activations", (1 << 20, 64)), 2.0)
    with pytest.raises(UserError, match="activations takes 256 MiB, but webgpu binds at most 128 MiB"):
        make_plan({"g": graph}, Caps())


def test_a_grid_beyond_the_device_is_refused():
    graph = Graph("g")
    ops.matmul(graph.tensor("x", (64 * 70, 4)), graph.tensor("w", (4, 16)))
    with pytest.raises(UserError, match="matmul needs a grid"):
        make_plan({"g": graph}, replace(Caps(), max_workgroups=9))
