"""Prints docs/options.md from the fields of TrainConfig: `python scripts/options_table.py > docs/options.md`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from entrenar_gpu.cli.options import FIELDS, SAMPLING, kind_of
from entrenar_gpu.config import flag

HEAD = """# Options of `entrenar-gpu train`

Made by `python scripts/options_table.py > docs/options.md` from `entrenar_gpu/config/train_config.py`, which declares
them. The same names, with underscores, are keys of a `--config` YAML file and fields of `TrainConfig`; flags win over
the file. `--resume` may stand alone and then means the newest checkpoint of `--output`. A run that goes on there from
an older one takes the later steps again: their lines of metrics.jsonl and their checkpoints are dropped when it starts;
the adapter or weights that it had ended with stay until this one ends.

Names of mlx-lm and TRL are understood where they mean the same (`--learning-rate`, `--batch-size`, `--max_length`,
`--lora_r`, ...: `entrenar_gpu/cli/other_names.py`); `--iters` counts micro-batches and is converted. `entrenar-gpu
import-config FILE` prints an mlx-lm YAML file as one of ours and lists what has no counterpart.

| flag | default | unit | what it does |
|---|---|---|---|"""

FORMULAS = """
## Formulas

With t the optimizer step (1 is the first), w the warm-up steps, s = t - w - 1 and n = steps - w:

| | |
|---|---|
| loss of a step | mean cross-entropy of its unmasked tokens, over all rows and micro-batches together |
| label smoothing e | a token costs (1 - e) (-log p[target]) + e mean over the vocabulary of (-log p) |
| adapter | y = W x + scale B A dropout(x); scale = alpha / R, or alpha / sqrt(R) with `--rslora` |
| warm-up | lr t / w for t <= w, in front of every schedule |
| constant, linear | lr; lr (1 - s/n) |
| cosine, warmup-cosine | lr (1 + cos(pi s/n)) / 2 |
| step, exponential | lr gamma^floor(s / step-size); lr gamma^s |
| clipping | g <- g min(1, clip / (norm + 1e-6)), norm over all gradients together |
| moments | m <- b1 m + (1 - b1) g; v <- b2 v + (1 - b2) g^2; m' = m / (1 - b1^t); v' = v / (1 - b2^t) |
| adamw | p <- p (1 - lr wd) - lr m' / (sqrt(v') + eps) |
| adam | the same with g <- g + wd p and no decay of p |
| sgd | v <- momentum v + g + wd p; p <- p - lr v |
| skipped step | loss or gradient not finite: nothing moves, t does not count; ten in a row end the run |
"""


SAMPLING_HEAD = """
# Options of sampling

Of `generate` and `chat`, arguments of a model's methods in Python, and fields of the server's requests, from
`entrenar_gpu/config/sampling_options.py`; [generate.md](generate.md) has the definitions. `--stop TEXT` and
`--logit-bias ID=NUMBER` stand beside them, and may be given again.

| flag | default | unit | what it does |
|---|---|---|---|"""


def print_rows(rows: Iterable[Any]) -> None:
    for f in rows:
        kind, choices = kind_of(f.name)
        default = "" if f.default in (None, "") else str(f.default).lower() if kind is bool else str(f.default)
        shown = f"`{flag(f.name)}`" + (f" / `--no-{f.name.replace('_', '-')}`" if kind is bool else "")
        text = f.metadata["help"] + (f": {', '.join(choices)}" if choices else "")
        print(f"| {shown} | {default} | {f.metadata['unit']} | {text.replace('|', chr(92) + '|')} |")


def main() -> None:
    print(HEAD)
    print_rows(FIELDS.values())
    print(FORMULAS, end="")
    print(SAMPLING_HEAD)
    print_rows(SAMPLING.values())


if __name__ == "__main__":
    main()
