"""Prints docs/models.md from the shapes of the room config: `python scripts/models_table.py > docs/models.md`.

Takes two minutes, for the plans; no GPU and no weights are needed.
"""

from __future__ import annotations

from dataclasses import replace

from entrenar_gpu.adapters import AdapterSpec
from entrenar_gpu.config import SHAPES, TrainConfig, shape_file
from entrenar_gpu.graph import Caps
from entrenar_gpu.model import ModelConfig, Storage, declared_weights, model_shape
from entrenar_gpu.session.plan_report import PROFILES, plan_run

RANKS = (8, 16, 64)
HEAD = """# Models: sizes, adapters, memory

Made by `python scripts/models_table.py > docs/models.md` from the shapes in `entrenar_gpu/config/shapes/`, which
`--shape` of `plan`, `bench train` and `bench gemm` takes by name. The families that load are listed in
[adding-a-family.md](adding-a-family.md); these are some of their models, the language part of those that also see.

Adapters are on every projection (the default of `--target`); "fewer" is what they leave untrained of the model's
parameters. Stored: every weight in BF16. QLoRA: projections in NF4 with double-quantised scales, embedding and head in
BF16, norms and biases in F32; "saved" is against BF16. Plan: all that a QLoRA run at rank 16 on one row of 512 tokens
allocates in f16 arithmetic, nothing recomputed and no weight kept twice; `entrenar-gpu plan --shape NAME` plans for a
device or a budget.

The counts are those published for the checkpoints (looked up on 28 and 29 November 2026), but for llama2-124m, a toy,
and ministral3-8b, whose count was not found.

| model | parameters | rank 8 | fewer | rank 16 | fewer | rank 64 | fewer | stored GB | QLoRA GB | saved | plan GB |
|---|---|---|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    print(HEAD)
    for name in sorted(SHAPES, key=family_and_size):
        print(f"{sizes(name)} {planned_bytes(name) / 1e9:.2f} |")


def family_and_size(name: str) -> tuple[str, int]:
    model = model_shape(name)
    return model.architecture, model.parameters


def sizes(name: str) -> str:
    """A model's row up to its plan."""
    model = model_shape(name)
    cells = [f"{name} | {model.parameters:,}"]
    for rank in RANKS:
        count = adapter_parameters(model, rank)
        cells.append(f"{count:,} | {1 - count / model.parameters:.2%}")
    stored, quantised = 2 * model.parameters, qlora_bytes(model)
    cells.append(f"{stored / 1e9:.2f} | {quantised / 1e9:.2f} | {1 - quantised / stored:.1%}")
    return f"| {' | '.join(cells)} |"


def adapter_parameters(model: ModelConfig, rank: int) -> int:
    """Numbers that LoRA trains: R (in + out) of each projection."""
    shapes = AdapterSpec.from_config(TrainConfig(rank=rank), model).shapes()
    return sum(rows * columns for rows, columns in shapes.values())


def qlora_bytes(model: ModelConfig) -> int:
    """The base as a QLoRA run keeps it on the device."""
    weights = declared_weights(model.weights, Storage(), Caps())
    return sum(tensor.nbytes for weight in weights for tensor in weight.tensors)


def planned_bytes(name: str) -> int:
    config = replace(TrainConfig(), model=str(shape_file(name)), batch=1, seq=512, rank=16)
    return plan_run(config, PROFILES["large"], 1 << 40, evaluates=False).plan.peak_bytes


if __name__ == "__main__":
    main()
