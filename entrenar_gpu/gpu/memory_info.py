"""How much memory an adapter has and how much of it is free, where the system tells."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path("/")  # where /sys and /proc are; tests have others

# Of the addresses that `ulimit -v` leaves a process, what a software GPU's driver takes for itself: opened, its threads
# and the heaps of each, shaders while they are compiled. Where it gets none of these it ends the process (Mesa 22.3).
DRIVER_ADDRESSES = 640 << 20


def memory_bytes(info: Any, root: Path = ROOT) -> int | None:
    """Memory of the adapter where the system tells, else None. WebGPU itself does not say.

    What an adapter shares with the system is bounded by what this process may still use of that.
    """
    kind = info["adapter_type"]
    if kind == "CPU":
        return available_bytes(root)
    if platform.system() == "Darwin":
        # Metal lets a process use about three quarters of the unified memory
        text = _output(["sysctl", "-n", "hw.memsize"])
        return int(text) * 3 // 4 if text and text.strip().isdigit() else None
    folder = _amd_folder(info, root)
    if kind == "IntegratedGPU":
        return _shared_bytes(folder, root)
    if _is_nvidia(info):
        return _nvidia_smi(info, "memory.total")
    return _number(folder / "mem_info_vram_total") if folder is not None else None


def _shared_bytes(amd: Path | None, root: Path) -> int | None:
    """Of an integrated adapter: the system's memory; with AMD's driver what that maps (GTT) and the BIOS's carve-out,
    often 512 MiB, which alone would be taken for a card's memory."""
    available = available_bytes(root)
    mapped = _number(amd / "mem_info_gtt_total") if amd is not None else None
    if amd is None or mapped is None:
        return available
    carved = _number(amd / "mem_info_vram_total") or 0
    return carved + (mapped if available is None else min(mapped, available))


def free_bytes(info: Any, root: Path = ROOT) -> int | None:
    """What nobody uses of the memory that a card has for itself, where the system tells, else None."""
    if info["adapter_type"] != "DiscreteGPU":
        return None
    if _is_nvidia(info):
        return _nvidia_smi(info, "memory.free")
    folder = _amd_folder(info, root)
    if folder is None:
        return None
    total, used = (_number(folder / f"mem_info_vram_{key}") for key in ("total", "used"))
    return None if total is None or used is None else max(total - used, 0)


def available_bytes(root: Path = ROOT) -> int | None:
    """What this process may still use of the system's memory: what is there, and what its control groups leave it."""
    addresses = addresses_left(root)
    limit = None if addresses is None else max(addresses - DRIVER_ADDRESSES, 0)
    bounds = [_meminfo("MemAvailable", root), *_group_bounds(root), limit]
    known = [bound for bound in bounds if bound is not None]
    return min(known) if known else None


def addresses_left(root: Path = ROOT) -> int | None:
    """Bytes of address space that `ulimit -v` leaves this process; None without such a limit."""
    held = _text(root / "proc/self/statm").split()
    if sys.platform != "win32" and held and held[0].isdecimal():
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            return max(limit - int(held[0]) * resource.getpagesize(), 0)
    return None


def _group_bounds(root: Path) -> Iterator[int]:
    """What is left of the limit of each control group that this process is in, of version 2 and 1, up to the topmost.

    In a container the groups' own folder is mounted at the top, whatever the path that /proc names.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        group = mount / path.strip("/")
        if ".." in group.parts or not os.path.isdir(group):
            group = mount
        while True:
            bound = _left_of(group, *names)
            if bound is not None:
                yield bound
            if group == mount:
                break
            group = group.parent


def _left_of(group: Path, limit: str, usage: str, prefix: str) -> int | None:
    """Bytes that a group may still use; what it holds of files is given back when it is needed."""
    most, used = _number(group / limit), _number(group / usage)
    if most is None or used is None:
        return most  # who does not tell what is used may still have a limit
    stat = dict(line.partition(" ")[::2] for line in _text(group / "memory.stat").splitlines())
    cached = sum(_count(stat.get(f"{prefix}{kind}_file", "")) or 0 for kind in ("active", "inactive"))
    return max(most - max(used - cached, 0), 0)


def _is_nvidia(info: Any) -> bool:
    return "nvidia" in info["device"].lower() or info["vendor_id"] == 0x10DE


def _nvidia_smi(info: Any, figure: str) -> int | None:
    """Bytes of a figure that nvidia-smi tells of the card in MiB."""
    text = _output(["nvidia-smi", f"--query-gpu=name,{figure}", "--format=csv,noheader,nounits"])
    for line in (text or "").splitlines():
        name, _, mebibytes = line.rpartition(",")
        if name.strip() in info["device"] or info["device"] in name:
            return int(mebibytes) << 20 if mebibytes.strip().isdigit() else None
    return None


def _amd_folder(info: Any, root: Path) -> Path | None:
    """Where amdgpu tells of the card's memory."""
    for path in sorted(root.glob("sys/class/drm/card*/device/mem_info_vram_total")):
        ids = [_text(path.parent / key).strip() for key in ("vendor", "device")]
        if ids == [f"0x{info[key]:04x}" for key in ("vendor_id", "device_id")]:
            return path.parent
    return None


def _meminfo(key: str, root: Path) -> int | None:
    lines = _text(root / "proc/meminfo").splitlines()
    kibibytes = next(
        (_count(line.partition(":")[2].removesuffix("kB")) for line in lines if line.startswith(f"{key}:")), None
    )
    return None if kibibytes is None else kibibytes << 10


def _text(path: Path) -> str:
    """A file of the system; nothing where it has none, or keeps it to itself."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    return _count(_text(path))  # "max" is no limit


def _count(text: str) -> int | None:
    """A number of the system's; None of what is none, or has more digits than any."""
    text = text.strip()
    return int(text) if text.isdecimal() and len(text) <= 20 else None


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def driver_bytes() -> int | None:
    """What the driver says this process holds on its card, where it says; None elsewhere."""
    text = _output(["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"])
    rows = [line.split(",") for line in (text or "").splitlines() if line.count(",") == 1]
    used = [int(mib) << 20 for pid, mib in rows if pid.strip() == str(os.getpid()) and mib.strip().isdigit()]
    return used[0] if used else None
