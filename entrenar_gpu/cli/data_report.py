"""`entrenar-gpu data`: samples as they will be trained, and what the whole of them comes to."""

from __future__ import annotations

import itertools
import sys

import numpy as np
from rich.console import Console
from rich.text import Text

from entrenar_gpu.cli.text import printable
from entrenar_gpu.data import Inspection, Samples, Tokenizer
from entrenar_gpu.ops.loss import IGNORE

TRAINED, READ = "bold green", "dim"
_BAR = 40
_LONGEST = 4000  # characters of a sample that are shown


def show_data(samples: Samples, tokenizer: Tokenizer | None, found: Inspection, shown: int, console: Console) -> None:
    """The first samples, then lengths and counts."""
    for i in range(min(shown, len(samples))):
        tokens, targets = samples[i]
        trained = int(np.count_nonzero(targets != IGNORE))
        console.print(Text(f"sample {i + 1}: {len(tokens):,} tokens, {trained:,} trained", "bold"), highlight=False)
        console.print(_coloured(tokens, targets, tokenizer, console.is_terminal), highlight=False, soft_wrap=True)
        console.print()
    for first, last, count in found.lengths:
        bar = "█" * round(_BAR * count / max(n for _, _, n in found.lengths))
        console.print(Text(f"{first:7,} to {last:7,} tokens {count:9,} {bar}"), highlight=False, soft_wrap=True)
    lines = [
        f"{found.samples:,} samples, {found.tokens:,} tokens, {found.trained_tokens:,} of them trained",
        f"{found.cut:,} cut at --seq; {found.skipped:,} skipped without a token to train, {found.lost:,} of them"
        " because it was cut off",
        f"{found.rows:,} packed rows, {found.packed:.1%} full; with --no-pack {found.unpacked:.1%}",
        *found.notes,
    ]
    for line in lines:
        console.print(Text(printable(line)), highlight=False, soft_wrap=True)


def show_problems(found: Inspection) -> None:
    """What looks wrong, a line each, to standard error."""
    for problem in found.problems:
        print(printable(f"wrong: {problem}"), file=sys.stderr)


def _coloured(tokens: np.ndarray, targets: np.ndarray, tokenizer: Tokenizer | None, colours: bool) -> Text:
    """A sample's text, what is trained of it in green; between ⟦ and ⟧ where there are no colours."""
    trained = np.concatenate([[False], targets[:-1] != IGNORE])
    text, length = Text(), 0
    edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(tokens)]
    for begin, end in itertools.pairwise(edges):
        ids = tokens[begin:end].tolist()
        piece = " ".join(map(str, ids)) + " " if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=False)
        piece = printable(piece, _LONGEST, keep="\n\t")
        text.append(piece if colours or not trained[begin] else f"⟦{piece}⟧", TRAINED if trained[begin] else READ)
        length += len(piece)
        if length > _LONGEST:
            text.append(" …")
            break
    return text
