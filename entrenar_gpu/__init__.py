"""Fine-tune language models on any Vulkan, Metal or DX12 GPU: QLoRA through WGSL."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("entrenar-gpu")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+checkout"
