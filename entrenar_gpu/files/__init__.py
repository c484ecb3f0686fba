"""Files that appear whole or not at all; JSON and safetensors."""

from entrenar_gpu.files.atomic import cache_folder, cannot_write, new_file, new_folder, write_text
from entrenar_gpu.files.json_file import read_json_object
from entrenar_gpu.files.safetensors_file import NAMES, SafetensorsFile, TensorInfo
from entrenar_gpu.files.stored import StoredArray
from entrenar_gpu.files.tensor_source import TensorSource, save_safetensors, write_tensors

__all__ = [
    "NAMES",
    "SafetensorsFile",
    "StoredArray",
    "TensorInfo",
    "TensorSource",
    "cache_folder",
    "cannot_write",
    "new_file",
    "new_folder",
    "read_json_object",
    "save_safetensors",
    "write_tensors",
    "write_text",
]
