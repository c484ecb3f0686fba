"""Text from a model and its adapter."""

from entrenar_gpu.infer.decoder import Decoder
from entrenar_gpu.infer.generate import Generator

__all__ = [
    "Decoder",
    "Generator",
]
