"""What runs a graph without a GPU."""

from entrenar_gpu.executors.numpy_executor import NumpyExecutor

__all__ = [
    "NumpyExecutor",
]
