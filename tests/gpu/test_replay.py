"""Replay: a run makes nothing, reads nothing but its report, and gives the same bits each time."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from entrenar_gpu import ops
from entrenar_gpu.compiler.autodiff import backward
from entrenar_gpu.compiler.plan import RING, PlanOptions, make_plan
from entrenar_gpu.errors import UserError
from entrenar_gpu.executors.numpy_executor import NumpyExecutor
from entrenar_gpu.gpu.engines import wgpu_native
from entrenar_gpu.gpu.kernel import KernelCache
from entrenar_gpu.gpu.replay import Replay
from entrenar_gpu.graph.caps import Caps
from entrenar_gpu.graph.tensor import Graph

pytestmark = pytest.mark.gpu


def training_graphs() -> dict[str, Graph]:
    """A regression with one hidden layer, dropout and AdamW; `update` reports the optimizer's state."""
    micro = Graph("micro")
    x, y, words = micro.tensor("x", (65, 33)), micro.tensor("y", (65, 5)), micro.tensor("words", (3,), "u32")
    hidden = ops.matmul(x, micro.parameter("a", (33, 48)))
    hidden = ops.dropout(ops.swish(ops.rms_norm(hidden, micro.parameter("norm", (48,)), 1e-6)), words, 0.1, 0)
    error = ops.sub(ops.matmul(hidden, micro.parameter("b", (48, 5))), y)
    loss = ops.mean(ops.mul(error, error))
    total = micro.tensor("loss", (1,), role="state")
    ops.in_place(ops.add(total, loss), total)
    backward(loss, [t for t in micro.persistents.values() if t.role == "param"])

    update = Graph("update", report="state")
    state, loss = update.tensor("state", (16,), role="state"), update.tensor("loss", (1,), role="state")
    lr = update.tensor("lr", (1,))
    planned = make_plan({"micro": micro}, Caps(), launches=False).buffers
    sizes = {name: (nbytes // 4,) for name, nbytes in planned.items() if name.startswith("param")}
    grads = {name: update.tensor(name.replace("param", "grad"), size, role="page") for name, size in sizes.items()}
    scale, partials = update.tensor("scale", (1,), role="state"), [ops.sum_of_squares(g) for g in grads.values()]
    state = ops.decide(state, loss, scale, partials, 1.0, (0.9, 0.99))
    for name, size in sizes.items():
        page, m, v = (
            update.tensor(f"{name}{part}", size, role=role)
            for part, role in (("", "page"), (".m", "state"), (".v", "state"))
        )
        ops.adam(page, grads[name], m, v, state, lr, (0.9, 0.99), 1e-8, 0.1, decoupled=True)
    return {"micro": micro, "update": update}


def prepare(executor) -> None:
    rng = np.random.default_rng(7)
    for name, shape in [("x", (65, 33)), ("y", (65, 5)), ("a", (33, 48)), ("b", (48, 5))]:
        executor.write(name, rng.standard_normal(shape) * 0.2)
    executor.write("norm", np.ones(48))
    executor.write("lr", np.array([0.01]))


def step(executor, number: int):
    """A training step; returns its report, not waited for."""
    executor.write("words", np.array([1, number, 0], np.uint32))
    executor.run("micro")
    return executor.run("update")


def losses(executor, steps: int) -> np.ndarray:
    prepare(executor)
    return np.array([step(executor, number).result()[5] for number in range(steps)])


@pytest.fixture
def replay(device, kernels):
    made = Replay(device, make_plan(training_graphs(), device.caps), kernels)
    yield made
    made.close()


def test_two_runs_are_bit_equal(device, kernels):
    runs = []
    for _ in range(2):
        replay = Replay(device, make_plan(training_graphs(), device.caps), kernels)
        runs.append(losses(replay, 8).tobytes() + replay.read("a").tobytes())
        replay.close()
    assert runs[0] == runs[1]


def test_twenty_steps_equal_the_numpy_executor(replay):
    want = losses(NumpyExecutor(training_graphs()), 20)
    np.testing.assert_allclose(losses(replay, 20), want, rtol=1e-5)
    assert want[-1] < want[0] / 2  # it learns


def counting(method, calls: Counter[str]):
    def counted(*arguments, **options):
        calls[method.__name__] += 1
        return method(*arguments, **options)

    return counted


def test_ten_steps_make_no_object_on_the_device(replay, monkeypatch):
    """Nothing is created but the command encoder of each submit."""
    prepare(replay)
    step(replay, 0).result()
    made: Counter[str] = Counter()
    kind = type(replay.device.handle)
    for name in [name for name in dir(kind) if name.startswith("create_")]:
        monkeypatch.setattr(kind, name, counting(getattr(kind, name), made))
    allocated, compiled = replay.device.allocated_bytes, len(replay.kernels)
    for number in range(1, 11):
        step(replay, number).result()
    assert made == {"create_command_encoder": 20}
    assert (replay.device.allocated_bytes, len(replay.kernels)) == (allocated, compiled)


def test_ten_steps_read_nothing_but_the_report(replay, monkeypatch):
    prepare(replay)
    queue = type(replay.device.handle.queue)

    def refuse(*arguments, **options):
        raise AssertionError("a step read a buffer")

    monkeypatch.setattr(queue, "read_buffer", refuse)
    monkeypatch.setattr(replay.device.engine.api.GPUBuffer, "map_sync", refuse)
    reports = [step(replay, number) for number in range(3)]  # as many as the ring holds, none waited for
    assert [int(report.result()[0]) for report in reports] == [1, 2, 3]


def test_reports_can_be_collected_later(replay):
    """Each report is that of its own step, though later ones were submitted before it was read."""
    at_once = losses(replay, 6)
    other = Replay(replay.device, make_plan(training_graphs(), replay.device.caps), replay.kernels)
    prepare(other)
    waiting, lagged = [], []
    for number in range(6):
        waiting.append(step(other, number))
        if len(waiting) == 2:
            lagged.append(waiting.pop(0).result()[5])
    lagged.append(waiting.pop().result()[5])
    other.close()
    assert np.array(lagged).tobytes() == at_once.tobytes()


def test_a_report_that_was_written_over_is_refused(replay):
    """Rather than read as that of a later step."""
    prepare(replay)
    reports = [step(replay, number) for number in range(RING + 1)]
    with pytest.raises(RuntimeError, match="report of update"):
        reports[0].result()
    assert [int(report.result()[0]) for report in reports[1:]] == [2, 3, 4]


def test_runs_recorded_ahead_are_those_that_they_stand_for(device, kernels, replay):
    """They see what is written after they were recorded, and report as themselves; bit-equal to runs that were not."""
    want, got = losses(replay, 4), []
    ahead = Replay(device, make_plan(training_graphs(), device.caps), kernels)
    prepare(ahead)
    for number in range(4):
        if number != 2:
            ahead.prepare("micro")
            ahead.prepare("update")
            ahead.prepare("update")  # is there already
        got.append(step(ahead, number).result()[5])
    ahead.close()
    np.testing.assert_array_equal(got, want)
    assert len(set(got)) == 4


def test_what_is_allocated_is_what_was_planned(device, kernels):
    before = device.allocated_bytes
    plan = make_plan(training_graphs(), device.caps)
    replay = Replay(device, plan, kernels)
    assert device.allocated_bytes - before == plan.peak_bytes
    replay.close()
    assert device.allocated_bytes == before


def test_equal_kernels_are_compiled_once(device):
    kernels = KernelCache(device)
    for _ in range(2):
        graph = Graph("g")
        x = graph.tensor("x", (10,))
        ops.add(ops.scale(x, 3.0), ops.scale(x, 3.0))
        Replay(device, make_plan({"g": graph}, device.caps, PlanOptions(keep=True)), kernels).close()
    assert len(kernels) == 2


def test_long_work_is_cut_into_submits(device, kernels, monkeypatch):
    """Display drivers reset a GPU that is busy for seconds; a slow device gets a submit for each product here."""
    monkeypatch.setattr(device, "caps", replace(device.caps, flops_per_second=1e3))
    replay = Replay(device, make_plan(training_graphs(), device.caps), kernels)
    assert len(replay._batches["micro"]) > 5
    cut = losses(replay, 2)
    replay.close()
    monkeypatch.undo()
    whole = Replay(device, make_plan(training_graphs(), device.caps), kernels)
    assert len(whole._batches["micro"]) == 1
    assert losses(whole, 2).tobytes() == cut.tobytes()
    whole.close()


def test_a_dispatch_that_the_device_refuses_is_an_error(replay):
    """Commands are recorded past wgpu-py's checks: what is wrong with one must still be raised, not logged."""
    (submit,) = replay._passes["micro"]
    too_many = replay.device.caps.max_workgroups + 1
    submit[0].commands[0] = submit[0].commands[0]._replace(grid=(too_many, 1, 1))
    prepare(replay)
    with pytest.raises(replay.device.engine.api.GPUError, match=r"(?i)dispatch (group size|workgroup count)"):
        replay.run("micro")


def test_an_interrupt_while_waiting_is_raised(replay, monkeypatch):
    """Python runs a signal's handler inside wgpu's callback, from where nothing is raised; the ring stays usable."""
    if replay.device.engine.name != "wgpu":
        pytest.skip("wgpudawn waits without handlers of its own")
    libf, lib = wgpu_native._api.libf, wgpu_native.lib
    polls, poll = iter(range(3)), libf.wgpuDevicePoll

    class Interrupted:
        WGPUCallbackMode_AllowProcessEvents = lib.WGPUCallbackMode_AllowProcessEvents

        @property
        def WGPUMapAsyncStatus_Success(self):
            raise KeyboardInterrupt

    prepare(replay)
    report = step(replay, 0)
    with monkeypatch.context() as patch:
        patch.setattr(wgpu_native, "lib", Interrupted())
        patch.setattr(libf, "wgpuDevicePoll", lambda *arguments: (next(polls), poll(*arguments)))
        with pytest.raises(KeyboardInterrupt):
            report.result()
    assert [int(step(replay, number).result()[0]) for number in range(1, 1 + RING)] == [2, 3, 4]


def test_groups_are_timed_by_passes_where_none_can_be_timed_inside(device, kernels, monkeypatch):
    """On Apple's GPUs: a pass a group; one that a submit cuts in two is timed from its first pass to its last."""
    if not device.caps.timestamps:
        pytest.skip("the adapter has no timestamps")
    caps = replace(device.caps, timestamps_inside_passes=False)
    for pace in (1e12, 1e3):
        monkeypatch.setattr(device, "caps", replace(caps, flops_per_second=pace))
        graphs = training_graphs()
        for graph in graphs.values():
            graph.traced = True
        replay = Replay(device, make_plan(graphs, caps, PlanOptions(trace_level="phase")), kernels)
        prepare(replay)
        report = step(replay, 0)
        report.result()
        times = report.ticks("micro", 0)
        assert len(times) == len(replay.plan.groups["micro"]) >= 2
        assert (times[:, 1] > times[:, 0]).all()
        assert (times[1:, 0] >= times[:-1, 1]).all()
        assert (len(replay._passes["micro"]) > 1) == (pace < 1e6)
        replay.close()


def test_arrays_of_another_size_are_refused(replay):
    with pytest.raises(ValueError, match="lr"):
        replay.write("lr", np.zeros(2))


def test_a_shader_that_does_not_compile_shows_its_numbered_source(device, monkeypatch):
    graph = Graph("g")
    ops.scale(graph.tensor("x", (10,)), 3.0)
    plan = make_plan({"g": graph}, device.caps)
    monkeypatch.setattr("entrenar_gpu.gpu.kernel.render", lambda launch: "fn main() {\n  nonsense;\n}")
    with pytest.raises(RuntimeError, match=r"(?s)elementwise does not compile.*\n +2 +nonsense;"):
        Replay(device, plan, KernelCache(device))


def test_memory_that_runs_out_is_given_back(device, kernels, monkeypatch):
    """To whoever tries again with less."""
    plan, make, held = make_plan(training_graphs(), device.caps), device.buffer, device.allocated_bytes

    def buffer(nbytes, label, usage=None):
        if device.allocated_bytes > held + plan.peak_bytes / 2:
            raise UserError("no memory left")
        return make(nbytes, label, usage)

    monkeypatch.setattr(device, "buffer", buffer)
    with pytest.raises(UserError, match="no memory left"):
        Replay(device, plan, kernels)
    assert device.allocated_bytes == held


def test_memory_that_runs_out_is_said_in_one_line(device, monkeypatch):
    def fail(*arguments, **options):
        raise device.engine.api.GPUOutOfMemoryError("out of memory")

    monkeypatch.setattr(type(device.handle), "create_buffer", fail)
    with pytest.raises(UserError, match=r"no 3 MiB left for pool\.0") as caught:
        device.buffer(3 << 20, "pool.0")
    assert "\n" not in str(caught.value)
