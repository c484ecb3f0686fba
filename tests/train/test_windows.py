"""Long samples in sliding windows: every target once, with as much before it as promised."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar_gpu import load
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.data.samples import SampleBuilder
from entrenar_gpu.errors import UserError
from entrenar_gpu.ops.loss import IGNORE
from entrenar_gpu.train.evaluate import evaluate_data
from entrenar_gpu.train.windows import sliding
from tests.helpers.tiny import make_model
from tests.helpers.word_tokenizer import word_tokenizer


@given(st.lists(st.integers(2, 40), min_size=1, max_size=4), st.integers(2, 12), st.data())
def test_every_target_is_scored_once_with_what_stands_before_it(lengths, seq, data):
    stride = data.draw(st.integers(1, seq))
    builder, start = SampleBuilder(1000), 0
    for length in lengths:
        ids = list(range(start, start + length))
        builder.add(ids, ids)
        start += length + 1
    samples = sliding(builder.samples(), seq, stride)
    scored = []
    for i in range(len(samples)):
        ids, targets = samples[i]
        assert len(ids) <= seq
        assert np.array_equal(np.diff(ids.astype(int)), np.ones(len(ids) - 1))
        for place in np.flatnonzero(targets != IGNORE):
            assert targets[place] == ids[place] + 1
            scored.append(int(targets[place]))
            begins = int(ids[0]) == 0 or any(int(ids[0]) == s for s in _starts(lengths))
            assert begins or place >= seq - stride
    want = [s + k for s, length in zip(_starts(lengths), lengths, strict=True) for k in range(1, length)]
    assert sorted(scored) == want


def _starts(lengths: list[int]) -> list[int]:
    return [sum(lengths[:i]) + i for i in range(len(lengths))]


def test_the_loss_is_that_of_the_windows_one_by_one(tmp_path):
    make_model(tmp_path / "model", hidden_size=32, intermediate_size=48, head_dim=8, vocab_size=32)
    word_tokenizer(tmp_path / "model")
    ids = np.random.default_rng(0).integers(1, 32, 21).tolist()
    (tmp_path / "data.jsonl").write_text(json.dumps({"input_ids": ids}) + "\n")
    config = TrainConfig(
        model=str(tmp_path / "model"), data=str(tmp_path / "data.jsonl"), device="numpy", method="lora"
    )
    config = TrainConfig.from_mapping({**config.to_mapping(), "seq": 8, "batch": 2}, "test")
    found = evaluate_data(config, False, window=3)
    with load(config.model, device="numpy", context=32) as model:
        total = model.score_ids(ids[:1], [ids[1:9]])[0].logprob
        for begin in range(3, 15, 3):
            last = min(begin + 9, 21)
            total += model.score_ids(ids[begin : begin + 6], [ids[begin + 6 : last]])[0].logprob
    assert found["tokens"] == 20
    assert found["loss"] == pytest.approx(-total / 20, rel=1e-5)
    with pytest.raises(UserError, match="window: 9 is not from 1 to"):
        evaluate_data(config, False, window=9)
