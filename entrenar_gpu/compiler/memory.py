"""What a run keeps for its backward pass: the choice that a memory budget allows at the least predicted time.

By layer: starting from everything kept, one decision after another (a tensor in half precision, or computed again) is
taken, each time the one that costs the least time a byte it saves. Of these states the lower convex hull remains. Over
all layers its steps are taken in order of their cost a byte until the plan fits, which is the greedy solution of the
multiple-choice knapsack problem (Sinha & Zoltners, Operations Research 27(3), 1979): off the optimum by less than one
step. Whether a plan fits is decided by planning it, to the byte.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from entrenar_gpu.compiler import cost
from entrenar_gpu.compiler.plan import DEFAULTS, Plan, PlanOptions, check_bindable, make_plan
from entrenar_gpu.compiler.recompute import Fate, Recompute, handed_on, rewrite
from entrenar_gpu.errors import UserError
from entrenar_gpu.graph import Caps, Graph, Node, Tensor
from entrenar_gpu.ops.half import half_bytes, halvable
from entrenar_gpu.ops.registry import OPS

_TRIED = 16  # parts of a ladder after each of which a plan is tried before a budget is called too small


@dataclass(frozen=True)
class FittedPlan:
    """Graphs as they were rewritten to fit, what was chosen for that, and their plan."""

    plan: Plan
    graphs: Mapping[str, Graph]
    recompute: Recompute


@dataclass(frozen=True)
class State:
    """Fates of a layer's nodes, by their place in it, the bytes that wait for the backward pass, and what it costs."""

    fates: Mapping[int, Fate]
    nbytes: int
    seconds: float


class Layer:
    """The forward nodes of one layer, or those outside all layers, and what is read of them later."""

    def __init__(self, number: int | None, nodes: Sequence[Node], read_later: set[int], handed: set[int]) -> None:
        """`read_later` and `handed` are ids of tensors that the backward pass, or another layer, reads."""
        self.number, self.nodes, self._handed = number, nodes, handed
        self._maker = {t.id: index for index, node in enumerate(nodes) for t in node.outputs}
        self._roots = [t for n in nodes for t in n.outputs if t.id in read_later or t.id in handed]

    def signature(self) -> tuple[object, ...]:
        """Equal for layers whose nodes, wiring and roots are alike: they share their states."""

        def place(t: Tensor) -> tuple[int, int] | None:
            made = self._maker.get(t.id)
            return None if made is None else (made, self.nodes[made].outputs.index(t))

        nodes = (
            (
                n.op,
                [(name, t.shape, t.dtype, place(t)) for name, t in n.inputs.items()],
                [(t.shape, t.dtype) for t in n.outputs],
            )
            for n in self.nodes
        )
        return (self.number is None, *map(repr, nodes), *map(place, self._roots))

    def states(self, caps: Caps, fp16: bool) -> list[State]:
        """From everything kept to as little as possible, each step dearer a byte than the one before."""
        seconds = [cost.seconds(n, caps) for n in self.nodes]
        fates: dict[int, Fate] = {}
        found = [self.state(fates, seconds)]
        while True:
            moves = [self._moved(fates, index, fate) for index, fate in self._moves(fates, fp16)]
            tried = [(moved, self.state(moved, seconds)) for moved in moves]
            saving = [(moved, state) for moved, state in tried if state.nbytes < found[-1].nbytes]
            if not saving:
                return _hull(found)
            fates, state = min(saving, key=lambda pair: _price(found[-1], pair[1]))
            found.append(state)

    def _moves(self, fates: Mapping[int, Fate], fp16: bool) -> list[tuple[int, Fate]]:
        """Decisions that may come next. Outside the layers only what is handed to one may change."""
        moves: list[tuple[int, Fate]] = []
        for index, node in enumerate(self.nodes):
            fate, handed = fates.get(index, "keep"), any(t.id in self._handed for t in node.outputs)
            if fate == "recompute" or OPS[node.op].transient or any(t.updates is not None for t in node.outputs):
                continue
            if fp16 and fate == "keep" and halvable(node.output) and (handed or self.number is not None):
                moves.append((index, "fp16"))
            if not handed and self.number is not None:
                moves.append((index, "recompute"))
        return moves

    def _moved(self, fates: Mapping[int, Fate], index: int, fate: Fate) -> dict[int, Fate]:
        """`fates` after a decision. What only a recomputation reads is computed again as well: to keep it instead
        would save nothing."""
        moved = {**fates, index: fate}
        roots = {t.id for t in self._roots}
        for tensor in self.nodes[index].inputs.values() if fate == "recompute" else ():
            source = self._maker.get(tensor.id)
            if source is not None and tensor.id not in roots and moved.get(source) != "recompute":
                moved = self._moved(moved, source, "recompute")
        return moved

    def state(self, fates: Mapping[int, Fate], seconds: Sequence[float]) -> State:
        """Follows the backward pass's reads to what must be kept for them."""
        met: dict[int, Fate] = {}
        nbytes, spent, seen, stack = 0, 0.0, set[int](), list(self._roots)
        while stack:
            tensor = stack.pop()
            index = self._maker.get(tensor.id)
            if index is None or tensor.id in seen:
                continue
            node, fate = self.nodes[index], fates.get(index, "keep")
            if OPS[node.op].transient:  # anew for every reader
                spent += seconds[index]
                stack += node.inputs.values()
                continue
            seen.add(tensor.id)
            if fate == "recompute" and index not in met:
                spent += seconds[index]
                stack += node.inputs.values()
            elif fate == "fp16" and tensor is node.output:
                nbytes += half_bytes(tensor)
                spent += cost.half_seconds(tensor)
            elif fate != "recompute":
                nbytes += tensor.nbytes
            met[index] = fate
        return State({i: f for i, f in met.items() if f != "keep"}, nbytes, spent)


def _price(before: State, after: State) -> float:
    """Seconds a byte of a step from one state to another."""
    return (after.seconds - before.seconds) / (before.nbytes - after.nbytes)


def _hull(states: Sequence[State]) -> list[State]:
    """The lower convex hull of seconds over bytes, from the most bytes on."""
    hull: list[State] = []
    for state in states:
        while len(hull) > 1 and _price(hull[-1], state) <= _price(hull[-2], hull[-1]):
            hull.pop()
        hull.append(state)
    return hull


class Ladder:
    """The choices worth making for a graph: one step after another, from everything kept to as little as possible."""

    def __init__(self, graph: Graph, caps: Caps, fp16: bool) -> None:
        """`fp16` allows activations in half precision."""
        self._layers = layers_of(graph)
        known: dict[tuple[object, ...], list[State]] = {}
        self._states: list[list[State]] = []
        for layer in self._layers:
            key = layer.signature()
            if key not in known:
                known[key] = layer.states(caps, fp16)
            self._states.append(known[key])
        # Of equal steps the first layer's comes first, whose tensors would be kept longest.
        steps = [(_price(a, b), i) for i, states in enumerate(self._states) for a, b in pairwise(states)]
        self._steps = [layer for _, layer in sorted(steps)]
        self._whole = sum(cost.seconds(n, caps) for n in graph.nodes)

    def __len__(self) -> int:
        return len(self._steps)

    def choice(self, steps: int) -> Recompute:
        """What the first so many steps lead to."""
        taken = Counter(self._steps[:steps])
        fates: dict[Node, Fate] = {}
        extra = 0.0
        for index, (layer, states) in enumerate(zip(self._layers, self._states, strict=True)):
            state = states[taken[index]]
            fates |= {layer.nodes[place]: fate for place, fate in state.fates.items()}
            extra += state.seconds - states[0].seconds
        return Recompute(fates, extra / self._whole)


def layers_of(graph: Graph) -> list[Layer]:
    """The layers of a differentiated graph in order, after the nodes that belong to none."""
    forward = [n for n in graph.nodes if n.phase == "forward"]
    read_later = {t.id for n in graph.nodes if n.phase != "forward" for t in n.inputs.values()}
    handed = handed_on(graph)
    members: dict[int | None, list[Node]] = {None: []}
    for node in forward:
        members.setdefault(node.layer, []).append(node)
    return [Layer(number, nodes, read_later, handed) for number, nodes in members.items()]


def fit(graphs: Mapping[str, Graph], caps: Caps, options: PlanOptions = DEFAULTS) -> FittedPlan:
    """The cheapest choice whose plan stays within the budget.

    The choice is made for the first graph; the others have nothing to keep. Raises MemoryBudgetError when even the
    smallest plan does not fit, and UserError where the device cannot bind a tensor, which no choice changes.
    """
    for graph in graphs.values():
        for node in graph.nodes:
            for tensor in node.outputs:  # before workspaces of absurd sizes are cut into parts
                check_bindable(tensor, caps)
    ladder = Ladder(next(iter(graphs.values())), caps, options.fp16)

    def rewritten(steps: int) -> dict[str, Graph]:
        choice = ladder.choice(steps)
        return {name: rewrite(graph, choice) for name, graph in graphs.items()}

    @functools.cache
    def peak(steps: int) -> int:
        return make_plan(rewritten(steps), caps, options, launches=False).peak_bytes

    fewest = 0 if options.budget_bytes is None else _fewest(len(ladder), peak, options.budget_bytes)
    final = rewritten(fewest)
    return FittedPlan(make_plan(final, caps, options), final, ladder.choice(fewest))


def _fewest(most: int, peak: Callable[[int], int], budget_bytes: int) -> int:
    """The fewest steps, up to `most`, whose plan stays within the budget.

    Peaks fall from step to step but for what the packing of buffers loses by chance. So no step at all is tried first,
    and where not even the last one fits, so are some before it.
    """
    if peak(0) <= budget_bytes:
        return 0
    enough = most
    if peak(most) > budget_bytes:
        enough = min((round(most * part / _TRIED) for part in range(_TRIED + 1)), key=peak)
    if peak(enough) > budget_bytes:
        raise MemoryBudgetError(peak(enough), budget_bytes)
    return bisect.bisect_left(range(enough), True, key=lambda steps: peak(steps) <= budget_bytes)


class MemoryBudgetError(UserError):
    """The smallest plan does not fit: `needed` and `budget` in bytes."""

    def __init__(self, needed: int, budget: int) -> None:
        self.needed, self.budget = needed, budget
        # Rounded apart, so that a budget of what is named is enough.
        least, given = math.ceil(needed / 2**30 * 100) / 100, math.floor(budget / 2**30 * 100) / 100
        super().__init__(f"needs {least:.2f} GiB, over the budget of {given:.2f} GiB (--memory-budget)")
