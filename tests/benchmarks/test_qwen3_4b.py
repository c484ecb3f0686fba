"""The benchmark beside the peer: its tables, and what it says when a measurement fails."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from benchmarks import qwen3_4b

CEILINGS = {
    "cublas_f32_tflops": 50.0,
    "cublas_f16_tflops": 700.0,
    "cublas_bf16_tflops": 720.0,
    "copy_tb_per_second": 4.2,
}
OURS = {
    "adapter": "Card",
    "driver": "1.2",
    "engine": "dawn",
    "precision": "int8",
    "tokens_per_second": 2400.0,
    "step_seconds": 0.2,
    "seconds": {"encode": 0.01},
    "allocated_bytes": 3 << 30,
    "ceiling_share": 0.5,
}
PEER = {"batch": 1, "seq": 512, "tokens_per_second": 1000.0, "peak_gib": 6.0}


def product(rows: int, speed: float, arithmetic: str = "f32", matrices: bool = False) -> dict[str, Any]:
    speeds = {"product_tflops": speed, "kept_tflops": 0.9 * speed, "tflops": 0.8 * speed}
    return {"arithmetic": arithmetic, "sizes": [rows, 9728, 2560], "matrices": matrices, "error": 1e-6, **speeds}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[list[str], str | None]]:
    """What each command prints and how it fails, by a word of its command line."""
    answers: dict[str, tuple[list[str], str | None]] = {
        "ceilings": ([json.dumps(CEILINGS)], None),
        "benchmarks.peer": ([json.dumps(PEER)], None),
        "bench": ([json.dumps(OURS)], None),
    }

    def lines_of(command: list[str], seconds: float) -> tuple[list[str], str | None]:
        return next(answer for word, answer in answers.items() if word in command)

    monkeypatch.setattr(qwen3_4b, "_lines_of", lines_of)
    monkeypatch.setattr(
        qwen3_4b,
        "_products",
        lambda: [
            product(512, 36.0),
            product(2048, 40.0),
            product(512, 400.0, "int8_rows", True),
            product(2048, 480.0, "int8_rows", True),
        ],
    )
    return answers


def text_of(row: str = "1x512") -> str:
    report = qwen3_4b.Report([r for r in qwen3_4b.ROWS if r.size == row], ["int8"])
    for _ in report.measure():
        pass
    return report.markdown("abc1234")


def test_figures_stand_beside_their_bars_and_the_fastest_peer(measured: Any) -> None:
    measured["--liger"] = ([json.dumps({**PEER, "tokens_per_second": 1200.0, "peak_gib": 5.0})], None)
    measured["benchmarks.peer"] = measured.pop("benchmarks.peer")  # asked last
    text = text_of()
    assert "Card, driver 1.2, commit abc1234." in text
    free = "| 1x512 | dawn | int8 | none | 2,400 (6,000) | 1,200 | 2.00 | 3.00 | 5.00 | 50% | 10.0 of 200 |"
    assert free in text
    assert free.replace("none", "3.6").replace("(6,000)", "(4,200)") in text
    assert "| PEFT, keeping | 1,000 (6.0) |" in text
    assert "| PEFT + Liger | 1,200 (5.0) |" in text
    assert "| 512x9728x2560 | f32 | 36.0 | 32.4 | 28.8 | 0.72 | 0.04 | 0.90 (0.8) | 1.0e-06 |" in text
    assert "| 2048x9728x2560 | f32 | 40.0 | 36.0 | 32.0 | 0.80 (0.8) | 0.05 |  | 1.0e-06 |" in text
    assert "| 512x9728x2560 | int8_rows | 400.0 | 360.0 | 320.0 | 8.00 | 0.50 | 0.83 (0.7) | 1.0e-06 |" in text
    assert "| 2048x9728x2560 | int8_rows | 480.0 | 432.0 | 384.0 | 9.60 | 0.60 (0.6) |  | 1.0e-06 |" in text
    assert "device copy 4.20 TB/s" in text
    assert "Not measured" not in text


def test_what_fails_is_a_line_and_the_rest_stands(measured: Any) -> None:
    measured["benchmarks.peer"] = ([], "torch is not installed")
    measured["ceilings"] = ([], "torch is not installed")
    measured["bench"] = (["no JSON"], None)
    lines = text_of().splitlines()
    assert lines.count("Not measured: PEFT + Liger, keeping: torch is not installed") == 1
    assert "Not measured: 1x512 int8, budget 3.6: printed ['no JSON'] instead of JSON" in lines
    assert any(line.startswith("| 2048x9728x2560 | f32 | 40.0 | 36.0 | 32.0 | nan") for line in lines)


def test_a_peer_that_stops_half_way_keeps_its_rows(measured: Any) -> None:
    measured["benchmarks.peer"] = ([json.dumps(PEER)], "took longer than 180 s")
    text = text_of()
    assert "| 1,000 | 2.40 |" in text
    assert "Not measured: PEFT: took longer than 180 s" in text


def test_what_was_measured_is_written_before_the_rest_is(measured: Any, tmp_path: Any, monkeypatch: Any) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(qwen3_4b.Report, "_train", stopped)
    with pytest.raises(KeyboardInterrupt):
        qwen3_4b.main(["--output", str(tmp_path / "table.md"), "--commit", "abc"])
    assert "| PEFT, keeping | 1,000 (6.0) |" in (tmp_path / "table.md").read_text()


def test_peers_are_asked_for_by_number() -> None:
    assert qwen3_4b._peers("1,4") == ["PEFT", "PEFT + Liger, keeping"]
    assert qwen3_4b._peers("all") == list(qwen3_4b.PEERS)
    for wrong in ("5", "0", "two"):
        with pytest.raises(SystemExit, match="--peers"):
            qwen3_4b._peers(wrong)


def test_commands_are_stopped_at_their_limit_and_told_in_one_line() -> None:
    code = "import sys, time; print('one', flush=True); time.sleep(60)"
    assert qwen3_4b._lines_of([sys.executable, "-c", code], 1.0) == (["one"], "took longer than 1 s")
    code = "import sys; sys.exit('first\\nlast')"
    assert qwen3_4b._lines_of([sys.executable, "-c", code], 30.0) == ([], "last")


def test_the_peer_says_what_is_missing() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from benchmarks import peer; sys.argv[1:] = ['ceilings']; peer.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "torch is not installed"
