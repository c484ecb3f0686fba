"""Record what bitsandbytes makes of a few small arrays: writes nf4.safetensors beside this file.

Run with an environment that has torch and bitsandbytes (`make parity` installs one):
    .venv-parity/bin/python tests/golden/make_nf4.py
"""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes
import numpy as np
import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_4bit, get_4bit_type, quantize_4bit
from safetensors.numpy import save_file

FILE = Path(__file__).with_name("nf4.safetensors")


def inputs() -> dict[str, np.ndarray]:
    """The weights of each case, float32. Sizes are small, but span more than one group of 256 block scales once."""
    rng = np.random.default_rng(20240607)
    normal = rng.standard_normal((3, 64)) * 0.02
    outliers = rng.standard_normal((4, 128)) * 0.02
    outliers[:, ::37] *= 100.0
    blocks = np.zeros((6, 64))
    blocks[1], blocks[2], blocks[3, 5], blocks[4] = 0.5, -0.25, -1e-30, rng.standard_normal(64) * 1e-20
    # around 3 times each midpoint between codes, dividing by 3 and multiplying by 1/3 do not always round alike
    codes = get_4bit_type("nf4", device="cpu").numpy()
    edges = np.float32(3) * ((codes[:-1] + codes[1:]) / np.float32(2))
    near_edges = np.concatenate([edges, np.nextafter(edges, np.float32(9)), np.nextafter(edges, np.float32(-9)), [3.0]])
    # one value a block keeps the file small: the other 63 repeat it, and the scales still differ
    many = np.repeat(rng.standard_normal((260, 1)) * np.exp(rng.standard_normal((260, 1))), 64, axis=1)
    cases = {
        "normal": normal,
        "uniform": rng.uniform(-1, 1, (5, 64)),
        "outliers": outliers,
        "zero_and_constant": blocks,
        "all_zero": np.zeros((2, 64)),
        "partial": rng.standard_normal((5, 30)),
        "partial_odd": rng.standard_normal(131),
        "partial_zero": np.zeros((3, 30)),
        "edges_whole": np.pad(near_edges, (0, 64 - near_edges.size)),
        "edges_partial": near_edges,
        "many_blocks": many,
    }
    return {name: values.astype(np.float32) for name, values in cases.items()}


def record(name: str, values: np.ndarray, double: bool) -> dict[str, np.ndarray]:
    """Codes, scales and dequantised values of one case, under `<name>.<single|double>.<what>`."""
    packed, state = quantize_4bit(torch.from_numpy(values), blocksize=64, compress_statistics=double, quant_type="nf4")
    result = {"codes": packed.numpy().ravel(), "absmax": state.absmax.numpy()}
    if double:
        result |= {"nested_absmax": state.state2.absmax.numpy(), "offset": state.offset.numpy().reshape(1)}
    if name != "many_blocks":
        result["values"] = dequantize_4bit(packed, state).numpy()
    kind = "double" if double else "single"
    return {f"{name}.{kind}.{what}": np.ascontiguousarray(array) for what, array in result.items()}


def main() -> None:
    tensors = {
        "codebook": get_4bit_type("nf4", device="cpu").numpy(),
        "dynamic_map": create_dynamic_map(signed=True).numpy(),
    }
    for name, values in inputs().items():
        tensors[f"{name}.input"] = values[:, :1].copy() if name == "many_blocks" else values
        for double in (False, True):
            tensors |= record(name, values, double)
    versions = {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__}
    save_file(tensors, FILE, metadata={"made_with": json.dumps(versions)})
    print(f"{FILE}: {FILE.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()
