"""When steps, evaluations and checkpoints began and ended, and where a step's time went.

Everything is measured by the monotonic clock, which no correction of the system's time moves. Dates, in nanoseconds
since the epoch, are told with the offset between the two clocks at the moment of telling: within one record, what lies
between two dates is always what was measured.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from entrenar_gpu.compiler import TraceGroup
from entrenar_gpu.events import Span
from entrenar_gpu.gpu import GpuClock, Report, step_spans


@dataclass(frozen=True)
class StepTimes:
    """Begin and end as dates, seconds between them, and the spans within."""

    start_ns: int
    end_ns: int
    seconds: float
    spans: tuple[Span, ...]


class StepTimer:
    """Times the steps of a run on an executor. `now` is its clock, in nanoseconds of no date."""

    now = staticmethod(time.monotonic_ns)

    def __init__(self, executor: Any, groups: Mapping[str, Sequence[TraceGroup]], accumulate: int) -> None:
        """`groups` are those that the executor times, by graph; the "micro" graph runs `accumulate` times a step."""
        self._executor, self._groups, self._accumulate = executor, groups, accumulate
        self._clock = GpuClock()
        self._free_since = 0  # a step's time begins here at the earliest

    def calibrate(self) -> None:
        """Line up the device's clock with the host's; only while the device is idle."""
        reading = self._executor.read_clock()
        if reading is not None:
            self._clock.calibrate(*reading)

    def step(self, report: Report, drawn: tuple[int, int]) -> StepTimes:
        """The times of a step whose report has just arrived; its batches were made between the times `drawn`.

        A step lasts from when its batches were begun, or the one before was done, to when the device was done with it.
        """
        spans, end = step_spans(report, self._groups, self._accumulate, self._clock, drawn[1])
        start = min(max(drawn[0], self._free_since), end)
        data = Span("data", "phase", max(drawn[0], start), max(drawn[1], start))
        self._free_since = end
        seconds = max((end - start) / 1e9, 1e-9)
        date = _date_offset()
        dated = (replace(s, start_ns=s.start_ns + date, end_ns=s.end_ns + date) for s in (*spans, data))
        return StepTimes(start + date, end + date, seconds, tuple(dated))

    def between_steps(self, begin: int) -> tuple[int, int]:
        """Begin and end, as dates, of what began at `begin`, ends now, and kept the device from its next step."""
        end, date = self.now(), _date_offset()
        self.calibrate()
        self.resume()
        return begin + date, end + date

    def resume(self) -> None:
        """What the host did since the last step ended is not the next one's time."""
        self._free_since = self.now()


def _date_offset() -> int:
    return time.time_ns() - time.monotonic_ns()
