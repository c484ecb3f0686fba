"""From graphs to buffers: lifetimes, storage shared between tensors that never live at once, and launches.

Planning needs no device: it works on graphs and `Caps` and yields plain data, printable and comparable. Several
graphs (micro-batch, update, evaluation) are planned together, as if they ran one after the other: their temporaries
share one set of buffers, and the peak is the largest of them.
"""

from __future__ import annotations

import bisect
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from entrenar_gpu.compiler.lifetimes import Life, Lifetimes
from entrenar_gpu.compiler.pages import ALIGNMENT, PAGED_ROLES, Slice, page_layout, page_sizes
from entrenar_gpu.compiler.trace_groups import TraceGroup, trace_groups
from entrenar_gpu.errors import UserError
from entrenar_gpu.graph import Caps, Graph, Launch, Node, Target, Tensor
from entrenar_gpu.integers import round_up
from entrenar_gpu.ops.registry import OPS, Placement

_BESIDE = 8  # nodes that may lie between two that share scratch, which has to wait meanwhile
RING = 3  # reports that may be on their way to the host at once


@dataclass
class Step:
    """A node, its scratch on this device, of which an earlier node may have `filled` some, and its launches."""

    node: Node
    workspace: tuple[Tensor, ...]
    launches: tuple[Launch, ...] = ()
    filled: frozenset[int] = frozenset()


@dataclass(frozen=True)
class PlanOptions:
    """What a plan may use and how it is made, besides the graphs and the device."""

    budget_bytes: int | None = None  # of device memory; None: whatever it takes
    fp16: bool = False  # activations may wait for the backward pass in half precision
    trace_level: str = "step"  # how finely traced graphs are timed: "step", "phase", "layer" or "kernel"
    tiles: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # measured on the device (gpu/autotune.py)
    keep: bool = False  # every tensor has storage of its own, so that all of them can be read afterwards


DEFAULTS = PlanOptions()


@dataclass
class Plan:
    """Buffers by name with their bytes, where each tensor lives, and the steps of each graph, ready to replay."""

    caps: Caps
    options: PlanOptions = DEFAULTS
    buffers: dict[str, int] = field(default_factory=dict)
    slices: dict[int, Slice] = field(default_factory=dict)
    steps: dict[str, list[Step]] = field(default_factory=dict)
    persistents: dict[str, Tensor] = field(default_factory=dict)
    scratch: set[str] = field(default_factory=set)  # pool buffers made for workspace or dequantised weights
    reports: dict[str, str] = field(default_factory=dict)
    groups: dict[str, list[TraceGroup]] = field(default_factory=dict)
    ticks: dict[tuple[str, int], int] = field(default_factory=dict)  # (graph, repeat) -> byte offset of its ticks

    @property
    def peak_bytes(self) -> int:
        return sum(self.buffers.values())

    def describe(self) -> str:
        """One line a step: node, outputs and the buffers they lie in. Equal plans give equal text."""
        lines = []
        for name, steps in self.steps.items():
            lines.append(f"{name}:")
            for step in steps:
                places = ", ".join(f"{self.slices[t.id].buffer}<-{list(t.shape)}" for t in step.node.outputs)
                mark = " recomputed" if step.node.recomputed else ""
                lines.append(f"  {step.node.phase:9} {step.node.label()}{mark}: {places} ({len(step.launches)})")
        return "\n".join(lines)


def make_plan(graphs: Mapping[str, Graph], caps: Caps, options: PlanOptions = DEFAULTS, launches: bool = True) -> Plan:
    """Place every tensor of `graphs` as they are and specialise their launches; what fits a budget is `memory.fit`'s.

    `launches=False` stops after placement, which is all that a search over recomputation needs. Raises UserError
    naming the tensor when one cannot be bound on such a device.
    """
    plan, target = Plan(caps, options), Target.of(caps, options.tiles)
    plan.steps = {name: _steps(graph, target) for name, graph in graphs.items()}
    _place_persistents(plan, graphs)
    _place_temporaries(plan)
    _place_reports(plan, graphs)
    for steps in plan.steps.values() if launches else ():
        for step in steps:
            step.launches = _launches(plan, step, target)
    return plan


def _steps(graph: Graph, caps: Caps) -> list[Step]:
    """The nodes with their scratch. Where some may be shared it is, with a node of the layer shortly before."""
    steps, known = list[Step](), dict[Hashable, tuple[int, Tensor]]()
    for now, node in enumerate(graph.nodes):
        workspace, filled = list(_workspace(node, caps)), set[int]()
        for index, made_from in OPS[node.op].shared(node, caps).items():
            key = (made_from, node.layer, node.phase)
            last, tensor = known.get(key, (-_BESIDE - 1, workspace[index]))
            if now - last <= _BESIDE:
                workspace[index] = tensor
                filled.add(index)
            known[key] = now, workspace[index]
        steps.append(Step(node, tuple(workspace), filled=frozenset(filled)))
    return steps


def _workspace(node: Node, caps: Caps) -> tuple[Tensor, ...]:
    """Scratch that lives only while a node runs."""
    name, graph = f"{node.label()}.workspace", node.output.graph
    return tuple(
        Tensor(graph, f"{name}{i}", tuple(shape), dtype, "temp", node)
        for i, (shape, dtype) in enumerate(OPS[node.op].workspace(node, caps))
    )


def _place_persistents(plan: Plan, graphs: Mapping[str, Graph]) -> None:
    """Whole buffers, but for trainable tensors and their gradients: slices of flat pages, in equal order."""
    groups: dict[str, list[Tensor]] = {role: [] for role in PAGED_ROLES}
    for graph in graphs.values():
        for name, tensor in graph.persistents.items():
            known = plan.persistents.get(name)
            if known is not None:  # the same tensor, declared in another graph
                if (known.shape, known.dtype, known.role) != (tensor.shape, tensor.dtype, tensor.role):
                    raise ValueError(
                        f"{name}: {known!r} ({known.role}) in one graph, {tensor!r} ({tensor.role}) in another"
                    )
                plan.slices[tensor.id] = plan.slices.get(known.id, Slice(name, 0, tensor.nbytes))
                if tensor.role in PAGED_ROLES:
                    groups[tensor.role].append(tensor)
                continue
            plan.persistents[name] = tensor
            if tensor.role in PAGED_ROLES:
                groups[tensor.role].append(tensor)
            else:  # a page too: it is the whole of the buffer that bears its name
                check_bindable(tensor, plan.caps)
                plan.slices[tensor.id] = Slice(name, 0, tensor.nbytes)
                plan.buffers[name] = max(tensor.nbytes, 4)
    for role, tensors in groups.items():
        layout = page_layout(tensors, role)
        for slice_, tensor in zip(layout, tensors, strict=True):
            check_bindable(tensor, plan.caps)
            plan.slices[tensor.id] = slice_
        plan.buffers.update(page_sizes(layout))


def check_bindable(tensor: Tensor, caps: Caps) -> None:
    """Raises UserError where the device cannot bind so large a tensor whole."""
    if tensor.nbytes > min(caps.max_binding_bytes, caps.max_buffer_bytes):
        limit = min(caps.max_binding_bytes, caps.max_buffer_bytes)
        raise UserError(
            f"{tensor.name} takes {tensor.nbytes / 2**20:.0f} MiB, but {caps.name} binds at most"
            f" {limit / 2**20:.0f} MiB at once; lower --batch or --seq"
        )


def queries_of(plan: Plan, name: str) -> int:
    """Timestamps one run of a graph takes: one between groups where passes allow it, else two a group."""
    groups = len(plan.groups.get(name, ()))
    return 0 if not groups else groups + 1 if plan.caps.timestamps_inside_passes else 2 * groups


def _place_reports(plan: Plan, graphs: Mapping[str, Graph]) -> None:
    """Buffers that bring reports, and the ticks of traced graphs behind them, to the host."""
    ticks_bytes = 0
    for name, graph in graphs.items():
        if graph.traced and plan.caps.timestamps:
            plan.groups[name] = trace_groups(graph.nodes, plan.options.trace_level)
            for repeat in range(graph.repeats if plan.groups[name] else 0):
                plan.ticks[name, repeat] = ticks_bytes
                ticks_bytes += round_up(8 * queries_of(plan, name), ALIGNMENT)
    if ticks_bytes:
        plan.buffers["ticks"] = ticks_bytes
        plan.buffers["clock"] = 16  # a pair of ticks, for calibration
    for name, graph in graphs.items():
        if graph.report is not None:
            plan.reports[name] = graph.report
            nbytes = round_up(plan.persistents[graph.report].nbytes, 8) + (ticks_bytes if graph.traced else 0)
            plan.buffers.update({f"report.{name}.{i}": nbytes for i in range(RING)})


def _place_temporaries(plan: Plan) -> None:
    lifetimes = Lifetimes(plan.options.keep)
    for steps in plan.steps.values():
        for step in steps:
            _place_updates(plan, step.node)
        lifetimes.add([(step.node, step.workspace) for step in steps])
    _assign(plan, lifetimes.lives())
    for tensor_id, owner in lifetimes.taken_over().items():
        plan.slices[tensor_id] = plan.slices[owner]


def _place_updates(plan: Plan, node: Node) -> None:
    """Outputs that overwrite a persistent tensor lie where it does."""
    for index, tensor in enumerate(node.outputs):
        if tensor.updates is None:
            continue
        place = plan.slices[tensor.updates.id]
        allowed = [node.inputs[name] for output, name in OPS[node.op].inplace(node) if output == index]
        readers = [t for t in node.inputs.values() if t.persistent and plan.slices[t.id] == place]
        if readers and not any(t in readers for t in allowed):
            raise ValueError(f"{node.label()} cannot update {tensor.updates!r} in place")
        plan.slices[tensor.id] = place


def _assign(plan: Plan, lives: list[Life]) -> None:
    """Greedy by size: the largest first, each into the tightest buffer that is free for all of its life.

    Buffers take the size of their first tensor, so nothing is rounded up (Pisarchyk & Lee, arXiv 2001.03288).
    """
    slots: list[tuple[int, list[int], list[int]]] = []  # bytes, starts and ends of the lives within, sorted
    for life in sorted(lives, key=lambda x: (-x.tensor.nbytes, x.first, x.tensor.id)):
        check_bindable(life.tensor, plan.caps)
        choice = -1
        for number in range(len(slots) - 1, -1, -1):  # from the smallest: they were made in order of size
            _, starts, ends = slots[number]
            at = bisect.bisect_left(starts, life.first)
            if (at == 0 or ends[at - 1] < life.first) and (at == len(starts) or starts[at] > life.last):
                choice = number
                break
        if choice < 0:
            choice = len(slots)
            slots.append((max(life.tensor.nbytes, 4), [], []))
            if _is_scratch(life.tensor):
                plan.scratch.add(f"pool.{choice}")
        _, starts, ends = slots[choice]
        at = bisect.bisect_left(starts, life.first)
        starts.insert(at, life.first)
        ends.insert(at, life.last)
        plan.slices[life.tensor.id] = Slice(f"pool.{choice}", 0, life.tensor.nbytes)
    for number, (nbytes, _, _) in enumerate(slots):
        plan.buffers[f"pool.{number}"] = nbytes


def _is_scratch(tensor: Tensor) -> bool:
    node = tensor.node
    return node is not None and (OPS[node.op].transient or tensor not in node.outputs)


def _launches(plan: Plan, step: Step, target: Target) -> tuple[Launch, ...]:
    def aliased(output: Tensor, source: Tensor) -> bool:
        return plan.slices[output.id] == plan.slices[(source.updates or source).id]

    placed = Placement(step.workspace, aliased, step.filled)
    launches = tuple(OPS[step.node.op].launch(step.node, target, placed))
    for launch in launches:
        _check_launch(plan, step.node, launch)
    return launches


def _check_launch(plan: Plan, node: Node, launch: Launch) -> None:
    """WebGPU tracks usage per buffer: one that a dispatch writes may not be bound for reading as well."""
    if len(launch.bindings) > plan.caps.max_storage_buffers:
        raise ValueError(f"{node.label()}: {launch.shader} binds {len(launch.bindings)} buffers")
    written = {plan.slices[b.tensor.id].buffer for b in launch.bindings if b.write}
    read = {plan.slices[(b.tensor.updates or b.tensor).id].buffer for b in launch.bindings if not b.write}
    if launch.counted is not None:
        read.add(plan.slices[launch.counted[0].id].buffer)
    if written & read:
        raise ValueError(f"{node.label()}: {launch.shader} reads and writes {', '.join(sorted(written & read))}")
    if max(launch.grid) > plan.caps.max_workgroups:
        raise UserError(f"{node.label()} needs a grid of {launch.grid}, above {plan.caps.max_workgroups}")
