"""Memory that the Vulkan loader tells of: a made-up loader with two GPUs, and the real one where a GPU is Vulkan's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from entrenar_gpu.gpu import choice, vulkan_memory
from entrenar_gpu.gpu.vulkan_memory import Heap, heap_of

GIB = 1 << 30
ARC = (0x8086, 0x56A0)


class Loader:
    """Vulkan with a card of 12 GiB behind another one, 8 of them free, and 64 GiB of the system's memory."""

    def __init__(self, budget: bool = True, version: int = 1 << 22 | 3 << 12) -> None:
        self.budget, self.version, self.instances = budget, version, 0

    def vkCreateInstance(self, info: Any, allocator: None, instance: Any) -> int:
        assert info._obj.type == 1
        assert info._obj.application.contents.api_version == 1 << 22 | 1 << 12
        self.instances += 1
        instance._obj.value = 7
        return 0

    def vkDestroyInstance(self, instance: Any, allocator: None) -> None:
        self.instances -= instance.value == 7

    def vkEnumeratePhysicalDevices(self, instance: Any, count: Any, handles: Any) -> int:
        count._obj.value = 2
        if handles is not None:
            handles[0], handles[1] = 100, 101
        return 0

    def vkGetPhysicalDeviceProperties(self, gpu: Any, words: Any) -> None:
        words[0], words[2], words[3] = self.version, ARC[0], ARC[1] + 101 - gpu.value

    def vkEnumerateDeviceExtensionProperties(self, gpu: Any, layer: None, count: Any, found: Any) -> int:
        count._obj.value = 2
        if found is not None:
            found[0].name = b"VK_KHR_maintenance1"
            found[1].name = b"VK_EXT_memory_budget" if self.budget else b"VK_KHR_maintenance2"
        return 0

    def vkGetPhysicalDeviceMemoryProperties2(self, gpu: Any, memory: Any) -> None:
        properties = memory._obj
        properties.heap_count = 3
        for heap, (size, flags) in zip(properties.heaps, [(64, 0), (12, 1), (1, 3)], strict=False):
            heap.size, heap.flags = size * GIB, flags
        assert bool(properties.next) == self.budget
        if properties.next:
            budget = vulkan_memory._MemoryBudget.from_address(properties.next)
            assert budget.type == 1000237000
            budget.budget[1], budget.usage[1] = 11 * GIB, 3 * GIB


@pytest.mark.parametrize(
    ("loader", "gpu", "heap"),
    [
        (Loader(), ARC, Heap(12 * GIB, 8 * GIB)),
        (Loader(budget=False), ARC, Heap(12 * GIB, None)),
        (Loader(), (0x1002, 1), None),
        (Loader(version=1 << 22), ARC, None),
        (None, ARC, None),
    ],
    ids=["with a budget", "without", "another card", "a driver of 1.0", "no loader"],
)
def test_the_largest_heap_of_a_card_s_own(
    loader: Loader | None, gpu: tuple[int, int], heap: Heap | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vulkan_memory, "_loader", lambda: loader)
    assert heap_of(*gpu) == heap
    assert loader is None or loader.instances == 0


@pytest.mark.parametrize(
    ("kind", "told", "expected"),
    [
        ("DiscreteGPU", (None, None), (12 * GIB, 8 * GIB)),
        ("DiscreteGPU", (10 * GIB, 9 * GIB), (10 * GIB, 9 * GIB)),
        ("IntegratedGPU", (None, None), (12 * GIB, None)),
        ("CPU", (5 * GIB, None), (5 * GIB, None)),
    ],
    ids=["a card", "the system tells", "integrated", "software"],
)
def test_it_is_asked_where_the_system_tells_nothing(
    kind: str, told: tuple[Any, Any], expected: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vulkan_memory, "_loader", Loader)
    monkeypatch.setattr(choice, "memory_bytes", lambda info: told[0])
    monkeypatch.setattr(choice, "free_bytes", lambda info: told[1])
    info = {"adapter_type": kind, "vendor_id": ARC[0], "device_id": ARC[1]}
    gpu = SimpleNamespace(info=info, adapter=None, engine=SimpleNamespace(heap_bytes=lambda adapter: None))
    assert choice._memory_of(gpu) == expected  # type: ignore[arg-type]


@pytest.mark.gpu
def test_the_real_loader(device: Any) -> None:
    """Of drivers of several GPUs of one kind it tells the first's; what is told is no more than there is."""
    if device.info["backend_type"] != "Vulkan":
        pytest.skip("not a GPU of Vulkan's")
    heap = heap_of(device.info["vendor_id"], device.info["device_id"])
    assert heap is not None
    assert heap.nbytes > 1 << 28
    assert heap.free is None or 0 < heap.free <= heap.nbytes
