"""Files that appear whole or not at all."""

import os
from pathlib import Path

import pytest

from observability.errors import TraceError
from observability.files import write_whole


def test_what_is_read_may_have_any_name(tmp_path: Path) -> None:
    """`report a.html.tmp --html a.html`: the trace is not what the report is written to on the way."""
    (tmp_path / "a.html.tmp").write_text("the trace")
    write_whole(tmp_path / "a.html", lambda temporary: temporary.write_text("the report"))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a.html.tmp": "the trace",
        "a.html": "the report",
    }


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("before")

    def full(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, os.strerror(28))

    with pytest.raises(TraceError, match=r"a\.html: cannot be written: No space left"):
        write_whole(tmp_path / "a.html", full)
    assert os.listdir(tmp_path) == ["a.html"]
    assert (tmp_path / "a.html").read_text() == "before"
