"""NF4 on the host: the exact arithmetic that the shaders repeat."""

from entrenar_gpu.quant.nf4 import BLOCK, CODEBOOK, SCALE_BLOCK, Bytes, Floats, Nf4Weight, StateDtype

__all__ = ["BLOCK", "CODEBOOK", "SCALE_BLOCK", "Bytes", "Floats", "Nf4Weight", "StateDtype"]
