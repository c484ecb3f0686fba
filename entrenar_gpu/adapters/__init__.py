"""Adapters: which modules get one, how they start, and their files in PEFT's layout; a folder for each method."""

from entrenar_gpu.adapters.lora import LoraModule
from entrenar_gpu.adapters.mlx_files import save_mlx_adapter
from entrenar_gpu.adapters.peft_files import WEIGHTS_FILE, load_adapter, name_in_file, save_adapter
from entrenar_gpu.adapters.selection import trained_weights
from entrenar_gpu.adapters.spec import (
    PEFT_PREFIX,
    AdapterSpec,
    adapted,
    adapter_spec,
    init_adapter,
    refuse_other_adapter,
)
from entrenar_gpu.adapters.trained_base import RUN_FILE, trained_base

__all__ = [
    "PEFT_PREFIX",
    "RUN_FILE",
    "WEIGHTS_FILE",
    "AdapterSpec",
    "LoraModule",
    "adapted",
    "adapter_spec",
    "init_adapter",
    "load_adapter",
    "name_in_file",
    "refuse_other_adapter",
    "save_adapter",
    "save_mlx_adapter",
    "trained_base",
    "trained_weights",
]
