"""The data of a run: sources to samples, and samples to the batches of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from entrenar_gpu.config import TrainConfig
from entrenar_gpu.data import (
    Reading,
    RowSource,
    Samples,
    Stream,
    StreamBatches,
    Tokenizer,
    TrainBatches,
    files_of,
    find_sources,
    given_sources,
    parse_columns,
    parse_mix,
    paths_of,
    read_samples,
)
from entrenar_gpu.errors import UserError
from entrenar_gpu.model import load_model_config, resolve_model

Groups = Sequence[Sequence[RowSource]]
Batches = TrainBatches | StreamBatches


class DataReader:
    """Reads the rows that a configuration names, or that a caller has, for its model."""

    def __init__(self, config: TrainConfig, now: datetime | None = None) -> None:
        self.config = config
        folder = resolve_model(config.model, weights=False)
        # Some chat templates write the date, `now`.
        self.tokenizer = Tokenizer.load(folder, now) if (folder / "tokenizer.json").is_file() else None
        columns = parse_columns(config.map)
        self.reading = Reading(load_model_config(folder).vocab_size, config.loss_on, config.completions, columns)

    def read(self, groups: Groups) -> Samples:
        return read_samples(groups, self.tokenizer, self.reading, self.config.seq)

    def named(self, part: str = "train") -> Samples:
        """The samples of --data: of a folder its files for `part`, "train" or "valid"."""
        return self.read(train_sources(self.config, part))


def load_data(
    config: TrainConfig, started: datetime, data: Any = None, eval_data: Any = None
) -> tuple[Batches, Samples | None]:
    """The steps of a run that began at `started`, and its evaluation data.

    `data` and `eval_data` are what a program has instead of --data and --eval-data (see data/given.py).
    """
    reader = DataReader(config, started)
    groups: Groups | Stream = (
        train_sources(config) if data is None else given_sources(data, "data", config.seq, config.split)
    )
    held_out = eval_sources(config, data) if eval_data is None else ending_sources(eval_data, "eval_data", config)
    if config.eval_every is not None and not held_out:
        raise UserError("--eval-every: no evaluation data; give --eval-data, or a valid file in a --data folder")
    if not isinstance(groups, Stream):
        parse_mix(config.mix, len(groups))
    elif config.steps is None:
        groups = groups.to_the_end()
    evaluation = reader.read(held_out) if held_out else None
    if isinstance(groups, Stream):
        return StreamBatches(
            groups,
            reader.tokenizer,
            reader.reading,
            batch=config.batch,
            seq=config.seq,
            accumulate=config.accumulate,
            pack=config.pack,
        ), evaluation
    return train_batches(config, reader.read(groups)), evaluation


def ending_sources(data: Any, name: str, config: TrainConfig) -> Groups:
    """The sources of an argument `name` whose rows are all read."""
    found = given_sources(data, name, config.seq, config.eval_split or config.split)
    return found.to_the_end() if isinstance(found, Stream) else found


def train_sources(config: TrainConfig, part: str = "train") -> list[list[RowSource]]:
    """The sources of each --data. Raises UserError where there is none, or --mix is not about them."""
    if not all(config.data_names):
        raise UserError("--data: missing")
    parse_mix(config.mix, len(config.data_names))
    if config.split is not None and all(Path(name).is_file() for name in config.data_names):
        raise UserError(f"--split: {config.data_names[0]} is a file, and has none; it is for data sets of the Hub")
    return [find_sources(name, part, config.split) for name in config.data_names]


def eval_sources(config: TrainConfig, data: Any = None) -> Groups:
    """What --eval-data names, or else --eval-split of --data, or the valid files of its folders, which count as one.

    With `data` of a program's own in place of --data, that counts where it is a path or paths.
    """
    if config.eval_data is not None:
        return [find_sources(config.eval_data, "valid", config.eval_split or config.split, "--eval-data")]
    names = config.data_names if data is None else paths_of(data)
    if config.eval_split is not None:
        if file := next((name for name in names if Path(name).is_file()), None):
            raise UserError(f"--eval-split: {file} is a file, and has none; give --eval-data")
        found = [s for name in names for s in find_sources(name, "valid", config.eval_split)]
    else:
        found = [s for name in names if files_of(Path(name), "valid") for s in find_sources(name, "valid")]
    return [found] if found else []


DEFAULT_EPOCHS = 3.0


def planned_steps(config: TrainConfig, batches: Batches) -> int:
    """--steps, or as many as --epochs take."""
    if config.steps is not None:
        return config.steps
    assert isinstance(batches, TrainBatches)
    return max(batches.steps(DEFAULT_EPOCHS if config.epochs is None else config.epochs), 1)


def evaluation_steps(config: TrainConfig, batches: Batches, evaluates: bool) -> int | None:
    """After how many steps each the run is evaluated: --eval-every, or what --eval-epochs comes to."""
    for name in ("eval_every", "eval_epochs", "patience", "keep_best"):
        if getattr(config, name) and not evaluates:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}: no evaluation data; give --eval-data, or a valid file in a --data folder")
    if config.eval_epochs is None:
        return config.eval_every
    if config.eval_every is not None:
        raise UserError("--eval-epochs: give it or --eval-every, not both")
    if not isinstance(batches, TrainBatches):
        raise UserError("--eval-epochs: rows that come one by one have no passes; give --eval-every")
    return max(batches.steps(config.eval_epochs), 1)


def train_batches(config: TrainConfig, samples: Samples) -> TrainBatches:
    """The steps of a run, in order, without end."""
    return TrainBatches(
        samples,
        batch=config.batch,
        seq=config.seq,
        accumulate=config.accumulate,
        seed=config.seed,
        shuffle=config.shuffle,
        pack=config.pack,
        mix=parse_mix(config.mix, len(samples.groups)),
    )
