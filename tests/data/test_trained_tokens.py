"""The tokens that are trained, against what TRL and mlx-lm train of the same rows (golden/make_trained_tokens.py)."""

import json
from datetime import datetime

import numpy as np
import pytest

from entrenar_gpu.data.load import read_samples
from entrenar_gpu.data.records import Reading
from entrenar_gpu.data.rows import RowsInMemory
from entrenar_gpu.data.samples import IGNORE
from entrenar_gpu.data.tokenizer import Tokenizer
from tests.golden.make_trained_tokens import FILE, make_folder

RECORDED = json.loads(FILE.read_text(encoding="utf-8"))
CASES = [
    pytest.param(peer, case, id=f"{peer}-{case['tokenizer']}-{number}")
    for peer, recorded in RECORDED.items()
    for number, case in enumerate(recorded["cases"])
]


def up_to_the_end(ids: list[int], labels: list[int], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Without training of what a template writes behind the last end of a turn, a new line say, which is theirs."""
    ends = [i for i, label in enumerate(labels) if label in tokenizer.eos_ids]
    return ids, [label if not ends or i <= ends[-1] else IGNORE for i, label in enumerate(labels)]


@pytest.mark.parametrize(("peer", "case"), CASES)
def test_trained_tokens_are_those_of(tmp_path, peer, case):
    recorded_on = datetime.fromisoformat(RECORDED[peer]["date"])  # templates write it
    tokenizer = Tokenizer.load(make_folder(tmp_path / "model", case["tokenizer"]), recorded_on)
    reading = Reading(tokenizer.vocab_size, completions=case["completions"])
    samples = read_samples([[RowsInMemory(case["rows"], "data")]], tokenizer, reading, 4096)
    assert len(samples) == len(case["samples"])
    for i, theirs in enumerate(case["samples"]):
        ids, labels = up_to_the_end(theirs["input_ids"], theirs["labels"], tokenizer)
        tokens, targets = samples[i]
        assert tokenizer.decode(tokens.tolist(), skip_special_tokens=False) == tokenizer.decode(
            ids, skip_special_tokens=False
        )
        np.testing.assert_array_equal(tokens, ids)
        np.testing.assert_array_equal(targets[:-1], labels[1:])
