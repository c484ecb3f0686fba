"""Tensors with values: computed when they are asked for, on the GPU where there is one, else by the NumPy references.

>>> x, w = tensor([[1.0, 2.0]]), tensor([[3.0], [4.0]], requires_grad=True)
>>> loss = (2.0 * x @ w - 1.0).mean()
>>> loss.backward()
>>> float(loss), w.grad.numpy()

A tensor never changes: `x += y` makes another, and NumPy arrays are copied on the way in and out. It holds on to what
it was made from until its value is known; one that depends on a leaf with `requires_grad` does so for as long as it
lives, so that it can be differentiated. There is no list of everything: what no tensor refers to is freed.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from entrenar_gpu.compiler import autodiff, make_plan
from entrenar_gpu.dtypes import ARRAY_TYPES, NUMPY_TYPES
from entrenar_gpu.errors import UserError
from entrenar_gpu.executors import NumpyExecutor
from entrenar_gpu.graph import OPERATORS, Graph, Node, Tensor
from entrenar_gpu.ops import keep

PROGRAMS = 16  # of the last computations, with their buffers, for others of the same structure
PROGRAM_BYTES = 16 << 20  # of a program's buffers; larger ones are not kept


class _Tape(Graph):
    """The graph that eager tensors say they are in. It lists nodes only while a gradient is being recorded."""

    def __init__(self) -> None:
        super().__init__("eager")
        self.recording = False

    def append(self, node: Node) -> None:
        if self.recording:
            super().append(node)

    def number(self, value: float) -> Tensor:
        return _leaf(np.full(1, value, np.float32), "f32")


_tape = _Tape()


def tensor(array: Any, requires_grad: bool = False) -> Tensor:
    """A tensor that holds a copy of `array`: floats as f32, signed integers as i32, unsigned as u32.

    A scalar has shape [1]. `requires_grad` has `.backward()` leave the gradient with respect to it in `.grad`.
    Raises UserError for arrays of other types, and for integers beyond 32 bits.
    """
    values = np.asarray(array)
    if values.dtype not in ARRAY_TYPES:
        raise UserError(f"tensor: arrays of {values.dtype} are not supported")
    if not values.size:
        raise UserError(f"tensor: an array of shape {list(values.shape)} has no elements")
    dtype = ARRAY_TYPES[values.dtype]
    if requires_grad and dtype != "f32":
        raise UserError(f"tensor: gradients are of floats, not of {values.dtype}")
    if values.dtype == np.int64 and not (values.min() >= -(2**31) and values.max() < 2**31):
        raise UserError("tensor: integers beyond 32 bits are not supported")
    return _leaf(values.reshape(values.shape or (1,)).astype(NUMPY_TYPES[dtype]), dtype, requires_grad)


def _leaf(values: np.ndarray, dtype: str, requires_grad: bool = False) -> Tensor:
    leaf = Tensor(_tape, "leaf", values.shape, dtype, "input", requires_grad=requires_grad)
    leaf.name = f"leaf.{leaf.id}"
    leaf.value = values
    return leaf


def backward(loss: Tensor) -> None:
    """Add the gradient of `loss`, a tensor of one element, to `.grad` of every leaf with `requires_grad` behind it.

    As in PyTorch gradients add up over calls, those for the same loss too, until `leaf.grad = None`. They are leaves
    with values and no graph of their own; the values of `loss` and of its gradients are computed in one go.
    """
    _check(loss, "backward")
    if loss.size != 1:
        raise TypeError(f"backward of {loss!r}: only of a tensor of one element")
    nodes = _nodes_behind([loss], through_values=True)
    leaves = [t for t in _inputs_of(nodes) if t.node is None and t.requires_grad]
    if loss.node is None and loss.requires_grad:
        leaves = [loss]
    if not leaves:
        raise TypeError(f"backward of {loss!r}: it depends on no tensor with requires_grad")
    _tape.nodes, _tape.recording = nodes, True
    try:
        gradients = autodiff.differentiate(loss, leaves)
    finally:
        _tape.nodes, _tape.recording = [], False
    values = _compute([loss, *gradients.values()])
    loss.value = values[0]
    for leaf, value in zip(gradients, values[1:], strict=True):
        before = None if leaf.grad is None else leaf.grad.numpy()
        leaf.grad = _leaf(value if before is None else before + value, "f32")


def evaluate(result: Tensor) -> np.ndarray:
    """A copy of the values of a tensor."""
    _check(result, "numpy")
    if result.value is None:
        (result.value,) = _compute([result])
        if not result.requires_grad:
            result.node = None  # nobody asks what it was made from any more
    return result.value.copy()


def _check(tensor: Tensor, what: str) -> None:
    if tensor.graph is not _tape:
        raise TypeError(f"{what} of {tensor!r}: a tensor of the traced graph {tensor.graph.name!r} has no value")


def _nodes_behind(results: Sequence[Tensor], through_values: bool = False) -> list[Node]:
    """The nodes that `results` are made by, each after those that it reads; up to tensors whose values are known."""
    order: list[Node] = []
    seen: set[int] = set()
    stack: list[tuple[Node, bool]] = []

    def visit(tensor: Tensor) -> None:
        if tensor.node is not None and (through_values or tensor.value is None) and id(tensor.node) not in seen:
            stack.append((tensor.node, False))

    for result in results:
        visit(result)
        while stack:
            node, done = stack.pop()
            if done:
                order.append(node)
            elif id(node) not in seen:
                seen.add(id(node))
                stack.append((node, True))
                for tensor in reversed(list(node.inputs.values())):
                    visit(tensor)
    return order


def _inputs_of(nodes: Sequence[Node]) -> list[Tensor]:
    """What nodes read, each once."""
    return list({t.id: t for node in nodes for t in node.inputs.values()}.values())


def _compute(results: Sequence[Tensor]) -> list[np.ndarray]:
    """The values of tensors, of which some may be known, by a program of their own or one of the same structure."""
    unknown = [t for t in results if t.value is None]
    if unknown:
        nodes = _nodes_behind(unknown)
        made = {t.id for node in nodes for t in node.outputs}
        leaves = [t for t in _inputs_of(nodes) if t.value is not None or t.id not in made]
        found = dict(zip((t.id for t in unknown), _run(nodes, leaves, unknown), strict=True))
    return [t.value if t.value is not None else found[t.id] for t in results]


class _Program:
    """A computation on an executor, apart from the tensors that it was first made for."""

    def __init__(self, nodes: Sequence[Node], leaves: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        graph = Graph("eager")
        twins = {t.id: graph.tensor(f"leaf.{i}", t.shape, t.dtype) for i, t in enumerate(leaves)}
        for node in nodes:
            twin = replace(node, inputs={name: twins[t.id] for name, t in node.inputs.items()}, outputs=())
            twin.outputs = tuple(Tensor(graph, t.name, t.shape, t.dtype, "temp", twin) for t in node.outputs)
            twins.update((t.id, made) for t, made in zip(node.outputs, twin.outputs, strict=True) if t.id not in twins)
            graph.append(twin)
        for index, result in enumerate(results):
            keep(twins[result.id], f"result.{index}")
        self._leaves, self._results = len(leaves), len(results)
        self._executor = _executor(graph)

    def run(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        for index in range(self._leaves):
            self._executor.write(f"leaf.{index}", values[index])
        self._executor.run("eager")
        return [self._executor.read(f"result.{index}") for index in range(self._results)]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._executor.tensors.values())

    def close(self) -> None:
        self._executor.close()


_programs: OrderedDict[Hashable, _Program] = OrderedDict()  # the one that was used last comes last


def _run(nodes: Sequence[Node], leaves: Sequence[Tensor], results: Sequence[Tensor]) -> list[np.ndarray]:
    key = _structure(nodes, leaves, results)
    program = _programs.pop(key, None) or _Program(nodes, leaves, results)
    try:
        found = program.run([t.value for t in leaves if t.value is not None])
    except BaseException:
        program.close()
        raise
    if program.nbytes > PROGRAM_BYTES:
        program.close()
        return found
    _programs[key] = program
    while len(_programs) > PROGRAMS:
        _programs.popitem(last=False)[1].close()
    return found


def _structure(nodes: Sequence[Node], leaves: Sequence[Tensor], results: Sequence[Tensor]) -> Hashable:
    """Equal for computations that differ in values only."""
    numbers = {t.id: index for index, t in enumerate(leaves)}
    steps = []
    for node in nodes:
        inputs = tuple((name, numbers[t.id]) for name, t in node.inputs.items())
        for made in node.outputs:
            numbers.setdefault(made.id, len(numbers))
        outputs = tuple((t.shape, t.dtype) for t in node.outputs)
        steps.append((node.op, inputs, repr(sorted(node.attrs.items())), outputs))
    shapes = tuple((t.shape, t.dtype) for t in leaves)
    return (_device(), shapes, tuple(steps), tuple(numbers[t.id] for t in results))


@functools.cache
def _device() -> Any:
    from entrenar_gpu.gpu import KernelCache, open_device

    try:
        device = open_device()
    except UserError:
        return None
    return device, KernelCache(device)


def _executor(graph: Graph) -> Any:
    if _device() is None:
        return NumpyExecutor({"eager": graph})
    from entrenar_gpu.gpu import Replay

    device, kernels = _device()
    return Replay(device, make_plan({"eager": graph}, device.caps), kernels)


OPERATORS.update(backward=backward, numpy=evaluate)
