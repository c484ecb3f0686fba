"""Prints docs/options.md from the fields of TrainConfig: `python scripts/options_table.py > docs/options.md`."""

from __future__ import annotations

from entrenar_gpu.cli.options import FIELDS, kind_of
from entrenar_gpu.config import flag

HEAD = """# Options of `entrenar-gpu train`

Made by `python scripts/options_table.py > docs/options.md` from `entrenar_gpu/config/train_config.py`, which declares
them. The same names, with underscores, are keys of a `--config` YAML file and fields of `TrainConfig`; flags win over
the file. `--resume` may stand alone and then means the newest checkpoint of `--output`. A run that goes on there from
an older one takes the later steps again: their lines of metrics.jsonl and their checkpoints are dropped when it starts;
the adapter or weights that it had ended with stay until this one ends.

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


def main() -> None:
    print(HEAD)
    for name, f in FIELDS.items():
        kind, choices = kind_of(name)
        default = "" if f.default in (None, "") else str(f.default).lower() if kind is bool else str(f.default)
        shown = f"`{flag(name)}`" + (f" / `--no-{name.replace('_', '-')}`" if kind is bool else "")
        text = f.metadata["help"] + (f": {', '.join(choices)}" if choices else "")
        print(f"| {shown} | {default} | {f.metadata['unit']} | {text.replace('|', chr(92) + '|')} |")
    print(FORMULAS, end="")


if __name__ == "__main__":
    main()
