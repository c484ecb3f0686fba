"""Multiple choice by likelihood."""

from __future__ import annotations

import json
import math
import os
import sys

import pytest

from entrenar_gpu import cli
from entrenar_gpu.cli.demo import MODEL
from entrenar_gpu.errors import UserError
from entrenar_gpu.infer import LanguageModel, evaluate_choices, read_prompts, read_questions
from entrenar_gpu.infer.choices import Question
from entrenar_gpu.infer.sampling import log_softmax
from entrenar_gpu.train.metrics_file import MetricsFile, read_metrics
from tests.helpers.fake_decoder import FakeDecoder
from tests.helpers.word_tokenizer import word_tokenizer


@pytest.fixture
def model(tmp_path) -> LanguageModel:
    return LanguageModel(FakeDecoder(slots=3, vocabulary=32), word_tokenizer(tmp_path), 32)


def logprob(model: LanguageModel, ids: list[int], said: list[int]) -> float:
    rows = [model.decoder.logits([(i, None) for i in (ids + said)[:n]]) for n in range(len(ids), len(ids + said))]
    return sum(float(log_softmax(row)[token]) for row, token in zip(rows, said, strict=True))


def test_the_likeliest_counts_in_all_and_by_character(model):
    choices = {"w7": [7], "w21 w13 w4": [21, 13, 4], "w12": [12], "w30 w2": [30, 2]}
    scores = {text: logprob(model, [4, 5], ids) for text, ids in choices.items()}
    best, by_character = max(scores, key=scores.get), max(scores, key=lambda text: scores[text] / len(text))
    assert best != by_character
    texts = tuple(choices)
    questions = [Question("w4 w5", texts, texts.index(best))] * 3 + [
        Question("w4 w5", texts, texts.index(by_character))
    ]
    found = evaluate_choices(model, questions)
    assert (found["acc"], found["acc_norm"], found["samples"]) == (0.75, 0.25, 4)
    assert found["acc_stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))


def test_logits_that_are_not_finite_choose_nothing(model, monkeypatch):
    logits = model.decoder.logits
    monkeypatch.setattr(model.decoder, "logits", lambda tokens: logits(tokens) * float("nan"))
    with pytest.raises(UserError, match="logits are not finite"):
        evaluate_choices(model, [Question("w4 w5", ("w7", "w12"), 0)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("3", "expected an object"),
        ('{"question": 1, "choices": ["a", "b"], "answer": 0}', "question must be text"),
        ('{"question": "q", "choices": ["a"], "answer": 0}', "choices must be a list"),
        ('{"question": "q", "choices": ["a", ""], "answer": 0}', "choices must be a list"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "answer must be one"),
        ('{"question": "q", "choices": ["a", "b"], "answer": true}', "answer must be one"),
        ('{"question": "q", "choices": ["a", "a"], "answer": "a"}', "answer must be one"),
    ],
)
def test_a_bad_question_is_named(tmp_path, line, message):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "q", "choices": ["a", "b"], "answer": "b"}\n\n' + line)
    with pytest.raises(UserError, match=rf"q.jsonl:3: {message}"):
        read_questions(path)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_only_a_newline_ends_a_line(tmp_path, mark):
    """JSON leaves other separators in texts as they are."""
    path, text = tmp_path / "q.jsonl", "a\u2028b\x85c"
    row = {"question": text, "prompt": text, "choices": ["a", "b"], "answer": 1}
    path.write_text(f"{mark}{json.dumps(row, ensure_ascii=False)}\r\n\n", encoding="utf-8", newline="")
    assert [question.text for question in read_questions(path)] == [text]
    assert [asked["prompt"] for asked in read_prompts(str(path), "--prompts")] == [text]


@pytest.mark.skipif(sys.platform == "win32", reason="has no named pipes in folders")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    for read in (read_questions, lambda _: read_metrics(tmp_path), lambda path: MetricsFile(path.parent)):
        with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be read: it is no file"):
            read(tmp_path / "metrics.jsonl")


def test_the_command(tmp_path, capsys):
    path = tmp_path / "q.jsonl"
    row = {"question": "What does os.getcwd() do?\n\nReturn", "choices": ["the current directory.", "qqq zzz xxx"]}
    path.write_text(json.dumps({**row, "answer": 0}) + "\n")
    flags = ["eval", "--model", str(MODEL), "--device", "numpy"]
    assert cli.run([*flags, "--task", "choices", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["acc"] == 1
    for arguments in (
        ["--task", "choices"],
        [str(path)],
        ["--task", "x"],
        ["--task", "choices", "--seq", "9", str(path)],
    ):
        assert cli.run([*flags, *arguments]) == 2
