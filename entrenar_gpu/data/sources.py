"""What `--data` and `--eval-data` name, opened: files, folders, data sets of the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entrenar_gpu.data.lines import Row
from entrenar_gpu.data.opened import SUFFIXES, suffix_of
from entrenar_gpu.data.rows import RowSource, open_file, without_nan
from entrenar_gpu.errors import UserError

# A file of a folder by what it is for; the first name that is there is taken.
PARTS = {"train": ("train",), "valid": ("valid", "validation")}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_HUB_NAME = re.compile(r"[\w-]+(:[\w.-]+)?")  # without an owner: only where --split says that it is one


class DataSet:
    """A split of a data set of the Hub, which `datasets` downloads once, or of a folder that it saved."""

    def __init__(self, name: str, split: str | None, flag: str) -> None:
        self.name, self._split, self._flag = name, split or "train", flag

    def place(self, number: int) -> str:
        return f"{self.name}: row {number}"

    def __iter__(self) -> Iterator[Row]:
        for number, record in enumerate(self._open(), 1):
            yield Row(number, without_nan(record))

    def _open(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise UserError(
                f"{self._flag}: {self.name} is no file here; a data set of the Hub needs the extra:"
                " pip install 'entrenar-gpu[datasets]'"
            ) from None
        try:
            if Path(self.name).is_dir():
                found = datasets.load_from_disk(self.name)
                return found[self._split] if isinstance(found, datasets.DatasetDict) else found
            owner, _, subset = self.name.partition(":")
            return datasets.load_dataset(owner, subset or None, split=self._split)
        except Exception as error:  # whatever the library, the network or the data set's own files come up with
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{self._flag}: {self.name}, split {self._split!r}: {reason}") from None


def find_sources(
    name: str | Path, part: str = "train", split: str | None = None, flag: str = "--data"
) -> list[RowSource]:
    """The files, or the data set, that `name` stands for; in a folder those of `part`, "train" or "valid".

    Raises UserError naming `flag` where there is nothing of that name.
    """
    path = Path(name)
    if path.is_dir():
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            return [DataSet(str(path), split, flag)]
        files = files_of(path, part)
        if not files:
            raise UserError(
                f"{flag}: {path / f'{part}.jsonl'} not found; a data folder holds train.jsonl and maybe valid.jsonl"
                f" (or {', '.join(SUFFIXES[1:])})"
            )
        return [open_file(file) for file in files]
    if path.exists():
        return [open_file(path)]
    looks_like_an_id = _HUB_ID.fullmatch(str(name)) and suffix_of(path) not in SUFFIXES
    if looks_like_an_id or (split is not None and _HUB_NAME.fullmatch(str(name))):
        return [DataSet(str(name), split, flag)]
    raise UserError(f"{flag}: {path} not found")


def files_of(folder: Path, part: str) -> list[Path]:
    """The files of a folder that hold a part of the data: train.csv, say, or train-00000-of-00002.parquet and so on."""
    for stem in PARTS[part]:
        for suffix in SUFFIXES:
            if (folder / f"{stem}{suffix}").is_file():
                return [folder / f"{stem}{suffix}"]
        shards = sorted(path for path in folder.glob(f"{stem}-*") if suffix_of(path) in SUFFIXES)
        if shards:
            return shards
    return []
