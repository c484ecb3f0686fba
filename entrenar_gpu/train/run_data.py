"""The data of a run: files to samples, and samples to the batches of its steps."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from entrenar_gpu.config import TrainConfig
from entrenar_gpu.data import Samples, Tokenizer, TrainBatches, data_files, load_samples
from entrenar_gpu.errors import UserError
from entrenar_gpu.model import load_model_config, resolve_model


def load_data(config: TrainConfig, started: datetime) -> tuple[Samples, Samples | None]:
    """Tokenised training and evaluation data of a run that began at `started`."""
    folder = resolve_model(config.model)
    model = load_model_config(folder)
    tokenizer = Tokenizer.load(folder, started) if (folder / "tokenizer.json").is_file() else None
    train, held_out = data_files(config.data, config.eval_data)
    if config.eval_every is not None and held_out is None:
        raise UserError("--eval-every: no evaluation data; give --eval-data, or valid.jsonl in a --data folder")

    def read(path: Path) -> Samples:
        return load_samples(
            path,
            tokenizer,
            vocab_size=model.vocab_size,
            seq=config.seq,
            loss_on=config.loss_on,
            completions=config.completions,
        )

    return read(train), read(held_out) if held_out is not None else None


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
    )
