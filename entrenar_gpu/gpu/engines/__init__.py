"""WebGPU libraries behind one door: wgpu-native, and Dawn where it is installed."""

import functools
from collections.abc import Callable

from entrenar_gpu.gpu.engines.base import Command, Engine
from entrenar_gpu.gpu.engines.dawn import Dawn, installed_version
from entrenar_gpu.gpu.engines.wgpu_native import WgpuNative

__all__ = ["ENGINES", "Command", "Dawn", "Engine", "WgpuNative", "engine", "installed_version"]

ENGINES: dict[str, Callable[[], Engine]] = {"wgpu": WgpuNative, "dawn": Dawn}


@functools.cache
def engine(name: str) -> Engine:
    """The engine of that name, loaded once. Raises UserError where it is not installed."""
    return ENGINES[name]()
