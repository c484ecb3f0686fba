"""Eager use of the graph: tensors with values, `.numpy()` on results, `.backward()` on scalars."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from entrenar_gpu.compiler import autodiff
from entrenar_gpu.errors import UserError
from entrenar_gpu.executors import NumpyExecutor
from entrenar_gpu.graph import NUMPY_TYPES, OPERATORS, Graph, Node, Tensor

_DTYPES = {np.dtype(np.float32): "f32", np.dtype(np.float64): "f32", np.dtype(np.uint32): "u32"}
_DTYPES |= {np.dtype(np.int32): "i32", np.dtype(np.int64): "i32"}
_tape = Graph("eager")


def tensor(array: Any, requires_grad: bool = False) -> Tensor:
    """A tensor that holds `array`: floats as f32, signed integers as i32, unsigned as u32."""
    values = np.asarray(array)
    if values.dtype not in _DTYPES:
        raise UserError(f"tensor: arrays of {values.dtype} are not supported")
    dtype = _DTYPES[values.dtype]
    leaf = Tensor(_tape, "leaf", values.shape or (1,), dtype, "input", requires_grad=requires_grad)
    leaf.name = f"leaf.{leaf.id}"
    leaf.value = values.reshape(leaf.shape).astype(NUMPY_TYPES[dtype])
    return leaf


def backward(loss: Tensor) -> None:
    """Set `.grad` of every leaf with `requires_grad` that `loss` depends on, as a tensor to call `.numpy()` on."""
    leaves = [t for t in _leaves(_ancestors([loss])) if t.requires_grad]
    for leaf, gradient in autodiff.backward(loss, leaves).items():
        leaf.grad = gradient


def evaluate(result: Tensor) -> np.ndarray:
    """The value of a tensor: on the GPU where there is one, else by the NumPy references."""
    if result.value is not None:
        return result.value
    nodes = _ancestors([result])
    leaves = _leaves(nodes)
    graph = Graph("eager", nodes, {t.name: t for t in leaves})
    executor = _executor(graph, result)
    try:
        for leaf in leaves:
            executor.write(leaf.name, leaf.value)
        executor.run("eager")
        return executor.read_temporary(result)
    finally:
        executor.close()


@functools.cache
def _device() -> Any:
    from entrenar_gpu.gpu import Device, KernelCache

    try:
        device = Device.open()
    except UserError:
        return None
    return device, KernelCache(device)


def _executor(graph: Graph, result: Tensor) -> Any:
    if _device() is None:
        return NumpyExecutor({"eager": graph}, keep=(result,))
    from entrenar_gpu.compiler import make_plan
    from entrenar_gpu.gpu import Replay

    device, kernels = _device()
    return Replay(device, make_plan({"eager": graph}, device.caps), kernels)


def _ancestors(results: list[Tensor]) -> list[Node]:
    """The nodes that `results` depend on, in the order they were recorded."""
    needed = {t.id for t in results}
    nodes = []
    for node in reversed(_tape.nodes):
        if any(t.id in needed for t in node.outputs):
            nodes.append(node)
            needed.update(t.id for t in node.inputs.values())
    return nodes[::-1]


def _leaves(nodes: list[Node]) -> list[Tensor]:
    found = {t.id: t for node in nodes for t in node.inputs.values() if t.node is None}
    return list(found.values())


OPERATORS.update(backward=backward, numpy=evaluate)
