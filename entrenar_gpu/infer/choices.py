"""Multiple choice by likelihood: the answer that a model finds likeliest, as lm-evaluation-harness counts it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrenar_gpu.errors import UserError
from entrenar_gpu.infer.language_model import LanguageModel
from entrenar_gpu.infer.prompts import text_lines


@dataclass(frozen=True)
class Question:
    """`answer` indexes `choices`."""

    text: str
    choices: tuple[str, ...]
    answer: int


def evaluate_choices(model: LanguageModel, questions: Iterable[Question]) -> dict[str, Any]:
    """{"acc", "acc_norm", "acc_stderr", "acc_norm_stderr", "samples"} over questions.

    A choice is scored as the continuation of its question, after a space. `acc` takes the choice with the highest sum
    of log-probabilities, `acc_norm` that with the highest sum per character of the choice (without the space). The
    standard error is that of a mean of zeros and ones, sqrt(p (1 - p) / (n - 1)). Raises UserError for logits that are
    not finite, as in `Sampler.draw`: they make no choice likeliest.
    """
    hits, normalised, count = 0, 0, 0
    for question in questions:
        scores = [s.logprob for s in model.score_choices(question.text, [f" {choice}" for choice in question.choices])]
        if not all(map(math.isfinite, scores)):
            raise UserError("the model's logits are not finite: its weights, or its adapter's, overflow")
        hits += _likeliest(scores) == question.answer
        lengths = [len(choice) for choice in question.choices]
        normalised += _likeliest([s / n for s, n in zip(scores, lengths, strict=True)]) == question.answer
        count += 1
    shares = {"acc": hits / count, "acc_norm": normalised / count}
    errors = {f"{name}_stderr": math.sqrt(p * (1 - p) / max(count - 1, 1)) for name, p in shares.items()}
    return {**shares, **errors, "samples": count}


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a JSONL file. Raises UserError naming file and line."""
    questions = list(_questions(text_lines(path), str(path)))
    if not questions:
        raise UserError(f"{path}: holds no questions")
    return questions


def _questions(lines: list[str], path: str) -> Iterator[Question]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield _question(json.loads(line))
            except (ValueError, RecursionError):
                raise UserError(f"{path}:{number}: not valid JSON") from None
            except UserError as error:
                raise UserError(f"{path}:{number}: {error}") from None


def _question(row: Any) -> Question:
    if not isinstance(row, dict):
        raise UserError("expected an object with question, choices and answer")
    text, choices, answer = (row.get(key) for key in ("question", "choices", "answer"))
    if not isinstance(text, str):
        raise UserError("question must be text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise UserError("choices must be a list of two texts or more")
    if isinstance(answer, str) and choices.count(answer) == 1:
        answer = choices.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise UserError("answer must be one of the choices, or its index from 0")
    return Question(text, tuple(choices), answer)


def _likeliest(scores: list[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)
