"""Models written for others to read."""

from entrenar_gpu.export.hf_writer import SHARD_BYTES, copy_model_files, save_checkpoint
from entrenar_gpu.export.merge import merge_adapter

__all__ = [
    "SHARD_BYTES",
    "copy_model_files",
    "merge_adapter",
    "save_checkpoint",
]
