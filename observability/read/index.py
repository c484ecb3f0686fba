"""What was found out of a long trace, kept beside it, so that it need not be read again: some hundred bytes a step.

`trace.index.npz` has the table of steps and a signature of the files that it was made from. An index that does not
belong to them any more, or cannot be read, is as good as none; where none can be written, none is.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np

from observability.errors import TraceError
from observability.files import write_whole
from observability.read.kernel_sums import KernelGroup, KernelSums
from observability.read.span_table import Floats, printable
from observability.read.step_table import Kind, Pause, StepTable, Told

_NAME: Final = "trace.index.npz"
_FORMAT: Final = 1
_MOST_BYTES: Final = 2**31  # unpacked
_UNREADABLE: Final = (
    OSError, EOFError, ValueError, KeyError, TypeError, IndexError, RecursionError, zlib.error, zipfile.BadZipFile,
)  # fmt: skip
_COLUMNS: Final = ("step", "start", "skipped", "between", "gpu_seconds")
_NANOSECONDS: Final = ("seconds", "wall_seconds", "durations")  # kept as whole numbers, which pack better


def load(files: Sequence[Path]) -> tuple[StepTable, int] | None:
    """(table, number of spans) of the trace in `files`; None where no index tells."""
    try:
        with np.load(_path(files), allow_pickle=False) as stored:
            if sum(entry.file_size for entry in stored.zip.infolist()) > _MOST_BYTES:
                return None
            about = _clean(json.loads(str(stored["about"])))
            if about["signature"] != _signature(files):
                return None
            columns = {name: stored[name] for name in _COLUMNS}
            columns |= {name: stored[name] / 1e9 for name in _NANOSECONDS}
            values = {key: stored[f"values.{key}"] for key in about["values"]}
            throttle = stored["throttle"].astype(str)
            kernels = _kernels(about, stored) if about["kernels"] is not None else None
        table = StepTable(
            values=values,
            kinds=tuple(Kind(*kind) for kind in about["kinds"]),
            pauses=tuple(Pause(**pause) for pause in about["pauses"]),
            restarts=tuple(about["restarts"]),
            facts=about["facts"],
            notes=tuple(about["notes"]),
            began_ns=about["began_ns"],
            throttle=throttle,
            told=tuple(Told(**told) for told in about["told"]),
            kernels=kernels,
            **columns,
        )
        return (table, int(about["spans"])) if _is_whole(table) else None
    except (
        zipfile.BadZipFile,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        EOFError,
        RecursionError,
        zlib.error,
    ):
        return None


def save(files: Sequence[Path], table: StepTable, spans: int) -> None:
    """Keep `table` of the trace in `files`, which has so many spans, where that can be written."""
    about: dict[str, Any] = {
        "signature": _signature(files),
        "spans": spans,
        "kinds": [[kind.level, kind.name, kind.shape, kind.phase] for kind in table.kinds],
        "values": list(table.values),
        "pauses": [asdict(pause) for pause in table.pauses],
        "told": [asdict(told) for told in table.told],
        "restarts": list(table.restarts),
        "facts": table.facts,
        "notes": list(table.notes),
        "began_ns": table.began_ns,
        "kernels": None if table.kernels is None else [asdict(group) for group in table.kernels.groups],
    }
    arrays = {name: getattr(table, name) for name in _COLUMNS}
    arrays |= {name: _whole(getattr(table, name)) for name in _NANOSECONDS}
    arrays |= {f"values.{key}": column for key, column in table.values.items()}
    arrays["throttle"] = table.throttle.astype("S64")
    if table.kernels is not None:
        arrays |= {"kernels.steps": table.kernels.steps, "kernels.seconds": _whole(table.kernels.seconds)}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, about=np.array(json.dumps(about)), **arrays)

    with contextlib.suppress(TraceError):
        write_whole(_path(files), write)


def _path(files: Sequence[Path]) -> Path:
    return files[-1].with_name(_NAME)


def _signature(files: Sequence[Path]) -> list[Any]:
    """What the index was made from: its own format, and each file with its size and time."""
    stats = [(path, path.stat()) for path in files]
    return [_FORMAT, *([path.name, stat.st_size, stat.st_mtime_ns] for path, stat in stats)]


def _whole(seconds: Floats) -> Any:
    nanoseconds = np.round(seconds * 1e9)
    return nanoseconds.astype(np.uint32 if nanoseconds.max(initial=0) < 2**32 else np.uint64)


def _kernels(about: dict[str, Any], stored: Any) -> KernelSums:
    groups = tuple(KernelGroup(**group) for group in about["kernels"])
    return KernelSums(stored["kernels.steps"], groups, stored["kernels.seconds"] / 1e9)


def _clean(value: Any) -> Any:
    """`value` of JSON with texts fit for terminals and pages, as the reader of traces makes them."""
    if isinstance(value, str):
        return printable(value, len(value))
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return {key: _clean(item) for key, item in value.items()} if isinstance(value, dict) else value


def _is_whole(table: StepTable) -> bool:
    """Whether the columns belong together: somebody else may have made the file."""
    count, sums = len(table.step), table.kernels
    lengths = {len(column) for column in (table.seconds, table.start, table.between, table.skipped, table.throttle)}
    lengths |= {len(column) for column in (table.wall_seconds, *table.values.values())}
    return (
        lengths == {count}
        and count > 0
        and len(table.gpu_seconds) in (0, count)
        and table.durations.shape == (count, len(table.kinds))
        and (sums is None or sums.seconds.shape == (len(sums.steps), len(sums.groups)))
    )
