"""A bounded part of `make fuzz`, the same in every run, and every input that it has found so far."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz.__main__ import FOUND
from tests.fuzz.readers import Kind, corpus, outcome

INPUTS = 500


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    return corpus(tmp_path_factory.mktemp("fuzz"))


def test_valid_files_are_read(kinds: dict[str, Kind]) -> None:
    for kind in kinds.values():
        kind.read(kind.path)  # raises where it is refused


def test_damaged_files_are_refused_in_one_line_or_read(kinds: dict[str, Kind]) -> None:
    rng = random.Random(2026)
    contents = {name: kind.path.read_bytes() for name, kind in kinds.items()}
    for _ in range(INPUTS):
        name = rng.choice(list(kinds))
        what = outcome(kinds[name], kinds[name].mutated(contents[name], rng))
        kinds[name].path.write_bytes(contents[name])
        assert not what, f"{name}: {what}"


@pytest.mark.parametrize("path", sorted(FOUND.glob("*")), ids=lambda path: path.name)
def test_what_was_found_stays_found(kinds: dict[str, Kind], path: Path) -> None:
    kind = kinds[path.name.split("-")[0].replace("_", " ")]
    content = kind.path.read_bytes()
    what = outcome(kind, path.read_bytes())
    kind.path.write_bytes(content)
    assert not what, what
