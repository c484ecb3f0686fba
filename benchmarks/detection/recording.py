"""Recorded step times: a trace of a real run, kept as a small file of columns.

The file (NumPy .npz, no pickled objects) holds `seconds` [steps], `durations` [steps, kinds], `row_tokens` [steps],
what the host did [steps] (`HOST_VALUES`; NaN where it did not tell) and `about`, a JSON text with the kinds of span
and where the times come from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from observability.read.step_table import HOST_VALUES, Kind, StepTable

FILE = Path(__file__).with_name("recorded.npz")


def save(table: StepTable, path: Path, about: dict[str, Any]) -> None:
    kinds = [[kind.level, kind.name, kind.shape, kind.phase] for kind in table.kinds]
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(
        temporary,
        seconds=table.seconds.astype(np.float32),
        durations=table.durations.astype(np.float32),
        row_tokens=table.values["row_tokens"].astype(np.float32),
        **{key: table.values[key].astype(np.float32) for key in HOST_VALUES if key in table.values},
        about=np.array(json.dumps({**about, "kinds": kinds})),
    )
    os.replace(temporary, path)


def load(path: Path = FILE) -> tuple[StepTable, dict[str, Any]]:
    """The recorded steps, numbered from 1, and what is known of the recording."""
    with np.load(path, allow_pickle=False) as stored:
        seconds, durations, tokens = (stored[key].astype(np.float64) for key in ("seconds", "durations", "row_tokens"))
        about = json.loads(str(stored["about"]))
        host = {key: stored[key].astype(np.float64) for key in HOST_VALUES if key in stored}
    return _table(seconds, durations, tokens, [Kind(*kind) for kind in about["kinds"]], host), about


def rows(table: StepTable, chosen: np.ndarray) -> StepTable:
    """The chosen rows, in order, as a run of its own."""
    host = {key: table.values[key][chosen] for key in HOST_VALUES if key in table.values}
    return _table(table.seconds[chosen], table.durations[chosen], table.values["row_tokens"][chosen], table.kinds, host)


def _table(
    seconds: np.ndarray,
    durations: np.ndarray,
    tokens: np.ndarray,
    kinds: Iterable[Kind],
    host: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> StepTable:
    count = len(seconds)
    nothing = np.full(count, np.nan)
    told = ("loss", "learning_rate", "grad_norm", "allocated_bytes", "flops", "epoch")
    return StepTable(
        step=np.arange(1, count + 1),
        start=np.concatenate([[0.0], np.cumsum(seconds)[:-1]]),
        seconds=seconds,
        wall_seconds=seconds.copy(),
        skipped=np.zeros(count, dtype=bool),
        values={"tokens": tokens, "row_tokens": tokens} | dict.fromkeys(told, nothing) | host,
        kinds=tuple(kinds),
        durations=durations,
    )
