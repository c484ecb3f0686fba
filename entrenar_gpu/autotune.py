"""Measured choices of tiles: every blocking of the products that a program runs is timed once per adapter and driver.

The result is plain data for `Caps.tiles`. It is kept in a JSON file in the user's cache folder, and stored with
checkpoints: another tile sums in another order, so a run that resumes must use what it began with.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from entrenar_gpu.bench_gemm import Product, measure
from entrenar_gpu.device import Device
from entrenar_gpu.files import write_text
from entrenar_gpu.graph import Graph
from entrenar_gpu.kernel import KernelCache
from entrenar_gpu.ops.linear import product_sizes
from entrenar_gpu.tiles import key, plausible, to_numbers

Tiles = dict[str, tuple[int, ...]]
VERSION = 1  # of the kernels: choices measured with other ones are forgotten


def products_of(graphs: Iterable[Graph]) -> list[Product]:
    """The products that graphs run, each once."""
    found = {}
    for graph in graphs:
        for node in graph.nodes:
            if node.op == "matmul":
                a, b = node.inputs[:2]
                ta, tb = node.attrs["transpose_a"], node.attrs["transpose_b"]
                (k, m), n = (a.rows, a.columns) if ta else (a.columns, a.rows), b.rows if tb else b.columns
                product = Product("", "f32", m, n, k, ta, tb)
            elif node.op == "linear":
                m, n, k, _ = product_sizes(node)
                forward = not node.attrs["turned"]
                product = Product("", node.attrs["arithmetic"], m, n, k, transpose_b=forward, weight=True)
            else:
                continue
            found[key(product.arithmetic, product.m, product.n, product.k, product.layout)] = product
    return list(found.values())


def autotune(device: Device, wanted: Iterable[Product], kernels: KernelCache | None = None) -> Tiles:
    """The fastest blocking of each product, from the cache file where it is there, else measured and added to it."""
    kernels = kernels or KernelCache(device)
    path = cache_path(device)
    known = read_cache(path)
    for product in wanted:
        name = key(product.arithmetic, product.m, product.n, product.k, product.layout)
        if name not in known:
            known[name] = fastest(device, kernels, product)
            write_cache(path, known)
    return known


def fastest(device: Device, kernels: KernelCache, product: Product) -> tuple[int, ...]:
    """The fastest blocking of one product."""
    return min(sweep(device, kernels, product), key=lambda row: float(row["seconds"]))["tile"]


def sweep(device: Device, kernels: KernelCache, product: Product) -> Iterable[dict[str, Any]]:
    """The plausible blockings of one product, measured."""
    name = key(product.arithmetic, product.m, product.n, product.k, product.layout)
    for choice in plausible(product.arithmetic, product.m, product.n, product.k, device.caps):
        numbers = to_numbers(choice)
        row = measure(device, kernels, product, replace(device.caps, tiles={name: numbers}), check=False)
        yield {**row, "tile": numbers}


def cache_path(device: Device) -> Path:
    """Where choices for this adapter and driver are kept."""
    if os.environ.get("XDG_CACHE_HOME"):
        folder = Path(os.environ["XDG_CACHE_HOME"])
    elif sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches"
    else:
        folder = Path.home() / ".cache"
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{device.caps.name} {device.info['description']}").strip("-")
    return folder / "entrenar-gpu" / "tiles" / f"{name}.json"


def read_cache(path: Path) -> Tiles:
    """The choices in a cache file; none where it is missing, damaged or of other kernels. It can be made again."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["version"] != VERSION:
            return {}
        return {str(name): tuple(int(v) for v in numbers) for name, numbers in held["tiles"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_cache(path: Path, tiles: Mapping[str, tuple[int, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    held = {"version": VERSION, "tiles": {name: list(numbers) for name, numbers in sorted(tiles.items())}}
    write_text(path, json.dumps(held, indent=1))
