"""Models written for others to read."""

from entrenar_gpu.export.convert import export_model
from entrenar_gpu.export.hf_writer import SHARD_BYTES, carried_sources, copy_model_files, name_to_write, save_checkpoint
from entrenar_gpu.export.merge import merge_adapter, merge_model
from entrenar_gpu.export.quantize import quantize_model

__all__ = [
    "SHARD_BYTES",
    "carried_sources",
    "copy_model_files",
    "export_model",
    "merge_adapter",
    "merge_model",
    "name_to_write",
    "quantize_model",
    "save_checkpoint",
]
