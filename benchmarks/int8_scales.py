"""What int8 costs single products of a real model, by scheme of scales: `python -m benchmarks.int8_scales MODEL`.

Runs one micro-batch of the demo's data through a pretrained model on the NumPy executor, with every projection
multiplied in f32, and keeps what projections of some layers multiply: x and W forward, dy and W^T backward. Each
product is then made of rounded operands and held against float64; the table gives its relative Frobenius error by
scheme. Takes minutes on two cores. MODEL is a folder whose projections are multiples of 64 both ways, as
SmolLM2-135M's are.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from entrenar_gpu.cli import docstrings
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.graph import Node
from entrenar_gpu.ops.gemm.linear import with_added
from entrenar_gpu.ops.quantize import dequantized
from entrenar_gpu.ops.registry import OPS
from entrenar_gpu.train import Trainer


@dataclass(frozen=True)
class Product:
    """The operands of rows [M, K] times weight^T, weight [N, K]."""

    name: str
    layer: int
    rows: np.ndarray
    weight: np.ndarray


def rotated(values: np.ndarray, block: int) -> np.ndarray:
    """Rows times an orthogonal Hadamard matrix, block by block along K (arXiv 2404.00456)."""
    size = values.shape[-1]
    x = values.reshape(-1, block)
    step = 1
    while step < block:
        x = x.reshape(-1, block // (2 * step), 2, step)
        x = np.stack([x[:, :, 0] + x[:, :, 1], x[:, :, 0] - x[:, :, 1]], axis=2)
        step *= 2
    return x.reshape(-1, size) / np.sqrt(block)


def rounded(values: np.ndarray, group: int) -> np.ndarray:
    """Rows as int8 with a scale for every `group` values, as floats."""
    blocks = values.reshape(len(values), -1, min(group, values.shape[1]))
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    return (np.rint(blocks / np.where(scale > 0, scale, 1)) * scale).reshape(values.shape)


def bf16(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


Scheme = Callable[[np.ndarray], np.ndarray | None]  # of one operand; None where it does not divide K


def int8(group: int | None, rotation: int, values: np.ndarray) -> np.ndarray | None:
    k = values.shape[1]
    if k % rotation or k % (group or k):
        return None
    return rounded(rotated(values, rotation) if rotation > 1 else values, group or k)


def largest(values: np.ndarray) -> np.ndarray | None:
    """Rotated by the largest power of two that divides K, up to 512."""
    k = values.shape[1]
    return int8(None, min(k & -k, 512), values)


SCHEMES: dict[str, Scheme] = {
    "bf16": bf16,
    "f16": lambda values: values.astype(np.float16).astype(np.float32),
    "groups of 64": functools.partial(int8, 64, 1),
    "rows": functools.partial(int8, None, 1),
    "rows, rotated by 16": functools.partial(int8, None, 16),
    "rows, rotated by 64": functools.partial(int8, None, 64),
    "rows, rotated by 128": functools.partial(int8, None, 128),
    "rows, rotated by 2^n": largest,
    "groups of 256": functools.partial(int8, 256, 1),
    "groups of 512": functools.partial(int8, 512, 1),
    "groups of 512, rotated by 64": functools.partial(int8, 512, 64),
}


def error(product: Product, scheme: Scheme) -> float:
    left, right = scheme(product.rows), scheme(product.weight)
    if left is None or right is None:
        return float("nan")
    exact = product.rows.astype(np.float64) @ product.weight.astype(np.float64).T
    got = left.astype(np.float64) @ right.astype(np.float64).T
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


@contextmanager
def captured(layers: list[int]) -> Iterator[list[Product]]:
    """Products of these layers, while projections are multiplied in f32."""
    found: list[Product] = []
    plain = OPS["linear"]

    def reference(node: Node, x, weight=(), lora_a=None, lora_b=None, **added):  # type: ignore[no-untyped-def]
        attrs, rows, w = node.attrs, x.reshape(-1, x.shape[-1]), dequantized(node.attrs, weight)
        w = np.ascontiguousarray(w.T) if attrs["transposed"] else w
        if node.layer in layers:
            name = node.inputs["weight.0"].name.removesuffix(".weight.codes").rpartition(".")[2]
            found.append(Product(f"{name}{', dX' if attrs['transposed'] else ''}", node.layer, rows.copy(), w))
        made = []
        if lora_a is not None:
            made = [rows @ (lora_a.T if attrs["low_rank_transposed"] else lora_a)]
            added["low_rank"] = [made[0], lora_b]
        return [with_added(attrs, rows @ w.T, **added).reshape(node.output.shape), *made]

    OPS["linear"] = replace(plain, reference=reference)
    try:
        yield found
    finally:
        OPS["linear"] = plain


def operands(model: str, seq: int, layers: list[int]) -> list[Product]:
    """What one step multiplies in these layers."""
    with tempfile.TemporaryDirectory() as folder:
        docstrings.collect().write(folder)
        config = TrainConfig(
            model=model,
            data=str(Path(folder) / "train.jsonl"),
            output=str(Path(folder) / "run"),
            method="qlora",
            steps=1,
            batch=1,
            seq=seq,
            precision="int8",
            device="numpy",
        )
        with captured(layers) as found, Trainer(config) as trainer:
            trainer.run()
        return found


def table(products: list[Product], schemes: Mapping[str, Scheme]) -> list[str]:
    """A row for each scheme: the mean over layers of each projection's error in percent; nan where K is not divided."""
    names = list(dict.fromkeys(p.name for p in products))
    lines = ["| scheme | " + " | ".join(names) + " | all |", "|---" * (len(names) + 2) + "|"]
    for name, scheme in schemes.items():
        errors = {n: [error(p, scheme) for p in products if p.name == n] for n in names}
        means = [float(np.mean(found)) for found in errors.values()]
        cells = [f"{100 * mean:.2f}" for mean in (*means, float(np.mean(means)))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--layers", default="1,10,20,29")
    args = parser.parse_args()
    layers = [int(n) for n in args.layers.split(",")]
    products = operands(args.model, args.seq, layers)
    print(f"{len(products)} products of layers {args.layers}, relative error in percent\n")
    print("\n".join(table(products, SCHEMES)))


if __name__ == "__main__":
    main()
