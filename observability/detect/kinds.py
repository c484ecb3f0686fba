"""Kinds of span that stay slow, each held against its like: a layer against the other layers of its pass.

What holds up a whole step (another program, a clock) makes all kinds slower alike, and cancels; so a layer a third
slower shows on a machine where steps differ by more than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from observability import schema
from observability.detect import host
from observability.detect.baseline import core_scale, moving_median
from observability.detect.change import lasting_shifts
from observability.detect.sustained import LEAST_RISE, LOW, Shift, find_shifts
from observability.read import Floats, StepTable

_OFFSET: Final = 0.002  # of a step, added to each time: what takes next to nothing has no ratio to speak of
_MATERIAL: Final = 0.003  # of a step, lost in each of the slow steps
_SHARED: Final = 0.03  # the same, on a machine that other programs share all the time
_OF_NOISE: Final = 0.2  # of the sigma of the bulk of steps: less is lost in what they do anyway
_OWN_PART: Final = 0.5  # of the rise against its like, in logarithms, that the kind's own times must show
_BEYOND: Final = 1.2  # times the rise of the rest of the step
_LEAST_PEERS: Final = 2
_FEW_PEERS: Final = 4
_LEAST_SCATTER: Final = 0.3  # of the usual: the others may agree by chance
_SHARED_RISE: Final = 0.2  # of a kind's time, on a machine that others share


@dataclass(frozen=True)
class KindShift:
    """Kind number `kind` of the table is slow as `shift` says; `excess` [steps] are the seconds that it lost."""

    kind: int
    shift: Shift
    excess: Floats


def kind_shifts(table: StepTable, factor: Floats) -> list[KindShift]:
    """Kinds that stay slow, from the deepest level up: what a layer lost is not its phase's. `factor` [steps, kinds]
    is what the work of a step makes of a time.
    """
    typical = float(np.median(table.seconds))
    times = table.durations / np.where(factor > 0, factor, 1.0)
    logs = np.log(times + _OFFSET * typical)
    lost = np.zeros_like(times)
    shared = host.busy(table)
    # What steps scatter by is what matters to them, unless others make them scatter.
    noise = _OF_NOISE * core_scale(table.seconds - moving_median(table.seconds))
    least = _SHARED * typical if shared else max(_MATERIAL * typical, noise)
    found: list[KindShift] = []
    peers = _peers(table, times, logs, typical, shared)
    for level in ("kernel", "layer", "phase"):
        for k in (i for i, kind in enumerate(table.kinds) if kind.level == level):
            own = np.maximum(times[:, k] - lost[:, k], 0.0)
            if float(np.quantile(own, 0.9)) < _MATERIAL * typical:
                continue
            pool = peers.get((level, table.kinds[k].phase))
            like = _like(table, k, times, pool, own, typical)
            # Against its like noise goes both ways, so that the middle of a block is what wanders least.
            quantile = 0.5 if np.ptp(like) else LOW
            against = (own + _OFFSET * typical) * np.exp(np.median(like) - like)
            many = shared and pool is not None and len(pool.members) > _FEW_PEERS  # which never fall all at once
            if shared:
                scatter = pool.scatter(k) if many and pool is not None else None
                shifts = lasting_shifts(against, _SHARED_RISE, quantile, scatter)
            else:
                shifts = find_shifts(against, LEAST_RISE, quantile)
            for shift in shifts:
                if not many and not _is_its_own(own + _OFFSET * typical, shift):
                    continue
                if not np.ptp(like) and not _beyond(own, table.seconds - times[:, k], shift):
                    continue
                excess = _excess(own, shift, _OFFSET * typical, steady=table.kinds[k].name != schema.DATA)
                if level == "phase" and _in_layers(table, k, times, shift) > 0.5 * (shift.level - shift.healthy):
                    continue  # a whole pass that is slow is no fault of its own
                if float(np.mean(excess[shift.first : shift.last + 1])) < least:
                    continue
                found.append(KindShift(k, shift, excess))
                for outer in _around(table, k):
                    lost[:, outer] += excess
    return found


class _Peers:
    """The kinds of one level and pass that matter, in order of time by step; a median over all but one is at hand."""

    def __init__(self, members: list[int], logs: Floats) -> None:
        self.members = members
        self._own = logs[:, members] - np.median(logs[:, members], axis=0)
        self._sorted = np.sort(self._own, axis=1)

    def without(self, k: int) -> Floats:
        """The median of the others by step, of logarithms over their own medians."""
        count = len(self.members)
        if k not in self.members:
            return np.median(self._sorted, axis=1)
        own = self._own[:, self.members.index(k)]
        rank = np.sum(self._sorted < own[:, None], axis=1)
        low, high = (count - 2) // 2, (count - 1) // 2  # places of the middle among count - 1
        steps = np.arange(len(own))
        parts = [self._sorted[steps, np.where(place < rank, place, place + 1)] for place in (low, high)]
        result: Floats = (parts[0] + parts[1]) / 2
        return result

    def scatter(self, k: int) -> Floats:
        """By how much the others differ among themselves by step: where they do, kind `k` may as well."""
        own = self._own[:, [place for place, member in enumerate(self.members) if member != k]]
        apart = np.sqrt(np.mean((own - self.without(k)[:, None]) ** 2, axis=1))
        result: Floats = np.maximum(apart, max(_LEAST_SCATTER * float(np.median(apart)), 1e-6))
        return result


def _peers(
    table: StepTable, times: Floats, logs: Floats, typical: float, shared: bool
) -> dict[tuple[str, str], _Peers]:
    """By level and pass. Where others share the machine, a few scatter too much: all passes' then stand for each."""
    members: dict[tuple[str, str], list[int]] = {}
    for i, kind in enumerate(table.kinds):
        if kind.level != "phase" and float(np.median(times[:, i])) > _MATERIAL * typical:
            members.setdefault((kind.level, kind.phase), []).append(i)
    if shared:
        of_level = {
            level: [i for (of, _), alike in members.items() if of == level for i in alike] for level, _ in members
        }
        members = {pool: alike if len(alike) > _FEW_PEERS else of_level[pool[0]] for pool, alike in members.items()}
    return {pool: _Peers(alike, logs) for pool, alike in members.items()}


def _like(table: StepTable, k: int, times: Floats, peers: _Peers | None, own: Floats, typical: float) -> Floats:
    """Logarithm of what kind `k` is held against, by step: its like, or the rest of the step."""
    kind = table.kinds[k]
    if kind.name == schema.DATA and kind.level == "phase":
        return np.zeros(len(own))  # the host makes batches while the GPU computes
    if peers is not None and len(peers.members) - (k in peers.members) >= _LEAST_PEERS:
        return peers.without(k)
    rest: Floats = np.log(np.maximum(table.seconds - times[:, k], _OFFSET * typical))
    return rest


def _is_its_own(own: Floats, shift: Shift) -> bool:
    """Whether the kind's own times rose, and not only its like fell."""
    middle = (shift.first + shift.last) // 2 if shift.slope else shift.first
    outside = np.ones(len(own), dtype=bool)
    outside[shift.first : shift.last + 1] = False
    rise = float(np.log(np.median(own[middle : shift.last + 1])) - np.log(np.median(own[outside])))
    return rise >= _OWN_PART * float(np.log(shift.level / shift.healthy))


def _beyond(own: Floats, rest: Floats, shift: Shift) -> bool:
    """Whether a kind that was held against itself alone rose by more than the rest of its steps did."""
    inside = np.zeros(len(own), dtype=bool)
    inside[shift.first : shift.last + 1] = True

    def rise(times: Floats) -> float:
        was = float(np.median(times[~inside]))
        return float(np.median(times[inside])) / was if was > 0 else float("inf")

    return rise(own) > _BEYOND * rise(rest)


def _excess(own: Floats, shift: Shift, offset: float, steady: bool) -> Floats:
    """Seconds lost by step: in proportion where the kind varies with the machine (`steady`), else over its level."""
    result = np.zeros(len(own))
    rows = np.arange(shift.first, shift.last + 1)
    if steady and not shift.slope:
        result[rows] = own[rows] * (1 - shift.healthy / shift.level)
    else:
        result[rows] = np.maximum(own[rows] + offset - shift.healthy, 0.0)
    return result


def _in_layers(table: StepTable, k: int, times: Floats, shift: Shift) -> float:
    """Seconds that the layers of phase `k` rose by with the shift."""
    layers = [i for i in _inside(table, k) if table.kinds[i].level == "layer"]
    inside = slice(shift.first, shift.last + 1)
    outside = np.ones(len(times), dtype=bool)
    outside[inside] = False
    rise = np.median(times[inside][:, layers], axis=0) - np.median(times[outside][:, layers], axis=0)
    return float(np.sum(np.maximum(rise, 0.0)))


def _inside(table: StepTable, k: int) -> list[int]:
    phase = table.kinds[k].name
    return [i for i, kind in enumerate(table.kinds) if kind.level == "layer" and kind.phase == phase]


def _around(table: StepTable, k: int) -> list[int]:
    """The phase that a layer lies in; where a kernel lies is not kept."""
    kind = table.kinds[k]
    return [
        i for i, o in enumerate(table.kinds) if kind.level == "layer" and o.level == "phase" and o.name == kind.phase
    ]
