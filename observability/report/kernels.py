"""What kernels take together: time by operation and shape, their rates against the device's ceilings, idle time."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from observability import schema
from observability.read import KernelGroup, StepTable

# Peaks from the makers' data sheets: f32 TFLOP/s outside matrix units, and GB/s of memory. The first match counts.
_CEILINGS: Final = (
    (r"\bH200\b", 67.0, 4800.0),
    (r"\bH100\b.*PCIe", 51.0, 2000.0),
    (r"\bH100\b", 67.0, 3350.0),
    (r"\bA100\b.*40", 19.5, 1555.0),
    (r"\bA100\b", 19.5, 2039.0),
    (r"\bL40S\b", 91.6, 864.0),
    (r"\bL4\b", 30.3, 300.0),
    (r"\bA10\b", 31.2, 600.0),
    (r"\bT4\b", 8.1, 320.0),
    (r"RTX 5090\b", 104.8, 1792.0),
    (r"RTX 5080\b", 56.3, 960.0),
    (r"RTX 4090\b", 82.6, 1008.0),
    (r"RTX 4080\b(?! SUPER)", 48.7, 716.8),
    (r"RTX 4070\b(?! (SUPER|Ti))", 29.1, 504.0),
    (r"RTX 4060\b(?! Ti)", 15.1, 272.0),
    (r"RTX 3090\b(?! Ti)", 35.6, 936.0),
    (r"RTX 3070\b(?! Ti)", 20.3, 448.0),
    (r"RTX 3060\b(?! Ti)", 12.7, 360.0),
    (r"RX 7900 XTX\b", 61.4, 960.0),
    (r"RX 6900 XT\b", 23.0, 512.0),
    (r"RX 6800 XT\b", 20.7, 512.0),
    (r"Arc.* A770\b", 19.7, 560.0),
    (r"Apple M1 Max\b", 10.4, 400.0),
    (r"Apple M1 Pro\b", 5.2, 200.0),
    (r"Apple M1\b", 2.6, 68.0),
    (r"Apple M2 Max\b", 13.6, 400.0),
    (r"Apple M2\b(?! (Pro|Ultra))", 3.6, 100.0),
)


@dataclass(frozen=True)
class Ceilings:
    """What the device can do at most: FLOP a second in f32, and bytes a second; None where nothing tells."""

    flops: float | None
    bytes: float | None


@dataclass(frozen=True)
class KernelRow:
    """One group of kernels: seconds in a typical step, its share of all kernels' time, and its rates per second."""

    group: KernelGroup
    seconds: float
    share: float
    flops_per_second: float
    bytes_per_second: float


@dataclass(frozen=True)
class KernelReport:
    """The groups of kernels, those that take most first, and how much of a step the GPU has nothing to do.

    `busy_share` is the share of a typical step in which the GPU computes: in kernels where the trace has those, else in
    phases that the GPU timed (None where it timed nothing).
    """

    rows: list[KernelRow]
    steps: int
    launches: float
    busy_share: float | None
    idle_seconds: float | None
    ceilings: Ceilings

    def to_json(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "launches_per_step": round(self.launches, 1),
            "gpu_busy_share": self.busy_share,
            "gpu_idle_seconds_per_step": self.idle_seconds,
            "ceiling_flops_per_second": self.ceilings.flops,
            "ceiling_bytes_per_second": self.ceilings.bytes,
            "sums": [
                {
                    "kernel": row.group.operation,
                    "shape": row.group.shape,
                    "launches_per_step": round(row.group.launches, 2),
                    "seconds_per_step": row.seconds,
                    "share": row.share,
                    "flops_per_second": row.flops_per_second,
                    "bytes_per_second": row.bytes_per_second,
                }
                for row in self.rows
            ],
        }


def ceilings(table: StepTable) -> Ceilings:
    """The ceilings of the device that a run names, by its data sheet; of f32 alone, as matrix units are apart."""
    name = str(table.facts.get(schema.GPU_ADAPTER, ""))
    if re.search(r"Laptop|Mobile|Max-Q", name):  # clocked as each maker likes
        return Ceilings(None, None)
    for pattern, tera_flops, giga_bytes in _CEILINGS:
        if re.search(pattern, name):
            f32 = str(table.facts.get(schema.RUN_PRECISION, "")) == "f32"
            return Ceilings(tera_flops * 1e12 if f32 else None, giga_bytes * 1e9)
    return Ceilings(None, None)


def kernel_report(table: StepTable) -> KernelReport:
    """The sums of a run's kernels over layers and steps."""
    limits = ceilings(table)
    sums = table.kernels
    if sums is None:
        busy, idle = _busy(table.seconds, table.gpu_seconds) if len(table.gpu_seconds) else (None, None)
        return KernelReport([], 0, 0.0, busy, idle, limits)
    typical = np.median(sums.seconds, axis=0)
    total = float(np.sum(typical))
    rows = []
    for g in np.argsort(-typical).tolist():
        seconds, group = float(typical[g]), sums.groups[g]
        per = 1 / seconds if seconds > 0 else 0.0
        share = seconds / total if total > 0 else 0.0
        rows.append(KernelRow(group, seconds, share, group.flops * per, group.bytes * per))
    at = np.searchsorted(table.step, sums.steps)
    busy, idle = _busy(table.seconds[at], sums.busy)
    launches = sum(group.launches for group in sums.groups)
    return KernelReport(rows, len(sums.steps), launches, busy, idle, limits)


def _busy(seconds: Any, computing: Any) -> tuple[float, float]:
    """(share of a typical step in which the GPU computes, seconds in which it does not)."""
    share = float(np.median(np.clip(computing / seconds, 0.0, 1.0)))
    return share, float(np.median(np.maximum(seconds - computing, 0.0)))


def rate(value: float, unit: str) -> str:
    """A rate for people: 812 GFLOP/s, 1.2 TB/s; "–" for none."""
    if value <= 0:
        return "–"
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}{unit}/s"
    return f"{value / 1e3:.3g} k{unit}/s"


def of_ceiling(value: float, most: float | None) -> str:
    """` (37%)` of the ceiling, or nothing where that is unknown or nothing was counted."""
    return f" ({value / most:.0%})" if most and value > 0 else ""
