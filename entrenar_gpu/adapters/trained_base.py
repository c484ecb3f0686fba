"""The base that an adapter was trained on, as the run beside it says: NF4, or the weights as they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from entrenar_gpu.errors import UserError
from entrenar_gpu.files import read_json_object

RUN_FILE = "run.json"  # of a run folder, the first file that a run writes: its options


@dataclass(frozen=True)
class TrainedBase:
    """`source` is the file that says so."""

    method: str
    double_quant: bool
    source: Path


def trained_base(adapter: str | Path) -> TrainedBase | None:
    """Of an adapter in a run folder or one of its checkpoints; None where no run lies beside it.

    Raises UserError naming the file when that is no run's.
    """
    folder = Path(adapter)
    for path in (folder / RUN_FILE, folder.resolve().parent / RUN_FILE):
        if path.is_file():
            config = read_json_object(path).get("config")
            config = config if isinstance(config, dict) else {}
            method = config.get("method")
            if method not in ("qlora", "lora", "full"):
                raise UserError(f"{path}: not the options of a training run")
            return TrainedBase(method, config.get("double_quant") is not False, path)
    return None
