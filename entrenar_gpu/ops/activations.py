"""Activations and the gates of feed-forward layers: value and derivative as WGSL, and as NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from entrenar_gpu.graph import Caps, Launch, Node, Tensor, literal
from entrenar_gpu.ops.elementwise import elementwise_launch, first_as_large
from entrenar_gpu.ops.registry import GradientContext, Gradients, Op, Placement, record, register, same_as


def _erf_source() -> str:
    """erf, which WGSL lacks. Below 1 its Maclaurin series, cut where the next term is under 2e-9; above, one minus
    the Chebyshev fit of erfc in Press et al., Numerical Recipes, 2nd ed., 6.2 (fractional error below 1.2e-7)."""
    series = [2 / math.sqrt(math.pi) * (-1) ** n / (math.factorial(n) * (2 * n + 1)) for n in range(11)]
    fit = [-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587]
    fit += [-0.82215223, 0.17087277]

    def horner(coefficients: list[float], variable: str) -> str:
        text = literal(coefficients[-1])
        for c in reversed(coefficients[:-1]):
            text = f"fma({text}, {variable}, {literal(c)})"
        return text

    return f"""
fn erf(x: f32) -> f32 {{
  let y = abs(x);
  let s = x * x;
  if (y < 1.0) {{ return x * {horner(series, "s")}; }}
  let t = 1.0 / (1.0 + 0.5 * y);
  return sign(x) * (1.0 - t * exp({horner(fit, "t")} - s));
}}
"""


_ROOT_HALF, _DENSITY = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)
_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715  # Hendrycks & Gimpel, arXiv 1606.08415
# tanh overflows to NaN on some drivers for large arguments
_BENT = f"{_TANH_SCALE!r} * (x + {_TANH_CUBE!r} * x * x * x)"
_TANH = f"fn bend(x: f32) -> f32 {{ return tanh(clamp({_BENT}, -20.0, 20.0)); }}"
_SIGMOID = "fn sigmoid(x: f32) -> f32 { return 1.0 / (1.0 + exp(-clamp(x, -80.0, 80.0))); }"


def _gelu_of(x: str) -> str:
    return f"0.5 * {x} * (1.0 + erf({x} * {_ROOT_HALF!r}))"


def _gelu_slope_of(x: str) -> str:
    return f"0.5 * (1.0 + erf({x} * {_ROOT_HALF!r})) + {x} * {_DENSITY!r} * exp(-0.5 * {x} * {x})"


def _gelu_tanh_of(x: str) -> str:
    return f"0.5 * {x} * (1.0 + bend({x}))"


def _gelu_tanh_slope_of(x: str) -> str:
    slope = f"{_TANH_SCALE!r} * (1.0 + {3 * _TANH_CUBE!r} * {x} * {x})"
    return f"0.5 * (1.0 + bend({x})) + 0.5 * {x} * (1.0 - bend({x}) * bend({x})) * {slope}"


def np_erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf, otypes=[x.dtype])(x) if x.size else x


def np_sigmoid(x: np.ndarray) -> np.ndarray:
    half = x.dtype.type(0.5)
    return half * (1 + np.tanh(half * x))


def _np_bend(x: np.ndarray) -> np.ndarray:
    return np.tanh(x.dtype.type(_TANH_SCALE) * (x + x.dtype.type(_TANH_CUBE) * x**3))


def _np_gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + np_erf(x * x.dtype.type(_ROOT_HALF))) / 2


def _np_gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x * (1 + _np_bend(x)) / 2


def _np_gelu_slope(x: np.ndarray) -> np.ndarray:
    density = x.dtype.type(_DENSITY) * np.exp(-x * x / 2)
    return (1 + np_erf(x * x.dtype.type(_ROOT_HALF))) / 2 + x * density


def _np_gelu_tanh_slope(x: np.ndarray) -> np.ndarray:
    t, kind = _np_bend(x), x.dtype.type
    inner = kind(_TANH_SCALE) * (1 + kind(3 * _TANH_CUBE) * x * x)
    return (1 + t) / 2 + x * (1 - t * t) * inner / 2


def _activation(
    name: str, value: str, slope: str, functions: str, np_value: Callable[..., Any], np_slope: Callable[..., Any]
) -> Callable[[Tensor], Tensor]:
    """Register y = f(x) and its gradient dx = dy f'(x) as two ops; returns the function that records the first."""

    def forward(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
        return elementwise_launch(node, caps, placed, [value], functions)

    def backward(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
        return elementwise_launch(node, caps, placed, [f"dy * ({slope})"], functions)

    def gradient(node: Node, upstream: Sequence[Any], context: GradientContext) -> Gradients:
        return {"x": record(f"{name}_grad", x=node.inputs["x"], dy=upstream[0])[0]}

    def np_gradient(node: Node, x: np.ndarray, dy: np.ndarray) -> Sequence[np.ndarray]:
        return [(dy * np_slope(x)).astype(x.dtype, copy=False)]

    def np_forward(node: Node, x: np.ndarray) -> Sequence[np.ndarray]:
        return [np_value(x).astype(x.dtype, copy=False)]

    register(Op(name, same_as("x"), np_forward, forward, gradient, inplace=first_as_large))
    register(Op(f"{name}_grad", same_as("x"), np_gradient, backward, inplace=first_as_large))
    return lambda x: record(name, x=x)[0]


relu = _activation(
    "relu",
    "max(x, 0.0)",
    "select(0.0, 1.0, x > 0.0)",
    "",
    lambda x: np.maximum(x, 0),
    lambda x: (x > 0).astype(x.dtype),
)
relu_squared = _activation(  # So et al., arXiv 2109.08668
    "relu_squared",
    "max(x, 0.0) * max(x, 0.0)",
    "2.0 * max(x, 0.0)",
    "",
    lambda x: np.maximum(x, 0) ** 2,
    lambda x: 2 * np.maximum(x, 0),
)
gelu = _activation("gelu", _gelu_of("x"), _gelu_slope_of("x"), _erf_source(), _np_gelu, _np_gelu_slope)
gelu_tanh = _activation(
    "gelu_tanh", _gelu_tanh_of("x"), _gelu_tanh_slope_of("x"), _TANH, _np_gelu_tanh, _np_gelu_tanh_slope
)
swish = _activation(
    "swish",
    "x * sigmoid(x)",
    "sigmoid(x) * (1.0 + x * (1.0 - sigmoid(x)))",
    _SIGMOID,
    lambda x: x * np_sigmoid(x),
    lambda x: np_sigmoid(x) * (1 + x * (1 - np_sigmoid(x))),
)


# By the op's name: WGSL functions that a gate needs, and f(a).
GATES: dict[str, tuple[str, str]] = {}


def _gated(
    name: str, value: str, slope: str, functions: str, np_value: Callable[..., Any], np_gradient: Callable[..., Any]
) -> Callable[[Tensor, Tensor], Tensor]:
    """Register f(gate) * up and its two gradients as ops; returns the function that records the first.

    `value` and `slope` are f and f' as WGSL over `a`, `np_value` is f, and `np_gradient` has both gradients.
    """

    def forward(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
        return elementwise_launch(node, caps, placed, [f"{value} * b"], functions, "ab")

    def backward(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
        return elementwise_launch(node, caps, placed, [f"c * b * {slope}", f"c * {value}"], functions, "abc")

    def gradient(node: Node, upstream: Sequence[Any], context: GradientContext) -> Gradients:
        dgate, dup = record(f"{name}_grad", **node.inputs, dy=upstream[0])
        return {"gate": dgate, "up": dup}

    def np_forward(node: Node, gate: np.ndarray, up: np.ndarray) -> Sequence[np.ndarray]:
        return [np_value(gate) * up]

    GATES[name] = (functions, value)
    register(Op(name, same_as("gate"), np_forward, forward, gradient, inplace=first_as_large))
    register(
        Op(
            f"{name}_grad",
            same_as("gate", "up"),
            lambda node, gate, up, dy: np_gradient(gate, up, dy),
            backward,
            inplace=lambda node: [(0, "gate"), (1, "up")],
        )
    )
    return lambda gate, up: record(name, gate=gate, up=up)[0]


def _np_swiglu_gradient(gate: np.ndarray, up: np.ndarray, dy: np.ndarray) -> Sequence[np.ndarray]:
    s = np_sigmoid(gate)
    return [dy * up * s * (1 + gate * (1 - s)), dy * gate * s]


# The feed-forward gates of Shazeer (arXiv 2002.05202): f(gate) * up with f the swish, or GELU, exact or by tanh.
swiglu = _gated(
    "swiglu",
    "a * sigmoid(a)",
    "sigmoid(a) * (1.0 + a * (1.0 - sigmoid(a)))",
    _SIGMOID,
    lambda gate: gate * np_sigmoid(gate),
    _np_swiglu_gradient,
)
geglu = _gated(
    "geglu",
    _gelu_of("a"),
    f"({_gelu_slope_of('a')})",
    _erf_source(),
    _np_gelu,
    lambda gate, up, dy: [dy * up * _np_gelu_slope(gate), dy * _np_gelu(gate)],
)
geglu_tanh = _gated(
    "geglu_tanh",
    _gelu_tanh_of("a"),
    f"({_gelu_tanh_slope_of('a')})",
    _TANH,
    _np_gelu_tanh,
    lambda gate, up, dy: [dy * up * _np_gelu_tanh_slope(gate), dy * _np_gelu_tanh(gate)],
)
