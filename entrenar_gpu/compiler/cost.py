"""Predicted time of a node, for choices between arithmetic and memory.

A node takes as long as its arithmetic or its traffic, whichever is longer, then the traffic of its workspace, which one
launch writes and the next reads, and its launches, for which the tensors of its workspace stand. Only ratios decide, so
every device is priced as the one that was measured, an NVIDIA H200 (docs/memory.md has the figures): predicted seconds
are not for the clock elsewhere.
"""

from __future__ import annotations

import math

from entrenar_gpu.dtypes import ELEMENT_BYTES
from entrenar_gpu.graph import Caps, Node, Tensor
from entrenar_gpu.ops.gemm.tiles import matrices_of
from entrenar_gpu.ops.half import half_bytes
from entrenar_gpu.ops.registry import OPS

# Of large products as their ops run, operands narrowed and all. The rates in tiles.py are of full waves of tiles alone:
# they choose tiles, and with them the order of sums, so that they do not follow these.
FLOPS_PER_SECOND = {"f32": 38e12, "f16": 59e12, "int8": 80e12, "int8_rows": 300e12}
ATTENTION_FLOPS_PER_SECOND = 25e12
MATRIX_FLOPS_PER_SECOND, MATRIX_ATTENTION_FLOPS_PER_SECOND = 200e12, 70e12  # where f16 has matrix units
BYTES_PER_SECOND = 2e12  # of elementwise kernels
LAUNCH_SECONDS = 5e-6  # a dispatch, host and device


def seconds(node: Node, caps: Caps) -> float:
    """What one run of the node is expected to take."""
    op = OPS[node.op]
    arithmetic = op.flops(node) / _pace(node, matrices_of(caps) is not None)
    workspace = [math.prod(shape) * ELEMENT_BYTES[dtype] for shape, dtype in op.workspace(node, caps)]
    traffic = sum(t.nbytes for t in (*node.inputs.values(), *node.outputs)) / BYTES_PER_SECOND
    return max(arithmetic, traffic) + 2 * sum(workspace) / BYTES_PER_SECOND + LAUNCH_SECONDS * (1 + len(workspace))


def _pace(node: Node, matrices: bool) -> float:
    """FLOP/s of a node's products, on matrix units where there are some and its operands are f16."""
    if node.op.startswith("attention"):
        on_matrices = matrices and node.attrs.get("low_precision")
        return MATRIX_ATTENTION_FLOPS_PER_SECOND if on_matrices else ATTENTION_FLOPS_PER_SECOND
    arithmetic = node.attrs.get("arithmetic", "f32")
    return MATRIX_FLOPS_PER_SECOND if matrices and arithmetic == "f16" else FLOPS_PER_SECOND[arithmetic]


def half_seconds(tensor: Tensor) -> float:
    """What it takes to halve a tensor and to widen it again."""
    return 2 * (LAUNCH_SECONDS + (tensor.nbytes + half_bytes(tensor)) / BYTES_PER_SECOND)
