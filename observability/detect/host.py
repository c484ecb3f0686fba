"""What host and GPU tell of slow steps: the process held up, other programs, memory read back, a lower clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from observability.detect.change import ENOUGH_STEPS
from observability.detect.findings import INTERFERENCE, MEMORY_PRESSURE, THROTTLE, duration
from observability.read import Floats, StepTable

STOPPED: Final = 0.5  # of the time lost, in which the process was stopped and not only outrun
_HELD: Final = 0.4  # of the time lost, in which the whole process did not run
_WAITED: Final = 0.4  # of the time lost, that threads waited for a processor
_OTHERS: Final = 0.3  # of the time lost, that other programs had a processor
_FAULTS: Final = 100  # pages a step read back from disk
_THREADS: Final = 1.2  # that run or wait at any time: one alone may only watch a device
_BUSY: Final = 0.1  # of a step, that most steps wait
_LEAST_STEPS: Final = 20
_AGREE: Final = 0.65  # of the steps whose waits differ, times must differ the same way
_MOST: Final = 0.9  # of a step
_CLOCK: Final = 0.97  # of the clock before
WAITED: Final = "threads waited"
Rows = Any  # what picks rows of a column: indices, a mask, a slice


def evidence(
    table: StepTable, rows: Rows, before: Rows, lost: float, waits_apart: bool = False
) -> tuple[str, str] | None:
    """(cause, words) for `rows` that took `lost` seconds longer each than those `before`; None where nothing tells.

    `waits_apart`: what threads waited for a processor is in none of these times, so that it explains nothing of them.
    """

    def risen(key: str) -> float:
        """By how much the typical figure of `rows` lies over that of the steps before; NaN where it is not told."""
        column = table.values.get(key)
        if column is None or not np.any(np.isfinite(column[rows])) or not np.any(np.isfinite(column[before])):
            return float("nan")
        return float(np.nanmedian(column[rows]) - np.nanmedian(column[before]))

    held = table.values.get("held_seconds")
    held_back = float(np.nanmean(held[rows])) if held is not None and np.any(np.isfinite(held[rows])) else 0.0
    if not waits_apart and held_back >= _HELD * lost > 0:
        return INTERFERENCE, _held_up(held_back)
    faults = risen("major_faults")
    if faults >= _FAULTS:
        return MEMORY_PRESSURE, f"{faults:,.0f} more pages a step were read back from disk"
    waited, others = risen("run_delay_seconds"), risen("others_cpu_seconds")
    if not waits_apart and waited >= _WAITED * lost > 0 and others >= _OTHERS * lost:
        return (
            INTERFERENCE,
            f"{WAITED} {duration(waited)} more for a processor, of which others took {duration(others)}",
        )
    return _throttled(table, rows, before)


def outrun(table: StepTable) -> Floats:
    """Seconds by step that threads waited for a processor, but no more than the step took; zeros where untold."""
    waits = table.values.get("run_delay_seconds")
    if waits is None:
        return np.zeros(len(table))
    result: Floats = np.minimum(np.nan_to_num(waits), table.seconds)
    return result


def stops(table: StepTable) -> Floats:
    """Seconds by step in which the process did not run though nobody kept a processor from it: stopped, swapped out,
    asleep; zeros where untold."""
    held = table.values.get("held_seconds")
    if held is None:
        return np.zeros(len(table))
    waits = outrun(table)
    result: Floats = np.nan_to_num(held) - np.maximum(waits - float(np.median(waits)), 0.0)
    return result


def busy(table: StepTable) -> bool:
    """Whether other programs share the machine all the time, so that steps always wait for a processor."""
    waits = table.values.get("run_delay_seconds")
    if waits is None or not np.any(np.isfinite(waits)):
        return False
    return float(np.nanquantile(waits, 0.25)) >= _BUSY * float(np.median(table.seconds))


def too_short(table: StepTable) -> bool:
    """Whether others share the machine, and the steps are too few to tell what they do from a slow step."""
    return len(table) < ENOUGH_STEPS and busy(table)


def usual_wait(table: StepTable) -> float:
    """Seconds that the threads of a typical step waited for a processor."""
    return float(np.nanmedian(table.values["run_delay_seconds"]))


@dataclass(frozen=True)
class Processors:
    """Steps that the process's own threads compute, as a software GPU's are: what each consists of, by step.

    step = `cost` x `crowd` x `idle`: processor seconds spent, by how many times they were stretched as others had the
    processors, and wall seconds a second in which a thread ran or waited to. Each changes for a reason of its own: the
    work or the clock; other programs; whatever the threads sleep for.
    """

    cost: Floats
    crowd: Floats
    idle: Floats


def processors(table: StepTable) -> Processors | None:
    """None where steps are computed elsewhere, or too little is told."""
    spent, waits = (table.values.get(key) for key in ("cpu_seconds", "run_delay_seconds"))
    if spent is None or waits is None or not np.all(np.isfinite(spent)) or not np.all(np.isfinite(waits)):
        return None
    spent = np.maximum(spent, 1e-3 * table.seconds)
    threads = spent + waits
    if float(np.median(threads / table.seconds)) < _THREADS or not _agree(threads, table.seconds):
        return None
    return Processors(spent, threads / spent, table.seconds / threads)


def _agree(told: Floats, seconds: Floats) -> bool:
    """Whether steps that differ in what is told of them from the one before differ in time the same way."""
    more, longer = np.diff(told), np.diff(seconds)
    apart = np.abs(more) >= max(float(np.quantile(np.abs(more), 0.5)), 1e-3 * float(np.median(seconds)))
    return bool(apart.any()) and float(np.mean(np.sign(more[apart]) == np.sign(longer[apart]))) >= _AGREE


def waited(table: StepTable) -> Floats:
    """Seconds of each step that waiting for a processor explains, learned from how times follow waits; zeros elsewhere.

    From step to step, as a level that changes for another reason must not pass for waiting.
    """
    nothing = np.zeros(len(table))
    waits = table.values.get("run_delay_seconds")
    if waits is None or len(table) < _LEAST_STEPS or not np.all(np.isfinite(waits)):
        return nothing
    less = np.diff(waits)
    longer = np.diff(table.seconds)
    apart = np.abs(less) >= max(float(np.quantile(np.abs(less), 0.5)), 1e-3 * float(np.median(table.seconds)))
    if apart.sum() < _LEAST_STEPS // 2 or float(np.median(waits)) < 1e-3 * float(np.median(table.seconds)):
        return nothing
    agree = float(np.mean(np.sign(less[apart]) == np.sign(longer[apart])))
    if agree < _AGREE:
        return nothing
    slope = float(np.clip(np.median(longer[apart] / less[apart]), 0.0, 1.0))
    explained = slope * np.maximum(waits - float(np.quantile(waits, 0.1)), 0.0)
    result: Floats = np.minimum(explained, _MOST * table.seconds)
    return result


def of_step(
    table: StepTable, row: int, lost: float, in_phases: bool, waits_apart: bool = False
) -> tuple[str, str] | None:
    """(cause, words) for one slow step, against all others; time lost outside its phases asks for plainer evidence.

    `waits_apart` as for `evidence`.
    """
    others = np.arange(len(table)) != row
    if not others.any():
        return None
    held = table.values.get("held_seconds")
    if waits_apart and held is not None and held[row] >= _HELD * lost > 0:  # no thread waited in what was lost
        return INTERFERENCE, _held_up(float(held[row]))
    found = evidence(table, slice(row, row + 1), others, lost if in_phases else 2 * lost, waits_apart)
    return found if found is not None and found[0] != THROTTLE else None


def _held_up(seconds: float) -> str:
    return f"the process did not run for {duration(seconds)} (stopped, swapped out or outrun)"


def _throttled(table: StepTable, rows: Rows, before: Rows) -> tuple[str, str] | None:
    """A lower clock of the GPU, with its temperature and the driver's reason where they are told."""
    clock = table.values.get("gpu_clock_mhz")
    if clock is None or not np.any(np.isfinite(clock[rows])) or not np.any(np.isfinite(clock[before])):
        return None
    was, now = float(np.nanmedian(clock[before])), float(np.nanmedian(clock[rows]))
    if now > _CLOCK * was:
        return None
    words = f"the GPU's clock fell from {was:.0f} to {now:.0f} MHz"
    heat = table.values.get("gpu_temperature_c")
    if heat is not None and np.any(np.isfinite(heat[rows])):
        words += f" at {np.nanmedian(heat[rows]):.0f} °C"
    reasons = sorted({str(reason) for reason in table.throttle[rows] if reason}) if len(table.throttle) else []
    return THROTTLE, words + (f" ({', '.join(reasons)})" if reasons else "")
