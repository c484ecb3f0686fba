"""Measured choices of tiles: every blocking of the matmuls that a program runs is timed once per GPU and driver.

The result is plain data for `PlanOptions.tiles`. It is kept in a JSON file in the user's cache folder, and stored with
checkpoints: another tile sums in another order, so a run that resumes must use what it began with.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from entrenar_gpu.compiler import FittedPlan, PlanOptions
from entrenar_gpu.errors import UserError
from entrenar_gpu.files import cache_folder, new_folder, read_json, write_text
from entrenar_gpu.gpu.device import Device
from entrenar_gpu.gpu.kernel import KernelCache
from entrenar_gpu.gpu.measure import MatmulCase, measure
from entrenar_gpu.graph import Graph
from entrenar_gpu.ops.gemm.linear import product_sizes
from entrenar_gpu.ops.gemm.matmul import is_low_rank, matmul_sizes
from entrenar_gpu.ops.gemm.tiles import is_choice, key, plausible, to_numbers

Tiles = dict[str, tuple[int, ...]]
VERSION = 3  # of the kernels: choices measured with other ones are forgotten


def matmuls_of(graphs: Iterable[Graph]) -> list[MatmulCase]:
    """The matmuls that graphs run by blocks, each once: an adapter's small ones have a kernel of their own."""
    found = {}
    for graph in graphs:
        for node in graph.nodes:
            if node.op == "matmul" and not is_low_rank(node):
                m, n, k, _ = matmul_sizes(node)
                case = MatmulCase("", "f32", m, n, k, node.attrs["transpose_a"], node.attrs["transpose_b"])
            elif node.op == "linear":
                m, n, k, _ = product_sizes(node)
                forward = not node.attrs["transposed"]
                case = MatmulCase("", node.attrs["arithmetic"], m, n, k, transpose_b=forward, weight=True)
            else:
                continue
            found[_name(case)] = case
    return list(found.values())


def autotune(device: Device, wanted: Iterable[MatmulCase], kernels: KernelCache | None = None) -> Tiles:
    """The fastest blocking of each matmul, from the cache file where it is there, else measured and added to it."""
    kernels = kernels or KernelCache(device)
    path, wanted = cache_path(device), list(wanted)
    known = read_cache(path)
    unknown = [case for case in wanted if _name(case) not in known]
    if unknown:
        new_folder(path.parent)
        print(f"tune: measuring tiles of {len(unknown)} matmuls, kept in {path}", file=sys.stderr)
    for case in unknown:
        known[_name(case)] = fastest(device, kernels, case)
        write_cache(path, known)
    return {_name(case): known[_name(case)] for case in wanted}


def _name(case: MatmulCase) -> str:
    return key(case.arithmetic, case.m, case.n, case.k, case.layout)


def tuned(fit: Callable[[PlanOptions], FittedPlan], options: PlanOptions, kernels: KernelCache) -> FittedPlan:
    """What `fit` plans once the matmuls of the graphs that it plans unmeasured are measured."""
    unmeasured = fit(options)
    return fit(replace(options, tiles=autotune(kernels.device, matmuls_of(unmeasured.graphs.values()), kernels)))


def fastest(device: Device, kernels: KernelCache, case: MatmulCase) -> tuple[int, ...]:
    """The fastest blocking of one matmul."""
    tile: tuple[int, ...] = min(sweep(device, kernels, case), key=lambda row: float(row["seconds"]))["tile"]
    return tile


def sweep(device: Device, kernels: KernelCache, case: MatmulCase) -> Iterable[dict[str, Any]]:
    """The plausible blockings of one matmul, measured."""
    for choice in plausible(case.arithmetic, case.m, case.n, case.k, case.layout, device.caps):
        numbers = to_numbers(choice)
        row = measure(device, kernels, case, {_name(case): numbers}, check=False, alone=False)
        yield {**row, "tile": numbers}


def cache_path(device: Device) -> Path:
    """Where choices for this GPU and driver are kept."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{device.caps.name} {device.info['description']}").strip("-")
    return cache_folder() / "tiles" / f"{name}.json"


def read_cache(path: Path) -> Tiles:
    """The choices in a cache file; none where it is missing, damaged or of other kernels. It can be made again."""
    try:
        held = read_json(path)
        if held["version"] != VERSION:
            return {}
        tiles = {str(name): tuple(int(v) for v in numbers) for name, numbers in held["tiles"].items()}
        return {name: numbers for name, numbers in tiles.items() if is_choice(name, numbers)}
    except (UserError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return {}


def write_cache(path: Path, tiles: Mapping[str, tuple[int, ...]]) -> None:
    held = {"version": VERSION, "tiles": {name: list(numbers) for name, numbers in sorted(tiles.items())}}
    write_text(path, json.dumps(held, indent=1))
