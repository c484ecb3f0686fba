"""Products in int8 on matrix units, their builtins emulated in plain WGSL; and their operands, which any device can make.

Codes and sums are exact, so the bar is that of the scaling and of what is added in f32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from entrenar_gpu import ops
from entrenar_gpu.compiler.plan import make_plan
from entrenar_gpu.gpu.kernel import KernelCache
from entrenar_gpu.gpu.replay import Replay
from entrenar_gpu.graph.caps import Caps, MatrixConfig
from entrenar_gpu.graph.tensor import Graph
from entrenar_gpu.ops.gemm.launches import Block, Matmul, matmul_launches, partial_shapes, whole
from entrenar_gpu.ops.gemm.low_precision import low_precision_weight
from entrenar_gpu.ops.gemm.rotated import quantize_rotated, rotated, rotated_arrays, rotated_rows_launch
from entrenar_gpu.ops.gemm.tiles import (
    Choice,
    MatrixTile,
    arithmetic_on,
    choose,
    from_numbers,
    is_choice,
    key,
    matrix_tiles,
    to_numbers,
)
from entrenar_gpu.ops.quantize import Nf4Tensors, host_parts
from entrenar_gpu.quant import nf4
from tests.helpers.equivalence import fault
from tests.ops import test_matrix_units as f16
from tests.ops.test_low_precision import Layer
from tests.ops.test_matrix_units import with_rounded_adapter

# What drivers report beside their matrices of f16.
NVIDIA = (f16.NVIDIA, MatrixConfig("i8", "i32", 16, 16, 32, 32, 32))
AMD = (f16.AMD, MatrixConfig("i8", "i32", 16, 16, 16, 32, 64))
INTEL = (f16.INTEL, MatrixConfig("i8", "i32", 8, 16, 32, 8, 32))
BAR = 1e-6


def caps_with(device: Any, configs: tuple[MatrixConfig, ...]) -> Caps:
    # Not of a software adapter, so that tiles are those of a card; f16 is not needed to emulate, but planned for.
    return replace(device.caps, matrices=configs, f16=True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("configs", "shape"),
    [
        (NVIDIA, (70, 128, 64, 8)),
        (INTEL, (70, 128, 64, 8)),
        (NVIDIA, (64, 192, 128, 16)),
        (NVIDIA, (65, 64, 128, 40)),
        (INTEL, (64, 64, 64, 4)),
    ],
    ids=["edges", "8x16x32, edges", "whole", "rank 40", "8x16x32, rank 4"],
)
def test_layers_are_those_of_codes(device: Any, emulated: KernelCache, configs: Any, shape: Any) -> None:
    """Forward and backward: an adapter, a bias, a residual in place, both layouts of the weight."""
    layer = Layer(shape, "int8_rows")
    got, want = layer.on_device(device, emulated, caps_with(device, configs)), with_rounded_adapter(layer)
    for name, values in want.items():
        error = np.linalg.norm(got[name] - values) / np.linalg.norm(values)
        # A P that differs from NumPy's in its last bit may be rounded the other way.
        assert error < (2e-5 if name in ("y", "dx") else BAR), name
