"""What memory an adapter has, on made-up systems: discrete, integrated, AMD's integrated, and in control groups."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from entrenar_gpu.errors import UserError
from entrenar_gpu.gpu.choice import choose_gpu
from entrenar_gpu.gpu.memory_info import (
    DRIVER_ADDRESSES,
    addresses_left,
    available_bytes,
    free_bytes,
    memory_bytes,
)

GIB, MIB = 1 << 30, 1 << 20
AMD = {"device": "AMD Radeon Graphics (RADV)", "vendor_id": 0x1002, "device_id": 0x15BF}


@pytest.fixture(autouse=True)
def linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")


def write(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def meminfo(available: int) -> dict[str, object]:
    return {"proc/meminfo": f"MemTotal: {64 << 20} kB\nMemFree: 1 kB\nMemAvailable: {available >> 10} kB"}


def card(number: int, device: int, **figures: int) -> dict[str, object]:
    folder = f"sys/class/drm/card{number}/device"
    ids = {f"{folder}/vendor": "0x1002", f"{folder}/device": f"0x{device:04x}"}
    return ids | {f"{folder}/mem_info_{name}": value for name, value in figures.items()}


def adapter(kind: str, **info: Any) -> dict[str, Any]:
    return {"adapter_type": kind, **AMD, **info}


def test_a_card_s_own_memory_is_all_that_counts(tmp_path):
    root = write(
        tmp_path,
        meminfo(8 * GIB) | card(0, 0x744C, vram_total=24 * GIB, vram_used=3 * GIB, gtt_total=32 * GIB),
    )
    discrete = adapter("DiscreteGPU", device_id=0x744C)
    assert memory_bytes(discrete, root) == 24 * GIB
    assert free_bytes(discrete, root) == 21 * GIB


def test_an_integrated_adapter_has_the_system_s_memory(tmp_path):
    intel = {"adapter_type": "IntegratedGPU", "device": "Intel Arc", "vendor_id": 0x8086, "device_id": 1}
    root = write(tmp_path, meminfo(10 * GIB))
    assert memory_bytes(intel, root) == 10 * GIB
    assert free_bytes(intel, root) is None


@pytest.mark.parametrize(("available", "expected"), [(40 * GIB, 16 * GIB + 512 * MIB), (6 * GIB, 6 * GIB + 512 * MIB)])
def test_amd_s_integrated_is_not_its_carve_out(tmp_path, available, expected):
    """What it maps of the system's memory counts, as far as that is free."""
    apu = card(1, 0x15BF, vram_total=512 * MIB, vram_used=400 * MIB, gtt_total=16 * GIB)
    other = card(0, 0x744C, vram_total=24 * GIB, vram_used=0, gtt_total=32 * GIB)
    root = write(tmp_path, meminfo(available) | apu | other)
    assert memory_bytes(adapter("IntegratedGPU"), root) == expected
    assert free_bytes(adapter("IntegratedGPU"), root) is None


def test_an_older_driver_without_gtt_leaves_the_system_s_memory(tmp_path):
    root = write(tmp_path, meminfo(10 * GIB) | card(0, 0x15BF, vram_total=512 * MIB))
    assert memory_bytes(adapter("IntegratedGPU"), root) == 10 * GIB


V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"
LIMITS: dict[str, tuple[dict[str, object], int]] = {
    "version 2": (
        {"proc/self/cgroup": "0::/job", f"{V2}/job/memory.max": 4 * GIB, f"{V2}/job/memory.current": GIB},
        3 * GIB,
    ),
    "of a group above": (
        {
            "proc/self/cgroup": "0::/slice/job",
            f"{V2}/slice/memory.max": 3 * GIB,
            f"{V2}/slice/memory.current": GIB,
            f"{V2}/slice/job/memory.max": "max",
            f"{V2}/slice/job/memory.current": GIB // 2,
        },
        2 * GIB,
    ),
    "in a container": (
        {"proc/self/cgroup": "0::/../../x", f"{V2}/memory.max": 2 * GIB, f"{V2}/memory.current": GIB},
        GIB,
    ),
    "what files take is given back": (
        {
            "proc/self/cgroup": "0::/",
            f"{V2}/memory.max": 4 * GIB,
            f"{V2}/memory.current": 4 * GIB,
            f"{V2}/memory.stat": f"anon {GIB}\nactive_file {GIB}\ninactive_file {2 * GIB}",
        },
        3 * GIB,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "5:cpu:/x\n4:memory:/docker/a",
            f"{V1}/docker/a/memory.limit_in_bytes": 4 * GIB,
            f"{V1}/docker/a/memory.usage_in_bytes": 2 * GIB,
            f"{V1}/docker/a/memory.stat": f"total_inactive_file {GIB}",
        },
        3 * GIB,
    ),
    "none": ({"proc/self/cgroup": "0::/", f"{V2}/memory.max": "max", f"{V2}/memory.current": GIB}, 10 * GIB),
    "version 1 without a limit": (
        {
            "proc/self/cgroup": "4:memory:/",
            f"{V1}/memory.limit_in_bytes": 9223372036854771712,
            f"{V1}/memory.usage_in_bytes": GIB,
        },
        10 * GIB,
    ),
    "that tell no use": ({"proc/self/cgroup": "0::/job", f"{V2}/job/memory.max": 4 * GIB}, 4 * GIB),
    "with nonsense in their figures": (
        {
            "proc/self/cgroup": f"0::/a/b/c\n0\n::\n1:memory\n4:memory:/{'x' * 300}",
            f"{V2}/a/memory.max": "9" * 5000,
            f"{V2}/a/memory.current": "-1",
            f"{V2}/a/b/memory.max": 4 * GIB,
            f"{V2}/a/b/memory.current": 2 * GIB,
            f"{V2}/a/b/memory.stat": f"inactive_file {GIB}\nactive_file many\nactive_file\n \nanon",
            f"{V2}/a/b/c/memory.max": "\u0664 GiB",
        },
        3 * GIB,
    ),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_limits_of_control_groups_count(tmp_path, limit):
    files, expected = LIMITS[limit]
    root = write(tmp_path, meminfo(10 * GIB) | files)
    assert available_bytes(root) == expected
    software = {"adapter_type": "CPU", "device": "llvmpipe", "vendor_id": 0x10005, "device_id": 0}
    assert memory_bytes(software, root) == expected
    intel = {"adapter_type": "IntegratedGPU", "device": "Intel Arc", "vendor_id": 0x8086, "device_id": 1}
    assert memory_bytes(intel, root) == expected


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
@pytest.mark.parametrize(
    ("left", "expected"),
    [(2 * GIB, 2 * GIB - DRIVER_ADDRESSES), (DRIVER_ADDRESSES - 1, 0), (-1, 0), (60 * GIB, 10 * GIB), (None, 10 * GIB)],
)
def test_addresses_are_memory_too(tmp_path, monkeypatch, left, expected):
    """Those that `ulimit -v` leaves, less what a software GPU's driver takes: without them it ends the process."""
    import resource

    pages = 5 * GIB // resource.getpagesize()
    root = write(tmp_path, meminfo(10 * GIB) | {"proc/self/statm": f"{pages} 7 3 1 0 5 0"})
    limit = resource.RLIM_INFINITY if left is None else 5 * GIB + left
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (limit, limit))
    assert addresses_left(root) == (None if left is None else max(left, 0))
    software = {"adapter_type": "CPU", "device": "llvmpipe", "vendor_id": 0x10005, "device_id": 0}
    assert memory_bytes(software, root) == expected


def test_a_driver_without_addresses_is_not_tried(monkeypatch):
    monkeypatch.setattr("entrenar_gpu.gpu.choice.addresses_left", lambda: DRIVER_ADDRESSES - 1)
    monkeypatch.setattr("entrenar_gpu.gpu.choice.gpus", lambda _name: pytest.fail("the driver was loaded"))
    with pytest.raises(UserError, match=r"^`ulimit -v` leaves this process 639 MiB, .*raise the limit"):
        choose_gpu()


@pytest.mark.parametrize("text", ["MemAvailable:", "MemAvailable: many kB", f"MemAvailable: {'9' * 5000} kB", "\0"])
def test_a_system_that_tells_nonsense(tmp_path, text):
    root = write(tmp_path, {"proc/meminfo": text} | card(0, 0x15BF, vram_total=512 * MIB, gtt_total=16 * GIB))
    (root / "sys/class/drm/card0/device/mem_info_gtt_total").write_text("")
    assert available_bytes(root) is None
    assert memory_bytes(adapter("IntegratedGPU"), root) is None


def test_of_several_cards_the_one_asked_for_counts_however_small_its_window(tmp_path):
    """The vis_vram that the processor sees through a small BAR is no bound: what is uploaded is copied."""
    cards = card(1, 0x15BF, vram_total=512 * MIB, gtt_total=24 * GIB) | card(10, 0x744C, vram_total=24 * GIB)
    cards |= card(2, 0x73BF, vram_total=16 * GIB, vis_vram_total=256 * MIB, vram_used=20 * GIB, gtt_total=24 * GIB)
    root = write(tmp_path, meminfo(20 * GIB) | cards)
    small = adapter("DiscreteGPU", device_id=0x73BF)
    assert (memory_bytes(small, root), free_bytes(small, root)) == (16 * GIB, 0)
    assert memory_bytes(adapter("DiscreteGPU", device_id=0x744C), root) == 24 * GIB
    assert memory_bytes(adapter("IntegratedGPU"), root) == 20 * GIB + 512 * MIB


def test_a_system_that_tells_nothing(tmp_path):
    assert available_bytes(tmp_path) is None
    assert memory_bytes(adapter("DiscreteGPU"), tmp_path) is None
