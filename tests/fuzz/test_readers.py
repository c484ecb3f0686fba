"""A bounded part of `make fuzz`, the same in every run, and every input that it has found so far."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.readers import FOUND, corpus, faults, outcome


def test_damaged_files_are_refused_in_one_line_or_read() -> None:
    found = [f"{kind}: {what}" for _, kind, _, what in faults(inputs=600, seed=2026) if kind]
    assert not found, "\n".join(found)


def test_what_was_found_stays_found(tmp_path: Path) -> None:
    kinds = corpus(tmp_path)
    for path in sorted(FOUND.glob("*")):
        assert not outcome(*kinds[path.name.split("-")[0].replace("_", " ")], path.read_bytes()), path.name
