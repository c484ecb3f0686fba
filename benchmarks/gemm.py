"""Matmuls of a QLoRA step at a model's shapes: `python benchmarks/gemm.py --rows 512,2048 --precision f32`.

Prints a line per matmul as it is measured: TFLOP/s of the op and of its multiplication alone, GB/s of what it must read
and write, relative error of sampled rows against float64. `--sweep` times the blockings that the model of waves finds
plausible and prints the fastest beside the default choice; `--only` picks matmuls whose name contains a text.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from entrenar_gpu.cli.bench.gemm import bench_gemm, cases
from entrenar_gpu.files import write_text
from entrenar_gpu.gpu import Device, KernelCache, MatmulCase, choice_of, open_device, sweep
from entrenar_gpu.model import model_shape
from entrenar_gpu.ops.gemm.tiles import to_numbers

WAKE_SECONDS = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-4b")
    parser.add_argument("--rows", default="512,2048,8192")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--precision", default="f32,f16,int8")
    parser.add_argument("--only", default="")
    parser.add_argument("--device")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no matmul after this long")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = open_device(args.device)
    rows = [int(n) for n in args.rows.split(",")]
    wanted = cases(model_shape(args.shape), rows, args.rank, args.precision.split(","))
    chosen = [p for p in wanted if any(text in p.name for text in args.only.split(","))]
    print(f"{device.caps.name}, {device.info['description']}")
    begin, results = time.perf_counter(), []
    kernels = KernelCache(device)
    if not device.caps.software:
        _wake(device, kernels, chosen[:1])
    for case in chosen:
        if time.perf_counter() - begin > args.seconds:
            break
        rows_of = [_swept(device, kernels, case)] if args.sweep else list(bench_gemm(device, [case], kernels))
        for row in rows_of:
            results.append(row)
            _print(row)
    if args.json:
        write_text(args.json, json.dumps(results, indent=1))


def _wake(device: Device, kernels: KernelCache, cases: Sequence[MatmulCase]) -> None:
    """Measure for WAKE_SECONDS and forget it: what a process multiplied first was seen at a third of its speed."""
    begin = time.perf_counter()
    while cases and time.perf_counter() - begin < WAKE_SECONDS:
        list(bench_gemm(device, cases, kernels))


def _swept(device: Device, kernels: KernelCache, case: MatmulCase) -> dict:
    rows = sorted(sweep(device, kernels, case), key=lambda row: row["seconds"])
    default = to_numbers(choice_of(case, device.caps))
    held = next(row for row in rows if tuple(row["tile"]) == default)
    beside = "; ".join(f"{row['tflops']:.1f} {list(row['tile'])}" for row in rows[1:4])
    return {
        **rows[0],
        "default_tflops": held["tflops"],
        "note": f"default {held['tflops']:.1f} {list(default)}; {beside}",
    }


def _print(row: dict) -> None:
    sizes = "x".join(str(n) for n in row["sizes"])
    error = "" if row["error"] is None else f"error {row['error']:.1e}{'' if row['within'] else ' TOO LARGE'}"
    print(
        f"{row['arithmetic']:5} {row['name']:24} {sizes:17} {row['seconds'] * 1e6:9.1f} us {row['tflops']:7.2f} TFLOP/s"
        f" (alone {row['product_tflops']:6.2f}) {row['gbytes_per_second']:7.1f} GB/s {error} {list(row['tile'])}"
        f" {row.get('note', '')}",
        flush=True,
    )


if __name__ == "__main__":
    main()
