"""What the operators of tensors do: `a + b`, `2 * x`, `-x`, `x / y`, `a @ b`, `x.T`, `x[1:, ::2]`, by NumPy's rules.

Operands are checked before anything is recorded. A scalar is a tensor of one element, shape [1]: there are none
of shape []. Numbers become constants of a traced program, and tensors of an eager one, where a loop whose numbers
change would otherwise compile a shader for each.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from types import EllipsisType
from typing import Any

import numpy as np

from entrenar_gpu.graph import OPERATORS, Graph, Tensor
from entrenar_gpu.ops.elementwise import add, div, fill, mul, scale, sub
from entrenar_gpu.ops.gemm.matmul import matmul
from entrenar_gpu.ops.reduce import mean, sum
from entrenar_gpu.ops.views import broadcast, part, reshape, sum_to, transpose

MATRIX = 2  # axes of the right side of a product
Shape = tuple[int, ...]
Axes = int | tuple[int, ...] | None


class OperandError(TypeError, ValueError):
    """Operands that an operator does not take, both named: of a wrong type, or shapes that do not go together."""

    def __init__(self, symbol: str, a: object, b: object, why: str) -> None:
        super().__init__(f"{_named(a)} {symbol} {_named(b)}: {why}")


def _named(operand: object) -> str:
    if isinstance(operand, Tensor):
        return repr(operand)
    if isinstance(operand, np.ndarray):
        return f"ndarray:{operand.dtype}{list(operand.shape)}"
    text = repr(operand)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(operand).__name__})"


def _graph(symbol: str, a: object, b: object) -> Graph:
    """The graph of two operands, of which one at least is a tensor and the other may be a number."""
    tensors = [t for t in (a, b) if isinstance(t, Tensor)]
    for operand in (a, b):
        if isinstance(operand, np.ndarray):
            raise OperandError(symbol, a, b, "an array is not a tensor; make one of it with tensor(...)")
        if isinstance(operand, Tensor):
            if operand.dtype != "f32":
                raise OperandError(symbol, a, b, f"arithmetic is of f32, not of {operand.dtype}")
        elif not isinstance(operand, numbers.Real):
            raise OperandError(symbol, a, b, "neither a tensor nor a number")
        elif not math.isfinite(np.float32(_number(operand))):
            raise OperandError(symbol, a, b, "not a finite number in f32")
    if len({id(t.graph) for t in tensors}) > 1:
        raise OperandError(symbol, a, b, "tensors of different graphs")
    return tensors[0].graph


def _number(value: Any) -> float:
    try:
        number = float(value)
    except OverflowError:
        return math.inf
    return number if abs(number) <= float(np.finfo(np.float32).max) else math.inf


def _elementwise(symbol: str, op: Callable[[Tensor, Tensor], Tensor], commutes: bool) -> Callable[[Any, Any], Tensor]:
    def apply(a: Any, b: Any) -> Tensor:
        graph = _graph(symbol, a, b)
        if symbol == "*" and graph.number(1.0) is None:  # a constant of the program, in one node
            for tensor, other in ((a, b), (b, a)):
                if isinstance(tensor, Tensor) and not isinstance(other, Tensor):
                    return scale(tensor, _number(other))
        if symbol == "/" and not isinstance(b, Tensor) and not _number(b):
            raise ZeroDivisionError(f"{_named(a)} / 0")
        a, b = _tensor(a, b), _tensor(b, a)
        try:
            shape = np.broadcast_shapes(a.shape, b.shape)
        except ValueError:
            raise OperandError(symbol, a, b, "shapes that do not broadcast") from None
        if commutes and a.shape != shape:
            a, b = b, a
        fits = b.shape == shape[len(shape) - len(b.shape) :] or b.size == 1  # what the op broadcasts by itself
        return op(a if a.shape == shape else broadcast(a, shape), b if fits else broadcast(b, shape))

    return apply


def _tensor(operand: Any, other: Any) -> Tensor:
    """An operand, or the number that it is as a tensor of one element in the graph of the other."""
    if isinstance(operand, Tensor):
        return operand
    held = other.graph.number(_number(operand))
    return held if held is not None else fill(other, _number(operand))


def _product(a: Any, b: Any) -> Tensor:
    """NumPy's matmul for a of any number of axes and b of one or two."""
    _graph("@", a, b)
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        raise OperandError("@", a, b, "a matmul is of two tensors")
    if len(b.shape) > MATRIX:
        raise OperandError("@", a, b, "the right side has more than two axes")
    if a.shape[-1] != b.shape[0]:
        raise OperandError("@", a, b, "inner lengths differ")
    left = reshape(a, (1, *a.shape)) if len(a.shape) == 1 else a
    right = reshape(b, (*b.shape, 1)) if len(b.shape) == 1 else b
    made = matmul(left, right)
    shape = (*a.shape[:-1], *b.shape[1:]) or (1,)
    return made if made.shape == shape else reshape(made, shape)


def _index(x: Tensor, key: Any) -> Tensor:
    """x[key] for integers, slices, `...` and None; as in NumPy, but that a single element has shape [1]."""
    keys = _whole_key(x, key if isinstance(key, tuple) else (key,))
    starts: list[int] = []
    steps: list[int] = []
    lengths: list[int] = []
    shape: list[int] = []
    axis = 0
    for item in keys:
        if item is None:
            shape.append(1)
            continue
        length = x.shape[axis]
        if isinstance(item, slice):
            kept = range(*item.indices(length))
            if not kept:
                raise IndexError(f"{x!r}: {_slice_text(item)} of axis {axis} holds no element")
            start, step, n = kept.start, kept.step if len(kept) > 1 else 1, len(kept)
            shape.append(n)
        else:
            if not -length <= item < length:
                raise IndexError(f"{x!r}: index {item} is outside of axis {axis}")
            start, step, n = int(item) % length, 1, 1
        starts.append(start)
        steps.append(step)
        lengths.append(n)
        axis += 1
    whole = tuple(lengths) == x.shape and all(step == 1 for step in steps)
    taken = x if whole else part(x, starts, steps, lengths)
    wanted = tuple(shape) or (1,)
    return taken if taken.shape == wanted else reshape(taken, wanted)


def _whole_key(x: Tensor, keys: tuple[Any, ...]) -> list[Any]:
    """A key with an entry for every axis of x."""
    for item in keys:
        plain = item is None or isinstance(item, (slice, EllipsisType))
        if not plain and (isinstance(item, (bool, np.bool_)) or not isinstance(item, numbers.Integral)):
            raise TypeError(f"{x!r}[{_named(item)}]: an index is made of integers, slices, ... and None")
    given = len([item for item in keys if item is not None and item is not ...])
    if given > len(x.shape) or len([item for item in keys if item is ...]) > 1:
        raise IndexError(f"{x!r}: too many indices, of {given} axes")
    rest = [slice(None)] * (len(x.shape) - given)
    place = next((at for at, item in enumerate(keys) if item is ...), len(keys))
    return [*keys[:place], *rest, *keys[place + 1 :]]


def _slice_text(item: slice) -> str:
    return ":".join("" if value is None else str(value) for value in (item.start, item.stop, item.step))


def _over(x: Tensor, axis: Axes, keepdims: bool) -> tuple[Shape, Shape, int]:
    """Shapes of a reduction over axes with them kept and as asked for, and how many elements each of its sums has."""
    axes = tuple(range(len(x.shape))) if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    if not all(-len(x.shape) <= a < len(x.shape) for a in axes):
        raise IndexError(f"{x!r}: there is no axis {axis}")
    gone = {a % len(x.shape) for a in axes}
    kept = tuple(1 if d in gone else n for d, n in enumerate(x.shape))
    shape = kept if keepdims else tuple(n for d, n in enumerate(x.shape) if d not in gone) or (1,)
    return kept, shape, math.prod(x.shape[d] for d in gone)


def _sum(x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
    if axis is None and not keepdims:
        return sum(x)
    kept, shape, _ = _over(x, axis, keepdims)
    total = sum_to(x, kept)
    return total if total.shape == shape else reshape(total, shape)


def _mean(x: Tensor, axis: Axes = None, keepdims: bool = False) -> Tensor:
    if axis is None and not keepdims:
        return mean(x)
    return scale(_sum(x, axis, keepdims), 1 / _over(x, axis, keepdims)[2])


OPERATORS.update(
    add=_elementwise("+", add, True),
    sub=_elementwise("-", sub, False),
    mul=_elementwise("*", mul, True),
    div=_elementwise("/", div, False),
    matmul=_product,
    neg=lambda x: _elementwise("*", mul, True)(x, -1.0),
    transpose=lambda x: x if len(x.shape) == 1 else transpose(x),
    index=_index,
    sum=_sum,
    mean=_mean,
)
