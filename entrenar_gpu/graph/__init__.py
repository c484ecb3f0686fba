"""The traced program as data: tensors, nodes, graphs, what a device can do, and what a node turns into."""

from entrenar_gpu.graph.caps import Caps, MatrixConfig, Target
from entrenar_gpu.graph.launch import OFFSET_ALIGNMENT, Binding, Launch, grid_of, literal, reads, split_offset, writes
from entrenar_gpu.graph.tensor import OPERATORS, Graph, Node, Tensor, flat, grouped

__all__ = [
    "OFFSET_ALIGNMENT",
    "OPERATORS",
    "Binding",
    "Caps",
    "Graph",
    "Launch",
    "MatrixConfig",
    "Node",
    "Target",
    "Tensor",
    "flat",
    "grid_of",
    "grouped",
    "literal",
    "reads",
    "split_offset",
    "writes",
]
