"""Files that appear whole or not at all; JSON and safetensors."""

from entrenar_gpu.files.atomic import (
    cache_folder,
    cannot_write,
    new_file,
    new_folder,
    remove,
    sweep,
    sync_folder,
    temporary_path,
    write_text,
)
from entrenar_gpu.files.checksums import WHOLE, checksums_of, checksums_of_writes
from entrenar_gpu.files.json_file import read_json, read_json_object, read_text
from entrenar_gpu.files.lock import FolderLock, turn
from entrenar_gpu.files.safetensors_file import SafetensorsFile, TensorInfo
from entrenar_gpu.files.stored import StoredArray
from entrenar_gpu.files.streamed_checksum import StreamedChecksum
from entrenar_gpu.files.tensor_source import TensorSource, save_safetensors, write_tensors

__all__ = [
    "WHOLE",
    "FolderLock",
    "SafetensorsFile",
    "StoredArray",
    "StreamedChecksum",
    "TensorInfo",
    "TensorSource",
    "cache_folder",
    "cannot_write",
    "checksums_of",
    "checksums_of_writes",
    "new_file",
    "new_folder",
    "read_json",
    "read_json_object",
    "read_text",
    "remove",
    "save_safetensors",
    "sweep",
    "sync_folder",
    "temporary_path",
    "turn",
    "write_tensors",
    "write_text",
]
