"""The stages of detection, each on a table of steps: what stays slow, what comes back, single steps, longer batches.

There is one list of them, and two drivers: the report runs it over a whole run (detector.py), the live detector over
the newest steps, each stage as often as it is worth its time (live.py). Order matters, as each stage takes its steps
away from the next. Times are corrected for the work of a step before any of them, so a longer batch is explained, not
flagged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from observability import schema
from observability.detect import causes, host
from observability.detect.baseline import Mask, Scores, core_scale, pools_of, relative_work, score
from observability.detect.findings import ALARM_AT, NOTICED_AT, Finding
from observability.detect.kinds import kind_shifts
from observability.detect.periodic import find_period
from observability.detect.sustained import LEAST_RISE, Shift, find_shifts
from observability.read import Floats, StepTable

MATERIAL: Final = 3.0  # sigmas of the bulk of steps by which a kind of span must be over to matter to the step
_FELT: Final = 0.025  # of a step: the least sigma of a step, and of what any kind of span adds to one
# On a machine that other programs share all the time levels wander by tens of percent: a rise must be larger.
_SHARED_RISE: Final = 0.3
_SHARED_WAITS: Final = 0.5
_SHARED_TOTAL: Final = 0.4
_LATE: Final = 0.8  # of a step: a loader so much late is told, however much steps differ
_BEGIN: Final = 8  # steps: a stretch that begins earlier began with the run
_PLAIN_AT: Final = 6.0  # sigmas at which a kind of span so plainly explains a step that the step is no one's noise


@dataclass
class Body:
    """Steps that are judged together, and what the stages so far have made of them.

    `times` and `kinds` are the scores of steps and of kinds of span; `taken` are steps that a stage has explained,
    `shifts` the stretches that stay slow.
    """

    table: StepTable
    work: Floats = field(init=False)
    times: Scores = field(init=False)
    kinds: Scores = field(init=False)
    outside: Scores = field(init=False)  # what lies in no phase
    waited: Floats = field(init=False)  # seconds of each step that waiting for a processor explains
    plain: Mask = field(init=False)
    taken: Mask = field(init=False)
    shifts: list[Shift] = field(default_factory=list)
    period: int = 0  # steps from one pause that comes back to the next; 0: there is none

    def __post_init__(self) -> None:
        self.work = relative_work(self.table)
        self.times = score(self.table.seconds, self.work)
        self.kinds = score(self.table.durations, self.work, pools=pools_of(self.table))
        self.outside = score(outside_phases(self.table), np.ones(len(self.table)))
        self.waited = host.waited(self.table)
        self.floor_scales()
        self.plain = plainly_explained(self.times, self.kinds)
        self.taken = np.zeros(len(self.table), dtype=bool)

    def floor_scales(self) -> None:
        """No sigma below a share of the step: what usually takes nothing would be thousands of sigmas slow."""
        least = _FELT * self.times.expected
        np.maximum(self.times.scale, least, out=self.times.scale)
        np.maximum(self.outside.scale, least, out=self.outside.scale)
        np.maximum(self.kinds.scale, least[:, None], out=self.kinds.scale)

    @property
    def material(self) -> Floats:
        """Seconds [steps, kinds] from which what one kind of span was over matters to its step.

        What the GPU does varies with its steps; the loader's time has no share in their noise.
        """
        waits = np.array([kind.level == "phase" and kind.name == schema.DATA for kind in self.table.kinds], dtype=bool)
        scale = self.times.scale[:, None]
        most = np.minimum(self.felt, _LATE * float(np.median(self.table.seconds)))[:, None]
        result: Floats = np.where(waits, np.minimum(MATERIAL * scale, most), MATERIAL * scale)
        return result

    @property
    def felt(self) -> Floats:
        """Seconds that matter to a step where nothing but the fault adds to it, by step."""
        core = core_scale(self.times.excess)
        result: Floats = np.maximum(MATERIAL * core, ALARM_AT * _FELT * self.times.expected)
        return result


def outside_phases(table: StepTable) -> Floats:
    """Seconds of each step in no phase; zeros where the trace has no phases."""
    phases = [i for i, kind in enumerate(table.kinds) if kind.level == "phase"]
    if not phases:
        return np.zeros(len(table))
    result: Floats = np.maximum(table.seconds - np.sum(table.durations[:, phases], axis=1), 0.0)
    return result


def plainly_explained(times: Scores, kinds: Scores) -> Mask:
    """Steps that one kind of span was so slow in that nothing else need be asked."""
    core = max(core_scale(times.excess), 1e-9)
    result: Mask = np.any((kinds.z >= _PLAIN_AT) & (kinds.excess >= _PLAIN_AT * core), axis=1)
    return result


def sustained(body: Body) -> list[Finding]:
    """Slowdowns that stay: of kinds of span, each against its like; of whole steps without those; and of waits for a
    processor that other programs had.
    """
    table, factor = body.table, body.times.factor
    found = kind_shifts(table, body.kinds.factor)
    seconds = table.seconds - _disjoint(table, [(slow.kind, slow.excess) for slow in found])
    # A burst of steps that one layer explains is no slowdown of the run.
    usual = np.minimum(body.times.expected, seconds)
    seconds = np.where(body.plain, usual, seconds)
    own = np.maximum(seconds - body.waited, 0.05 * seconds)
    shared = host.busy(table)
    body.shifts = find_shifts(np.maximum(own, 1e-9) / factor, _SHARED_RISE if shared else LEAST_RISE)
    if shared:  # what a run began with is no change, where others come and go
        found = [slow for slow in found if slow.shift.first >= _BEGIN]
        body.shifts = [shift for shift in body.shifts if shift.first >= _BEGIN]
    findings = [causes.of_kind_shift(table, slow) for slow in found]
    apart = bool(body.waited.any())
    findings += [causes.of_shift(table, body.kinds, shift, apart) for shift in body.shifts]
    if apart:
        base = float(np.median(own / factor))
        waits = find_shifts(base + body.waited, _SHARED_WAITS if shared else LEAST_RISE)
        waits = [shift for shift in waits if not shared or shift.first >= _BEGIN]
        findings += [causes.of_waits(table, shift) for shift in waits]
        body.shifts += waits
        if not body.shifts:  # neither alone is sure, or the waits told do not follow the steps
            body.shifts = find_shifts(np.maximum(seconds, 1e-9) / factor, _SHARED_TOTAL if shared else LEAST_RISE)
            body.shifts = [shift for shift in body.shifts if not shared or shift.first >= _BEGIN]
            findings += [causes.of_shift(table, body.kinds, shift) for shift in body.shifts]
    body.shifts += [slow.shift for slow in found]
    return findings


def periodic(body: Body) -> list[Finding]:
    """A pause that comes back: looked for in whole steps, in what lies outside their phases, and in their data."""
    table, times = body.table, body.times
    usable = _outside(body.shifts, len(table))
    waits = [i for i, kind in enumerate(table.kinds) if kind.level == "phase" and kind.name == schema.DATA]
    places = [times.excess, body.outside.excess, *(body.kinds.excess[:, i] for i in waits)]
    scales = [_core(excess, times) for excess in places]
    found = [find_period(np.where(usable, e, 0.0) / scale) for e, scale in zip(places, scales, strict=True)]
    sure = [(float(np.median(e[p.rows])) / scale, p) for e, scale, p in zip(places, scales, found, strict=True) if p]
    clearest, period = max(sure, key=lambda item: item[0], default=(0.0, None))
    finding = None
    if period is not None:
        body.taken[period.rows] = True
        body.kinds = score(table.durations, body.work, body.taken, pools_of(table))
    body.times = score(table.seconds, body.work, body.taken | body.plain)
    body.floor_scales()
    if period is not None:
        finding = causes.of_period(table, body.times, body.kinds, period, clearest)
        body.period = period.period if finding is not None else 0
        if finding is None:
            body.taken[:] = False
    return [finding] if finding is not None else []


def _core(excess: Floats, times: Scores) -> float:
    """The scale on which pauses that come back are looked for: of the bulk, and not below what anybody feels."""
    return max(core_scale(excess), 0.4 * _FELT * float(np.median(times.expected)))


def single_steps(body: Body) -> list[Finding]:
    """Steps not yet taken, kinds of span that matter to their step, or time in no phase, over their baseline."""
    times, kinds, free = body.times, body.kinds, ~body.taken
    step_z = np.where(free, times.z, 0.0)
    material = kinds.excess >= body.material
    kind_z = np.where(material & free[:, None], kinds.z, 0.0)
    away = np.where((body.outside.excess >= np.minimum(body.felt, MATERIAL * times.scale)) & free, body.outside.z, 0.0)
    top = np.maximum(kind_z.max(axis=1, initial=0.0), away)
    rows = np.flatnonzero((step_z >= NOTICED_AT) | (top >= ALARM_AT))
    return causes.crowded(
        body.table,
        [
            causes.of_step(body.table, times, kinds, row, float(away[row]), float(body.outside.excess[row]))
            for row in rows.tolist()
        ],
    )


def longer_batches(body: Body) -> list[Finding]:
    """Steps that took longer because they had more to do."""
    return causes.longer_batches(body.table, body.times, body.work)


@dataclass(frozen=True)
class Stage:
    """`find` judges a body; live, after the steps `live_at` and after every `live_every` (0: never)."""

    find: Callable[[Body], list[Finding]]
    live_every: int = 0
    live_at: tuple[int, ...] = ()

    def due(self, seen: int) -> bool:
        return seen in self.live_at or (self.live_every > 0 and seen % self.live_every == 0)


SUSTAINED: Final = Stage(sustained, 100)
PERIODIC: Final = Stage(periodic, 500, (100, 200, 300))
SINGLE_STEPS: Final = Stage(single_steps, 1)
STAGES: Final = (SUSTAINED, PERIODIC, SINGLE_STEPS, Stage(longer_batches))


def _disjoint(table: StepTable, found: list[tuple[int, Floats]]) -> Floats:
    """Seconds lost in all kinds found, by step; what lies within another counts once."""
    levels = {level: np.zeros(len(table)) for level in ("kernel", "layer", "phase")}
    for kind, excess in found:
        levels[table.kinds[kind].level] += excess
    result: Floats = np.maximum(levels["kernel"], levels["layer"]) + levels["phase"]
    return result


def _outside(shifts: list[Shift], count: int) -> Mask:
    mask = np.ones(count, dtype=bool)
    for shift in shifts:
        # the moving median needs some steps to follow
        mask[max(0, shift.first - 2) : shift.first + 3] = False
    return mask
