"""A run's own checkpoints: weights, optimizer moments and counters, data position, and what makes the run itself.

A checkpoint is a folder `checkpoint-000123`, written under another name and renamed, so that it is whole or absent.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from entrenar_gpu.adapters import RUN_FILE, WEIGHTS_FILE, load_adapter, name_in_file, save_adapter
from entrenar_gpu.errors import UserError
from entrenar_gpu.export import carried_sources, copy_model_files, name_to_write, save_checkpoint
from entrenar_gpu.files import (
    WHOLE,
    SafetensorsFile,
    TensorSource,
    cannot_write,
    checksums_of,
    checksums_of_writes,
    new_folder,
    read_json,
    remove,
    save_safetensors,
    sync_folder,
    temporary_path,
    write_text,
)
from entrenar_gpu.graph import Tensor
from entrenar_gpu.model import INDEX_FILE, SINGLE_FILE, HFCheckpoint, WeightTensors
from entrenar_gpu.ops.gemm.tiles import CANDIDATES, is_choice
from entrenar_gpu.ops.optimizer import STATE_FIELDS
from entrenar_gpu.session import LOSS_SCALE_NAME, STATE_NAME, BaseIdentity, Session, load_weights, write_adapter
from entrenar_gpu.train.metrics_file import METRICS_FILE, MetricsFile, SamplesFile

OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "trainer_state.json"
# The fields of the optimizer's state that a next step reads: a skipped one leaves its loss and norm in others.
_LASTING = list(map(STATE_FIELDS.index, ("taken", "skipped", "in_a_row", "correction1", "correction2", "steady")))
_NAME = re.compile(r"checkpoint-(\d+)")

# What a resumed run must share with the one it goes on from; learning rate, steps and saving may change.
IDENTITY = (
    *("method", "rank", "alpha", "target", "layers", "layers_to_transform", "rslora", "dropout", "double_quant"),
    *("modules_to_save", "trainable_token_indices"),
    *("batch", "seq", "accumulate"),
    *("optimizer", "momentum", "beta1", "beta2", "eps", "clip", "label_smoothing", "seed", "precision"),
    *("neftune", "lr_ratio_b"),
)


def save_result(session: Session, folder: Path) -> None:
    """The trained weights as others read them: a PEFT adapter, or after full training a model folder."""
    if session.adapters is not None:
        save_adapter(folder, session.adapters, session.adapter_values(), session.config.model)
        return
    copy_model_files(session.checkpoint.folder, folder, "float32", session.checkpoint.config.tie_word_embeddings)
    trained = [_full_source(session, weight) for weight in session.weights]
    save_checkpoint(folder, [*trained, *carried_sources(session.checkpoint)])


def trained_tensors(session: Session) -> dict[str, np.ndarray]:
    """What `save_result` would write, by name."""
    if session.adapters is not None:
        return {name_in_file(name): values for name, values in session.adapter_values().items()}
    return {source.name: source.produce() for source in (_full_source(session, weight) for weight in session.weights)}


def _full_source(session: Session, weight: WeightTensors) -> TensorSource:
    def produce() -> np.ndarray:
        parts = [session.executor.read(tensor.name) for tensor in weight.tensors]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    name = name_to_write(session.checkpoint, weight.spec.name)
    return TensorSource(name, weight.spec.shape, "F32", produce)


def save_run(
    session: Session,
    output: Path,
    step: int,
    data_state: Mapping[str, Any],
    started: datetime,
    run_id: str,
    keep: int | None,
    spared: Path | None = None,
) -> Path:
    """Write `output/checkpoint-STEP` and drop the oldest beyond `keep`, but for `spared`; returns it."""
    target = output / f"checkpoint-{step:06}"
    temporary = temporary_path(target)
    try:
        temporary.mkdir(parents=True)
        with checksums_of_writes() as sums:
            save_result(session, temporary)
            kept = {name: session.executor.read(name) for name in _optimizer_tensors(session)}
            save_safetensors(temporary / OPTIMIZER_FILE, kept)
        state: dict[str, Any] = {
            "step": step,
            "started": started.isoformat(),
            "run_id": run_id,
            "data": dict(data_state),
            "config": session.config.to_mapping(),
            "model": _base(session).value(),
            "tiles": {name: list(numbers) for name, numbers in session.tiles.items()},
            "budget": None if session.budget is None else session.budget.nbytes,
            "engine": session.engine,
            "arithmetic": session.arithmetic,
            "checksums": {path.relative_to(temporary).as_posix(): parts for path, parts in sums.items()},
        }
        state["checksum"] = _state_checksum(state)
        write_text(temporary / STATE_FILE, json.dumps(state, indent=2) + "\n")
        _remove(target)
        os.rename(temporary, target)
        sync_folder(output)
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        remove(temporary)
    if keep is not None:
        for old in find_checkpoints(output)[:-keep]:
            if old != spared:
                _remove(old)
    return target


def _base(session: Session) -> BaseIdentity:
    """What the session's base is told by; a session that was not opened for training makes it now."""
    if session.base is None:
        session.base = BaseIdentity(session.checkpoint)
    return session.base


def _optimizer_tensors(session: Session) -> dict[str, Tensor]:
    """Moments and counters of a run, and the scale of its loss, by name; all are f32."""
    counters = (STATE_NAME, LOSS_SCALE_NAME)
    return {n: t for n, t in session.executor.tensors.items() if t.role == "moment" or n in counters}


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint under another name: one that is half deleted must not be taken for a whole one."""
    if checkpoint.exists():
        doomed = temporary_path(checkpoint)
        os.rename(checkpoint, doomed)
        remove(doomed)


def find_checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    found = [p for p in output.glob("checkpoint-*") if _NAME.fullmatch(p.name) and (p / STATE_FILE).is_file()]
    return sorted(found, key=_step_in_name)


def _step_in_name(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def resumed_run(resume: str | None, output: Path) -> SavedRun | None:
    """What --resume names; None without it.

    Raises UserError when that is no checkpoint, and when `output` cannot be written or holds another run or a model.
    """
    _check_writable(output)
    saved = None if resume is None else read_state(_resolve_resume(resume, output))
    used = any((output / name).exists() for name in (METRICS_FILE, WEIGHTS_FILE, SINGLE_FILE, INDEX_FILE))
    if used and not _never_saved(output) and (saved is None or not saved.lies_in(output)):
        other = "use --resume alone, or another folder" if find_checkpoints(output) else "use another folder"
        raise UserError(f"--output: {output} already holds a run or a model; {other}")
    return saved


def _never_saved(output: Path) -> bool:
    """Whether a run began here and was killed before its first checkpoint: there is nothing to lose."""
    result = any((output / name).exists() for name in (WEIGHTS_FILE, SINGLE_FILE, INDEX_FILE))
    return (output / RUN_FILE).is_file() and not result and not find_checkpoints(output)


def _check_writable(output: Path) -> None:
    """Raise UserError for a folder that cannot be made or written to, before a model is loaded for it."""
    missing = [folder for folder in (output, *output.parents) if not os.path.exists(folder)]
    try:
        new_folder(output)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise cannot_write(output, error) from None
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _resolve_resume(resume: str, output: Path) -> Path:
    """The checkpoint that --resume names: a folder, or the newest of the run."""
    if resume != "latest":
        folder = Path(resume)
        if not (folder / STATE_FILE).is_file():
            newest = find_checkpoints(folder)
            if not newest:
                raise UserError(f"--resume: {folder} is not a checkpoint: it holds no {STATE_FILE}")
            folder = newest[-1]
        return folder
    found = find_checkpoints(output)
    if not found:
        raise UserError(f"--resume: {output} holds no checkpoint")
    return found[-1]


@dataclass(frozen=True)
class SavedRun:
    """What a checkpoint says of its run. `started` is the clock that chat templates saw, `data` a batch iterator's
    state, `config` the options, `model` the identity of the base model, `tiles` the measured blockings of products,
    `budget` the bytes of device memory that it planned for, where it did, `engine` what ran its graphs, `arithmetic`
    that of projections, where it is told, which names the scheme of scales, `run_id` the run itself, where it is told,
    `checksums` what `checksums` made of the folder."""

    path: Path
    step: int
    started: datetime
    data: dict[str, Any]
    config: dict[str, Any]
    model: dict[str, Any]
    tiles: dict[str, tuple[int, ...]]
    budget: int | None
    engine: str
    arithmetic: str | None
    run_id: str | None
    checksums: dict[str, dict[str, str]]

    def lies_in(self, output: Path) -> bool:
        """Whether this is a checkpoint of the run in `output`."""
        folder = self.path.parent
        places = Path(os.path.abspath(folder)).parent, folder.resolve().parent  # it may be a link to another disk
        return output.exists() and any(os.path.samefile(place, output) for place in places)


def forget_after(saved: SavedRun | None, output: Path) -> None:
    """Drop the later checkpoints and metrics of the run in `output`, if that is the one that goes on from `saved`: it
    will make others, and the next --resume must not take up what was abandoned. Without `saved`, drop the metrics of a
    run that ended before its first checkpoint."""
    lines = (MetricsFile(output), SamplesFile(output))
    if saved is None or not saved.lies_in(output):
        for file in lines:
            file.truncate(-1)
        return
    for later in reversed(find_checkpoints(output)):  # a kill on the way leaves none that follows a gap
        if _step_in_name(later) > saved.step and not os.path.samefile(later, saved.path.parent):
            _remove(later)
    for file in lines:
        file.truncate(saved.step)


def read_state(folder: Path) -> SavedRun:
    """The state in a checkpoint folder. Raises UserError when the file holds something else."""
    path = folder / STATE_FILE
    state: Any = None
    with contextlib.suppress(UserError):  # whatever it is, it is no state
        state = read_json(path)
    try:
        if "checksum" in state and state["checksum"] != _state_checksum(state):
            raise UserError(f"{path}: damaged: its checksum is another than when it was written")
        step, budget, run_id = state["step"], state["budget"], state.get("run_id")
        engine = str(state.get("engine", "wgpu"))  # the only one that the first release had
        started = datetime.fromisoformat(state["started"])
        tiles = {name: tuple(map(int, numbers)) for name, numbers in state["tiles"].items()}
        data, config, model = state["data"], state["config"], state["model"]
        counts = _is_count(step) and (budget is None or (_is_count(budget) and budget > 0))
        objects = all(isinstance(part, dict) for part in (data, config, model))
        if not (counts and objects and all(is_choice(*item) for item in tiles.items())):
            raise ValueError
        told = None if run_id is None else str(run_id)
        sums = state.get("checksums", {})  # checkpoints of the first release have none
        if not isinstance(sums, dict) or not all(isinstance(part, dict) for part in sums.values()):
            raise ValueError
        if any(".." in Path(name).parts or Path(name).is_absolute() for name in sums):
            raise ValueError
        # Before there was another scheme, int8 had a scale for every 64 values.
        arithmetic = state.get("arithmetic", "int8" if config.get("precision") == "int8" else None)
        if arithmetic not in (None, *CANDIDATES):
            raise ValueError
        return SavedRun(path, step, started, data, config, model, tiles, budget, engine, arithmetic, told, sums)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise UserError(f"{path}: not the state of a training run") from None


def _is_count(value: object) -> bool:
    """A whole number >= 0 that a float holds exactly."""
    return type(value) is int and 0 <= value < 2**53


def checksums(folder: Path) -> dict[str, dict[str, str]]:
    """The checksums of all that is in a checkpoint's folder, by the files' names in it."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != STATE_FILE]
    return {path.relative_to(folder).as_posix(): checksums_of(path) for path in paths}


def _state_checksum(state: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in state.items() if key != "checksum"}
    return xxhash.xxh3_64_hexdigest(json.dumps(rest, sort_keys=True).encode())


def _verify(saved: SavedRun) -> None:
    """Raise UserError naming file and tensor where a checkpoint's files are not as they were written."""
    for name, sums in saved.checksums.items():
        path = saved.path.parent / name
        try:
            found = checksums_of(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
        wrong = [part for part in sums.keys() | found.keys() if sums.get(part) != found.get(part)]
        if wrong:
            what = f"tensor {min(wrong)!r}" if wrong != [WHOLE] else "its contents"
            raise UserError(f"{path}: damaged: {what}: the checksum is another than when it was written")


def load_run(session: Session, saved: SavedRun) -> None:
    """Put a checkpoint's weights, moments and counters on the device.

    Raises UserError when it is the checkpoint of another run: another model, method, adapter, batch or optimizer; or
    when its files are damaged.
    """
    folder = saved.path.parent
    if not _base(session).is_that_of(saved.model):
        raise UserError(f"{saved.path}: the checkpoint of another model than {session.config.model}")
    now = session.config.to_mapping()
    for key in IDENTITY:
        if saved.config.get(key) != now[key]:
            raise UserError(f"{saved.path}: made with {key} {saved.config.get(key)!r}, this run has {now[key]!r}")
    _verify(saved)
    if saved.arithmetic not in (None, session.arithmetic):
        changed = f"in {saved.arithmetic} and go on in {session.arithmetic}"
        print(f"projections were multiplied {changed}: they round differently from here on", file=sys.stderr)
    _load_weights(session, folder)
    _load_optimizer(session, folder / OPTIMIZER_FILE)


def _load_optimizer(session: Session, path: Path) -> None:
    file, wanted = SafetensorsFile(path), _optimizer_tensors(session)
    if file.tensors.keys() != wanted.keys():
        raise UserError(f"{path}: holds other tensors than this run's optimizer")
    for name, tensor in wanted.items():
        info = file.tensors[name]
        if info.shape != tensor.shape or info.dtype != "F32":
            raise UserError(f"{path}: tensor {name!r} does not fit this run")
        values = file[name]
        if not np.isfinite(values[_LASTING] if name == STATE_NAME else values).all():
            raise UserError(f"{path}: tensor {name!r} holds numbers that are not finite")
        session.executor.write(name, values)


def _load_weights(session: Session, folder: Path) -> None:
    if session.adapters is None:
        load_weights(session.executor, HFCheckpoint.open(folder), session.weights)
        return
    spec, values = load_adapter(folder, session.checkpoint.config)
    if spec.shapes() != session.adapters.shapes():
        raise UserError(f"{folder}: its adapter has other modules or ranks than this run's")
    write_adapter(session.executor, spec, values)
