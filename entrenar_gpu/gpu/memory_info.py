"""How much memory an adapter has and how much of it is free, where the system tells."""

from __future__ import annotations

import glob
import os
import platform
import subprocess
from pathlib import Path
from typing import Any


def memory_bytes(info: Any) -> int | None:
    """Memory of the adapter where the system tells, else None. WebGPU itself does not say."""
    if info["adapter_type"] == "CPU":
        return _meminfo("MemAvailable")
    if platform.system() == "Darwin":
        # Metal lets a process use about three quarters of the unified memory
        text = _output(["sysctl", "-n", "hw.memsize"])
        return int(text) * 3 // 4 if text and text.strip().isdigit() else None
    if _is_nvidia(info):
        return _nvidia_smi(info, "memory.total")
    folder = _amd_folder(info)
    if folder is not None:
        return int((folder / "mem_info_vram_total").read_text())
    if info["adapter_type"] == "IntegratedGPU":
        return _meminfo("MemAvailable")
    return None


def free_bytes(info: Any) -> int | None:
    """What nobody uses of the memory that a card has for itself, where the system tells, else None."""
    if info["adapter_type"] != "DiscreteGPU":
        return None
    if _is_nvidia(info):
        return _nvidia_smi(info, "memory.free")
    folder = _amd_folder(info)
    if folder is None:
        return None
    total, used = (int((folder / f"mem_info_vram_{key}").read_text()) for key in ("total", "used"))
    return max(total - used, 0)


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


def _amd_folder(info: Any) -> Path | None:
    """Where amdgpu tells of the card's memory."""
    for path in glob.glob("/sys/class/drm/card*/device/mem_info_vram_total"):
        ids = [int((Path(path).parent / key).read_text(), 16) for key in ("vendor", "device")]
        if ids == [info["vendor_id"], info["device_id"]]:
            return Path(path).parent
    return None


def _meminfo(key: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:")), None)


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
