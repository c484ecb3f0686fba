"""The stages of detection, each on a table of steps: what stays slow, what comes back, single steps, longer batches.

There is one list of them, and two drivers: the report runs it over a whole run (detector.py), the live detector over
the newest steps, each stage as often as it is worth its time (live.py). Order matters, as each stage takes its steps
away from the next. Times are corrected for the work of a step before any of them, so a longer batch is explained, not
flagged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from observability import schema
from observability.detect import causes, host
from observability.detect.baseline import Mask, Scores, core_scale, pools_of, relative_work, score
from observability.detect.change import lasting_shifts
from observability.detect.findings import ALARM_AT, LOW, NOTICED_AT, SLOW_KERNEL, SPIKE, Finding
from observability.detect.kinds import KindShift, kind_shifts
from observability.detect.periodic import find_period
from observability.detect.sustained import Shift, find_shifts
from observability.read import Floats, StepTable

MATERIAL: Final = 3.0  # sigmas of the bulk of steps by which a kind of span must be over to matter to the step
_FELT: Final = 0.025  # of a step: the least sigma of a step, and of what any kind of span adds to one
# On a machine that other programs share all the time levels wander by tens of percent: a rise must be larger.
_SHARED_RISE: Final = 0.3
_SHARED_WAITS: Final = 0.5
_SHARED_TOTAL: Final = 0.4
_COST_RISE: Final = 0.25  # of processor time, which wanders least
_OWN: Final = 0.6  # of what a kind of span took longer, that its step must have taken longer itself
_LATE: Final = 0.8  # of a step: a loader so much late is told, however much steps differ
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
    outside: Scores = field(init=False)  # what lies in no phase, or in which no thread wanted to run
    shared: bool = field(init=False)  # whether other programs share the machine all the time
    parts: host.Processors | None = field(init=False)  # of steps, where they share the processors that compute them
    waited: Floats = field(init=False)  # seconds of each step that waiting for a processor explains
    plain: Mask = field(init=False)
    taken: Mask = field(init=False)
    shifts: list[Shift] = field(default_factory=list)
    period: int = 0  # steps from one pause that comes back to the next; 0: there is none

    def __post_init__(self) -> None:
        self.work = relative_work(self.table)
        self.shared = host.busy(self.table)
        self.parts = host.processors(self.table) if self.shared else None
        self.waited = host.waited(self.table)
        self.times = self.score_steps()
        self.kinds = score(self.table.durations, self.work, pools=pools_of(self.table))
        self.outside = self.score_idle()
        self.floor_scales()
        self.plain = plainly_explained(self.times, self.kinds)
        self.taken = np.zeros(len(self.table), dtype=bool)

    def score_steps(self, exclude: Mask | None = None) -> Scores:
        """Steps against their baseline; where others share the processors that compute them, their part is expected.

        Of such a step two things are its own: what it spent of processors, and for how long no thread wanted one. The
        odder of them is told.
        """
        if self.parts is None:
            return score(self.table.seconds, self.work, exclude)
        dear, idle = self._of_part(self.parts.cost, self.work, exclude), self.score_idle(exclude)
        excess, scale = (
            np.where(dear.z > idle.z, a, b) for a, b in ((dear.excess, idle.excess), (dear.scale, idle.scale))
        )
        return Scores(self.table.seconds - excess, excess, scale, dear.factor)

    def score_idle(self, exclude: Mask | None = None) -> Scores:
        """Seconds of each step in which no thread ran or wanted to, beyond what is usual; elsewhere, in no phase."""
        if self.parts is None:
            return score(outside_phases(self.table), np.ones(len(self.table)), exclude)
        return self._of_part(self.parts.idle, np.ones(len(self.table)), exclude)

    def _of_part(self, part: Floats, work: Floats, exclude: Mask | None) -> Scores:
        """A factor of a step against its baseline, in seconds of the step."""
        found, unit = score(part, work, exclude), self.table.seconds / part
        return Scores(found.expected * unit, found.excess * unit, found.scale * unit, found.factor)

    def floor_scales(self) -> None:
        """No sigma below a share of the step: what usually takes nothing would be thousands of sigmas slow.

        Nor, of a step in which the process was stopped, as far above what stops are usual: nothing else hides one that
        the host tells.
        """
        least = _FELT * self.times.expected
        np.maximum(self.times.scale, least, out=self.times.scale)
        stops = score(host.stops(self.table), np.ones(len(self.table)))
        told = stops.excess >= host.STOPPED * np.maximum(self.times.excess, self.times.expected)
        np.minimum(self.times.scale, np.maximum(stops.scale, least), out=self.times.scale, where=told)
        np.maximum(self.outside.scale, least, out=self.outside.scale)
        np.maximum(self.kinds.scale, least[:, None], out=self.kinds.scale)

    def changes(self, times: Floats, least: float) -> list[Shift]:
        """Stretches in which `times` stay high; by `least` where others share the machine, as `lasting_shifts` says."""
        return lasting_shifts(times, least) if self.shared else find_shifts(times)

    @property
    def material(self) -> Floats:
        """Seconds [steps, kinds] from which what one kind of span was over matters to its step.

        What the GPU does varies with its steps; the loader's time has no share in their noise.
        """
        waits = _is_data(self.table)
        scale = self.times.scale[:, None]
        late = _LATE * float(np.median(self.table.seconds))
        most = np.minimum(self.felt, late)[:, None]
        least = np.full_like(scale, late) if self.shared else np.minimum(MATERIAL * scale, most)
        result: Floats = np.where(waits, least, MATERIAL * scale)
        return result

    @property
    def felt(self) -> Floats:
        """Seconds that matter to a step where nothing but the fault adds to it, by step."""
        core = core_scale(self.times.excess)
        result: Floats = np.maximum(MATERIAL * core, ALARM_AT * _FELT * self.times.expected)
        return result


def _is_data(table: StepTable) -> Mask:
    """Which kinds of span are the loader's: of the host, while the GPU computes."""
    return np.array([kind.level == "phase" and kind.name == schema.DATA for kind in table.kinds], dtype=bool)


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
    table = body.table
    found = kind_shifts(table, body.kinds.factor)
    findings = [causes.of_kind_shift(table, slow) for slow in found]
    whole = _of_processors if body.parts is not None else _of_steps
    body.shifts = []
    findings += whole(body, found)
    body.shifts += [slow.shift for slow in found]
    return findings


def _of_steps(body: Body, found: list[KindShift]) -> list[Finding]:
    """Whole steps that stay slow, what they waited for a processor apart; without what kinds of span lost."""
    table, factor = body.table, body.times.factor
    seconds = table.seconds - _disjoint(table, [(slow.kind, slow.excess) for slow in found])
    waited = body.waited * seconds / table.seconds  # what fell into the time that is taken off went with it
    # A burst of steps that one layer explains is no slowdown of the run.
    usual = np.minimum(body.times.expected, seconds)
    seconds = np.where(body.plain, usual, seconds)
    own = np.maximum(seconds - waited, 0.05 * seconds)
    shifts = body.changes(np.maximum(own, 1e-9) / factor, _SHARED_RISE)
    apart = bool(body.waited.any())
    findings = [causes.of_shift(table, body.kinds, shift, apart) for shift in shifts]
    if apart:
        base = float(np.median(own / factor))
        waits = body.changes(base + waited, _SHARED_WAITS)
        findings += [causes.of_waits(table, shift) for shift in waits]
        shifts += waits
        if not shifts:  # neither alone is sure, or the waits told do not follow the steps
            shifts = body.changes(np.maximum(seconds, 1e-9) / factor, _SHARED_TOTAL)
            findings += [causes.of_shift(table, body.kinds, shift) for shift in shifts]
    body.shifts += shifts
    return findings


def _of_processors(body: Body, found: list[KindShift]) -> list[Finding]:
    """The same where processors compute the steps and others share them: each factor of a step by itself."""
    table, parts = body.table, body.parts
    assert parts is not None
    typical = float(np.median(table.seconds))

    def of_a_step(part: Floats) -> Floats:
        """`part` in seconds of a typical step, so that a rise of it is told as what it makes of one."""
        result: Floats = part * typical / float(np.median(part))
        return result

    computed = [slow for slow in found if table.kinds[slow.kind].name != schema.DATA]
    late = [slow for slow in found if table.kinds[slow.kind].name == schema.DATA]
    kept = 1 - _disjoint(table, [(slow.kind, slow.excess) for slow in computed]) / table.seconds
    punctual = 1 - _disjoint(table, [(slow.kind, slow.excess) for slow in late]) / table.seconds
    slower = body.changes(of_a_step(parts.cost * kept / body.times.factor), _COST_RISE)
    asleep = body.changes(of_a_step(parts.idle * punctual), _SHARED_RISE)
    crowded = body.changes(of_a_step(parts.crowd), _SHARED_WAITS)
    body.shifts += [*slower, *asleep, *crowded]
    findings = [causes.of_shift(table, body.kinds, shift, True) for shift in (*slower, *asleep)]
    return findings + [causes.of_waits(table, shift) for shift in crowded]


def periodic(body: Body) -> list[Finding]:
    """A pause that comes back: looked for in whole steps, in what lies outside their phases, and in their data."""
    table, times = body.table, body.times
    usable = _outside(body.shifts, len(table))
    waits = np.flatnonzero(_is_data(table))
    places = [times.excess, body.outside.excess, *(body.kinds.excess[:, i] for i in waits)]
    if body.parts is not None:  # what is explained of a step, and by how much it misses, are in proportion to it
        typical = float(np.median(table.seconds))
        places += [body.outside.excess * typical / table.seconds, score(outside_phases(table), body.work).excess]
    scales = [_core(excess, times) for excess in places]
    found = [find_period(np.where(usable, e, 0.0) / scale) for e, scale in zip(places, scales, strict=True)]
    sure = [(float(np.median(e[p.rows])) / scale, p) for e, scale, p in zip(places, scales, found, strict=True) if p]
    clearest, period = max(sure, key=lambda item: item[0], default=(0.0, None))
    finding = None
    if period is not None:
        body.taken[period.rows] = True
        body.kinds = score(table.durations, body.work, body.taken, pools_of(table))
    body.times = body.score_steps(body.taken | body.plain)
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
    if body.parts is not None:  # a layer in which threads waited took its time, and none of its own
        least = np.where(_is_data(body.table), NOTICED_AT, ALARM_AT)
        material &= (times.excess[:, None] >= _OWN * kinds.excess) & (times.z[:, None] >= least)
    kind_z = np.where(material & free[:, None], kinds.z, 0.0)
    away = np.where((body.outside.excess >= np.minimum(body.felt, MATERIAL * times.scale)) & free, body.outside.z, 0.0)
    top = np.maximum(kind_z.max(axis=1, initial=0.0), away)
    rows = np.flatnonzero((step_z >= NOTICED_AT) | (top >= ALARM_AT))
    apart = body.parts is not None
    findings = [
        causes.of_step(body.table, times, kinds, row, float(away[row]), float(body.outside.excess[row]), apart)
        for row in rows.tolist()
    ]
    short = host.too_short(body.table)
    if short:
        findings = [finding for finding in findings if finding.cause not in (SPIKE, SLOW_KERNEL)]
    if body.shared:  # a layer that was slow once is one in which a thread waited, but for the rarest
        findings = [replace(f, severity=LOW) if f.cause == SLOW_KERNEL else f for f in findings]
    # What steps waited is expected of them where `apart`: interference is then what held the process up beside it.
    return findings if apart and not short else causes.crowded(body.table, findings)


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
