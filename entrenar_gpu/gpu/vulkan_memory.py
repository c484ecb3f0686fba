"""Memory of a GPU as its Vulkan driver tells it, asked through the loader directly: WebGPU hands no sizes on.

For the cards that the system says nothing of: Intel's, AMD's on Windows, and what is integrated there. How much is free
comes from VK_EXT_memory_budget, where a driver has it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from ctypes import POINTER, Structure, byref, c_char, c_char_p, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

_DEVICE_LOCAL = 1  # VK_MEMORY_HEAP_DEVICE_LOCAL_BIT
_VERSION = 1 << 22 | 1 << 12  # 1.1, the first whose memory properties can be extended
_BUDGET = b"VK_EXT_memory_budget"
_PROPERTIES_BYTES = 4096  # more than VkPhysicalDeviceProperties, of which only the first five words are read


@dataclass(frozen=True)
class Heap:
    """The largest heap of a GPU's own memory: its bytes and, where the driver tells, how many are free."""

    nbytes: int
    free: int | None


class _ApplicationInfo(Structure):
    _fields_ = (
        ("type", c_uint32),
        ("next", c_void_p),
        ("application", c_char_p),
        ("application_version", c_uint32),
        ("engine", c_char_p),
        ("engine_version", c_uint32),
        ("api_version", c_uint32),
    )


class _InstanceCreateInfo(Structure):
    _fields_ = (
        ("type", c_uint32),
        ("next", c_void_p),
        ("flags", c_uint32),
        ("application", POINTER(_ApplicationInfo)),
        ("layer_count", c_uint32),
        ("layers", c_void_p),
        ("extension_count", c_uint32),
        ("extensions", c_void_p),
    )


class _Extension(Structure):
    _fields_ = (("name", c_char * 256), ("version", c_uint32))


class _MemoryType(Structure):
    _fields_ = (("flags", c_uint32), ("heap", c_uint32))


class _MemoryHeap(Structure):
    _fields_ = (("size", c_uint64), ("flags", c_uint32))


class _MemoryProperties(Structure):
    _fields_ = (
        ("type", c_uint32),
        ("next", c_void_p),
        ("type_count", c_uint32),
        ("types", _MemoryType * 32),
        ("heap_count", c_uint32),
        ("heaps", _MemoryHeap * 16),
    )


class _MemoryBudget(Structure):
    _fields_ = (("type", c_uint32), ("next", c_void_p), ("budget", c_uint64 * 16), ("usage", c_uint64 * 16))


def heap_of(vendor_id: int, device_id: int) -> Heap | None:
    """The heap of the first GPU of this PCI vendor and device; None where there is no loader, or no such GPU."""
    vulkan = _loader()
    if vulkan is None:
        return None
    application = _ApplicationInfo(type=0, api_version=_VERSION)
    info, instance = _InstanceCreateInfo(type=1, application=ctypes.pointer(application)), c_void_p()
    if vulkan.vkCreateInstance(byref(info), None, byref(instance)):
        return None
    try:
        for gpu in _gpus(vulkan, instance):
            if _ids(vulkan, gpu) == (vendor_id, device_id):
                return _largest_heap(vulkan, gpu)
        return None
    finally:
        vulkan.vkDestroyInstance(instance, None)


def _loader() -> Any:
    """The Vulkan loader, or None."""
    try:
        return ctypes.CDLL("vulkan-1.dll" if sys.platform == "win32" else "libvulkan.so.1")
    except OSError:
        return None


def _gpus(vulkan: Any, instance: c_void_p) -> Iterator[c_void_p]:
    count = c_uint32()
    if vulkan.vkEnumeratePhysicalDevices(instance, byref(count), None):
        return
    handles = (c_void_p * count.value)()
    vulkan.vkEnumeratePhysicalDevices(instance, byref(count), handles)
    yield from (c_void_p(handle) for handle in handles)


def _ids(vulkan: Any, gpu: c_void_p) -> tuple[int, int] | None:
    """PCI vendor and device; None of a driver whose memory cannot be asked for."""
    words = (c_uint32 * (_PROPERTIES_BYTES // 4))()
    vulkan.vkGetPhysicalDeviceProperties(gpu, words)
    version, _, vendor, device = words[:4]
    return (vendor, device) if version >= _VERSION else None


def _largest_heap(vulkan: Any, gpu: c_void_p) -> Heap | None:
    told = _has_budget(vulkan, gpu)
    budget = _MemoryBudget(type=1000237000)
    memory = _MemoryProperties(type=1000059006, next=ctypes.addressof(budget) if told else None)
    vulkan.vkGetPhysicalDeviceMemoryProperties2(gpu, byref(memory))
    own = [i for i in range(min(memory.heap_count, 16)) if memory.heaps[i].flags & _DEVICE_LOCAL]
    if not own:
        return None
    largest = max(own, key=lambda i: int(memory.heaps[i].size))
    # The budget is what the process may hold, with what it holds already.
    free = max(int(budget.budget[largest]) - int(budget.usage[largest]), 0) if told else None
    return Heap(int(memory.heaps[largest].size), free)


def _has_budget(vulkan: Any, gpu: c_void_p) -> bool:
    count = c_uint32()
    if vulkan.vkEnumerateDeviceExtensionProperties(gpu, None, byref(count), None):
        return False
    found = (_Extension * count.value)()
    vulkan.vkEnumerateDeviceExtensionProperties(gpu, None, byref(count), found)
    return any(extension.name == _BUDGET for extension in found)
