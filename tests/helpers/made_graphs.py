"""Random graphs whose tensors are shared, dropped and reused in every way the planner and autodiff must cope with."""

from __future__ import annotations

import numpy as np

from entrenar_gpu import ops
from entrenar_gpu.compiler.autodiff import backward
from entrenar_gpu.graph.tensor import Graph, Tensor

SIDE = 6


def random_graph(rng: np.random.Generator, length: int, differentiate: bool) -> Graph:
    """About `length` ops on tensors [rows, SIDE] of a few heights, any of which may be read by any number of others."""
    graph = Graph("random")
    square = [graph.parameter("w0", (SIDE, SIDE)), graph.parameter("w1", (SIDE, SIDE))]
    vector = graph.parameter("norm", (SIDE,))
    pool = [graph.tensor(f"x{rows}", (rows, SIDE), requires_grad=True) for rows in (1, 5, 5, 9)]

    def pick() -> Tensor:
        return pool[-1 - min(int(rng.exponential(2.0)), len(pool) - 1)]

    for _ in range(length):
        a = pick()
        alike = [t for t in pool if t.shape == a.shape]
        b = alike[rng.integers(len(alike))]
        weight = square[rng.integers(2)]
        made = [
            lambda a=a, b=b: ops.add(a, b),
            lambda a=a, b=b: ops.sub(a, b),
            lambda a=a, b=b: ops.mul(a, b),
            lambda a=a: ops.scale(a, 0.7),
            lambda a=a: ops.swish(a),
            lambda a=a: ops.softmax(a),
            lambda a=a: ops.rms_norm(a, vector, 1e-2),
            lambda a=a, b=b: ops.swiglu(a, b),
            lambda a=a, w=weight: ops.matmul(a, w),
            lambda a=a, w=weight: ops.matmul(a, w, transpose_b=True, alpha=0.5),
            lambda a=a, b=b, w=weight: ops.matmul(a, w, residual=b),
            lambda a=a, v=square: ops.matmul(a, ops.add(v[0], v[1])),
        ]
        pool.append(made[rng.integers(len(made))]())
    if differentiate:
        loss = ops.sum(pool[-1])
        backward(loss, [t for t in graph.persistents.values() if t.requires_grad])
    return graph
