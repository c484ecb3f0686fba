"""Ops of a program's own: shapes, NumPy reference, WGSL and a gradient rule, given from outside (docs/custom-ops.md).

>>> rule = lambda call: {"x": 2.0 * call.x * call.dout}
>>> square = CustomOp("square", wgsl=SHADER, reference=lambda x: x * x, gradient=rule)
>>> square.check(x=np.linspace(-1, 1, 33))
>>> square(x=tensor(array)).sum().backward()
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from entrenar_gpu import eager, ops
from entrenar_gpu.compiler import autodiff
from entrenar_gpu.dtypes import ARRAY_TYPES
from entrenar_gpu.errors import UserError
from entrenar_gpu.executors import run_node
from entrenar_gpu.graph import Caps, Graph, Launch, Node, Tensor, grid_of, literal, reads, writes
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.ops.registry import GradientContext, Gradients, Op, Placement, Spec, record, register

_STEP = 1e-6
WORKGROUP = 256  # invocations of a shader that says nothing of how many workgroups it wants
_definitions = itertools.count()


class OpCall:
    """One use of an op, as its rules see it: inputs, outputs and attributes by their names, and in a gradient rule the
    gradient of each output as `d` and its name (None where nothing depends on that output)."""

    def __init__(self, node: Node, outputs: Sequence[str], upstream: Sequence[Tensor | None] = ()) -> None:
        made = dict(zip(outputs, node.outputs, strict=False))
        gradients = {f"d{name}": gradient for name, gradient in zip(outputs, upstream, strict=False)}
        vars(self).update({**node.inputs, **node.attrs, **made, **gradients})

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"this op has no {name!r}; it has {', '.join(vars(self))}")


class CustomOp:
    """An op that is called like those of `entrenar_gpu.ops`, with its operands by name: `op(x=x, y=y, slope=0.1)`."""

    def __init__(
        self,
        name: str,
        *,
        wgsl: str,
        reference: Callable[..., Any],
        gradient: Callable[[OpCall], Mapping[str, Tensor]] | None = None,
        outputs: Sequence[str] = ("out",),
        shapes: Callable[[OpCall], Sequence[tuple[int, ...]]] | None = None,
        workgroups: Callable[[OpCall], int] | None = None,
    ) -> None:
        """Define an op. Tensors are its inputs, everything else that it is called with an attribute.

        wgsl: the shader, a template of jinja2: inputs and outputs are bound by their names as arrays; `size` is the
            number of elements of the first output, `x_shape` the shape of `x`, and an attribute stands for itself.
        reference: the outputs as NumPy arrays (one, or a tuple) of the inputs, which may be of any float type, and the
            attributes, by name.
        gradient: the gradients of the inputs, by name, made with ops of tensors; those left out have none. Without a
            rule nothing flows back through the op.
        shapes: the shape of each output; by default all have the first input's. Outputs are f32.
        workgroups: how many to start; by default one per 256 elements of the first output. They may be folded into
            two dimensions: see lib/grid.wgsl.

        Each definition is an op of its own, also where another has the same name.
        """
        if not name.isidentifier():
            raise UserError(f"name: {name!r} is not an identifier")
        self.name, self.outputs = name, tuple(outputs)
        self._wgsl, self._reference, self._gradient = wgsl, reference, gradient
        self._shapes, self._workgroups = shapes, workgroups
        rule = None if gradient is None else self._gradients
        self._op = register(Op(f"{name}.{next(_definitions)}", self._infer, self._arrays, self._launch, rule))

    def __call__(self, **operands: Any) -> Any:
        """The output, or a tuple of them where there are several."""
        tensors = [value for value in operands.values() if isinstance(value, Tensor)]
        if not tensors or len({id(t.graph) for t in tensors}) > 1:
            raise TypeError(f"{self.name}: takes tensors of one graph by name, and attributes; arrays become tensors")
        wrong = next((name for name, value in operands.items() if not _is_operand(value)), None)
        if wrong is not None:
            raise TypeError(f"{self.name}: {wrong} is a {type(operands[wrong]).__name__}, neither a tensor nor a value")
        made = record(self._op.name, **operands)
        return made[0] if len(made) == 1 else made

    def check(self, *, tolerance: float = 1e-4, seed: int = 0, **operands: Any) -> None:
        """Hold the op to itself: the device against the reference, and the gradient rule against slopes of the
        reference, measured in float64. Inputs are arrays; attributes as in a call.

        Raises AssertionError naming what differs, where a difference is above `tolerance` times the largest value.
        """
        rng = np.random.default_rng(seed)
        arrays = {name: value for name, value in operands.items() if isinstance(value, np.ndarray)}
        attributes = {name: value for name, value in operands.items() if name not in arrays}
        self._check_device(arrays, attributes, tolerance)
        if self._gradient is not None:
            self._check_gradient(arrays, attributes, tolerance, rng)

    def _check_device(self, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any], tolerance: float) -> None:
        tensors = {name: eager.tensor(array) for name, array in arrays.items()}
        made = _several(self(**tensors, **attributes))
        wanted = _several(self._reference(**{name: t.numpy() for name, t in tensors.items()}, **attributes))
        for name, tensor, want in zip(self.outputs, made, wanted, strict=True):
            _close(f"{self.name}: {name} on the device", tensor.numpy(), np.asarray(want), tolerance)

    def _check_gradient(
        self,
        arrays: Mapping[str, np.ndarray],
        attributes: Mapping[str, Any],
        tolerance: float,
        rng: np.random.Generator,
    ) -> None:
        """Slopes of a random sum of the outputs, in a random direction and in that of the gradient."""
        graph = Graph("check")
        inputs = {}
        for name, array in arrays.items():
            dtype = ARRAY_TYPES[array.dtype]
            inputs[name] = graph.tensor(name, array.shape, dtype, requires_grad=dtype == "f32")
        made = _several(self(**inputs, **attributes))
        factors = [graph.tensor(f"factor.{i}", t.shape) for i, t in enumerate(made)]
        sums = [ops.sum(ops.mul(t, factor)) for t, factor in zip(made, factors, strict=True)]
        total = sums[0]
        for more in sums[1:]:
            total = ops.add(total, more)
        forward = list(graph.nodes)
        gradients = autodiff.differentiate(total, [t for t in inputs.values() if t.requires_grad])
        start = {
            t.id: arrays[name].astype(np.float64) if t.dtype == "f32" else arrays[name] for name, t in inputs.items()
        }
        start |= {factor.id: rng.standard_normal(factor.shape) for factor in factors}

        def computed(nodes: Sequence[Node], values: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
            held = dict(values)
            for node in nodes:
                run_node(node, held)
            return held

        values = computed(graph.nodes, start)
        for tensor, gradient in gradients.items():
            slope = values[gradient.id]
            for direction in (rng.standard_normal(tensor.shape), slope / (np.linalg.norm(slope) or 1)):
                up, down = (
                    float(computed(forward, start | {tensor.id: start[tensor.id] + step * direction})[total.id][0])
                    for step in (_STEP, -_STEP)
                )
                found, measured = float((slope * direction).sum()), (up - down) / (2 * _STEP)
                size = float(np.linalg.norm(slope) * np.linalg.norm(direction))
                _close(
                    f"{self.name}: the gradient of {tensor.name}", np.array(found), np.array(measured), tolerance, size
                )

    def _infer(self, node: Node) -> Sequence[Spec]:
        if self._shapes is None:
            shapes: Sequence[tuple[int, ...]] = [next(iter(node.inputs.values())).shape] * len(self.outputs)
        else:
            shapes = self._shapes(OpCall(node, ()))
        if len(shapes) != len(self.outputs):
            raise ValueError(f"{self.name}: {len(shapes)} shapes for the outputs {', '.join(self.outputs)}")
        return [(tuple(shape), "f32") for shape in shapes]

    def _arrays(self, node: Node, **inputs: np.ndarray) -> Sequence[np.ndarray]:
        made = _several(self._reference(**inputs, **node.attrs))
        return [np.asarray(array) for array in made]

    def _launch(self, node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
        tensors = {**node.inputs, **dict(zip(self.outputs, node.outputs, strict=True))}
        bindings = [reads(name, tensor) for name, tensor in node.inputs.items()]
        bindings += [writes(name, tensor) for name, tensor in zip(self.outputs, node.outputs, strict=True)]
        constants: dict[str, Any] = {f"{name}_shape": tensor.shape for name, tensor in tensors.items()}
        constants |= {name: literal(v) if type(v) is float else v for name, v in node.attrs.items()}
        constants["size"] = node.output.size
        call = OpCall(node, self.outputs)
        count = ceil_div(node.output.size, WORKGROUP) if self._workgroups is None else self._workgroups(call)
        return [Launch(self.name, tuple(bindings), constants, grid_of(count, caps), source=self._wgsl)]

    def _gradients(self, node: Node, upstream: Sequence[Any], context: GradientContext) -> Gradients:
        assert self._gradient is not None
        found = self._gradient(OpCall(node, self.outputs, upstream))
        unknown = set(found) - set(node.inputs)
        if unknown:
            raise ValueError(f"{self.name}: a gradient of {min(unknown)!r}, which is no input")
        for name, gradient in found.items():
            if gradient.shape != node.inputs[name].shape:
                raise ValueError(f"{self.name}: the gradient of {name} is {gradient!r}, not like {node.inputs[name]!r}")
        return found


def _is_operand(value: Any) -> bool:
    return isinstance(value, (Tensor, bool, int, float, str))


def _several(made: Any) -> Sequence[Any]:
    return made if isinstance(made, tuple) else (made,)


def _close(what: str, found: np.ndarray, want: np.ndarray, tolerance: float, size: float = 0.0) -> None:
    if found.shape != want.shape:
        raise AssertionError(f"{what}: shape {list(found.shape)}, not {list(want.shape)}")
    room = tolerance * max(size, float(np.abs(want).max(initial=0.0)), 1e-30)
    worst = float(np.abs(found.astype(np.float64) - want).max(initial=0.0))
    if not worst <= room:
        raise AssertionError(f"{what}: {worst:.3g} apart, where {room:.3g} is allowed")
