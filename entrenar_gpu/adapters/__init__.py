"""LoRA adapters: which modules get one, how they start, and their files in PEFT's layout."""

from entrenar_gpu.adapters.init import init_adapter
from entrenar_gpu.adapters.lora import AdapterSpec
from entrenar_gpu.adapters.peft_files import WEIGHTS_FILE, load_adapter, save_adapter

__all__ = ["WEIGHTS_FILE", "AdapterSpec", "init_adapter", "load_adapter", "save_adapter"]
