"""What a tokenizer may make of a text: normalizers replace parts of it, one by one, and each may make it longer.

Ten replacements of a letter by ten are four kilobytes of `tokenizer.json`, and a text of 10^10 characters out of one.
"""

from __future__ import annotations

import json
from typing import Any

import tokenizers

# Real normalizers put at most a few characters for one. tokenizers keeps 17 bytes for each byte of what they write.
MOST_PER_CHARACTER = 16
MOST_BESIDE = 1 << 12  # characters, or token ids, put around a text


def growth(backend: tokenizers.Tokenizer) -> tuple[float, float]:
    """The most characters that the normalizer writes (for each that a text has, beside those)."""
    step = backend.normalizer
    return (1.0, 0.0) if step is None else _grown(json.loads(step.__getstate__()), 1.0, 0.0)


def too_much(backend: tokenizers.Tokenizer) -> str | None:
    """Why this tokenizer is not to be used; None for ordinary ones."""
    each, beside = growth(backend)
    if each > MOST_PER_CHARACTER or beside > MOST_BESIDE:
        return f"its normalizer may write {max(each, beside):.3g} characters for one; at most {MOST_PER_CHARACTER}"
    return None


def _grown(step: dict[str, Any], each: float, beside: float) -> tuple[float, float]:
    """`growth` behind one more step; forms of Unicode and cases count as they are, being bounded by themselves."""
    kind = step.get("type")
    if kind == "Sequence":
        for inner in step["normalizers"]:
            each, beside = _grown(inner, each, beside)
    elif kind == "Replace":
        factor = _factor(step["pattern"], len(step["content"]))
        each, beside = each * factor, beside * factor + factor  # an expression may match behind the last character
    elif kind == "Prepend":
        beside += len(step["prepend"])
    return each, beside


def _factor(pattern: dict[str, str], written: int) -> float:
    """How much longer a replacement makes a text at most."""
    text = pattern.get("String")
    if text:
        return max(1.0, written / len(text))
    return 1.0 + written  # an expression, which may match between all characters
