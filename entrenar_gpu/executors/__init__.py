"""What runs a graph without a GPU."""

from entrenar_gpu.executors.numpy_executor import NumpyExecutor, run_node

__all__ = [
    "NumpyExecutor",
    "run_node",
]
