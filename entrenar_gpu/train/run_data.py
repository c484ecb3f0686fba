"""The data of a run: sources to samples, and samples to the batches of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from entrenar_gpu.config import TrainConfig
from entrenar_gpu.data import (
    Reading,
    RowSource,
    Samples,
    Tokenizer,
    TrainBatches,
    files_of,
    find_sources,
    parse_columns,
    parse_mix,
    read_samples,
)
from entrenar_gpu.errors import UserError
from entrenar_gpu.model import load_model_config, resolve_model

Groups = Sequence[Sequence[RowSource]]


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


def load_data(config: TrainConfig, started: datetime) -> tuple[Samples, Samples | None]:
    """Tokenised training and evaluation data of a run that began at `started`."""
    reader = DataReader(config, started)
    groups, held_out = train_sources(config), eval_sources(config)
    if config.eval_every is not None and not held_out:
        raise UserError("--eval-every: no evaluation data; give --eval-data, or a valid file in a --data folder")
    return reader.read(groups), reader.read([held_out]) if held_out else None


def train_sources(config: TrainConfig, part: str = "train") -> list[list[RowSource]]:
    """The sources of each --data. Raises UserError where there is none, or --mix is not about them."""
    if not all(config.data_names):
        raise UserError("--data: missing")
    parse_mix(config.mix, len(config.data_names))
    return [find_sources(name, part, config.split) for name in config.data_names]


def eval_sources(config: TrainConfig) -> list[RowSource]:
    """What --eval-data names, or else --eval-split of --data, or the valid files of its folders."""
    if config.eval_data is not None:
        return find_sources(config.eval_data, "valid", config.eval_split or config.split, "--eval-data")
    if config.eval_split is not None:
        return [s for name in config.data_names for s in find_sources(name, "valid", config.eval_split)]
    folders = [name for name in config.data_names if files_of(Path(name), "valid")]
    return [source for name in folders for source in find_sources(name, "valid")]


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
