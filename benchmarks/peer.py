"""The peer: QLoRA of a model's shape by transformers, PEFT and bitsandbytes in bf16, and the card's own ceilings.

    python -m benchmarks.peer train 1x512 4x512     a JSON line for each batch x tokens, as it is measured (--shape)
    python -m benchmarks.peer ceilings              copy bandwidth, and cuBLAS at 2048x9728x2560

Needs torch with CUDA; `train` also transformers, peft and bitsandbytes, with --liger Liger's kernels (liger-kernel).
Random weights, NF4 with double quantisation, rank 16 on every projection, AdamW on the adapters, layers recomputed
in the backward pass unless --keep.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from entrenar_gpu.config import SHAPES

RANK = 16
STEPS, WARM_UP = 5, 2
PRODUCT = (2048, 9728, 2560)  # m, n, k: up-projection of 2,048 tokens
COPY_BYTES = 4 << 30
REPEATS = 20
WARM_UP_SECONDS = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train")
    train.add_argument("rows", nargs="+", help="batch x tokens, as 4x512")
    train.add_argument("--shape", choices=SHAPES, default="qwen3-4b")
    train.add_argument("--keep", action="store_true", help="keep activations instead of recomputing layers")
    train.add_argument(
        "--liger", action="store_true", help="with Liger's kernels for norms, rotary, SwiGLU and the loss"
    )
    commands.add_parser("ceilings")
    args = parser.parse_args()
    try:
        import torch

        if not torch.cuda.is_available():
            sys.exit("torch finds no CUDA device")
        if args.command == "ceilings":
            print(json.dumps(ceilings()))
            return
        model = make_model(SHAPES[args.shape], not args.keep, args.liger)
    except ImportError as error:
        sys.exit(f"{error.name} is not installed")
    for text in args.rows:
        batch, tokens = map(int, text.split("x"))
        print(json.dumps(time_training(model, batch, tokens)), flush=True)


def make_model(shape: Mapping[str, Any], recompute: bool, liger: bool = False) -> Any:
    """The model of a config.json on the GPU, its projections quantised, with fresh adapters."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    made_of = getattr(transformers, shape["architectures"][0])
    config = made_of.config_class(**{key: value for key, value in shape.items() if key != "architectures"})
    config._attn_implementation = "sdpa"
    if liger:  # before a model is made: it replaces the classes that models are made of
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

        MODEL_TYPE_TO_APPLY_LIGER_FN[config.model_type]()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = made_of(config)
    torch.set_default_dtype(torch.float32)
    _quantise(model)
    model.is_loaded_in_4bit = model.is_quantized = True
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if recompute else {}
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=recompute, **options)
    adapters = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", bias="none", task_type="CAUSAL_LM")
    model = get_peft_model(model, adapters)
    model.train()
    return model


def _quantise(module: Any) -> None:
    """Replace every projection by its NF4 form, as loading with a BitsAndBytesConfig does."""
    import bitsandbytes
    import torch

    for name, child in list(module.named_children()):
        if isinstance(child, torch.nn.Linear) and name != "lm_head":
            made = bitsandbytes.nn.Linear4bit(
                child.in_features,
                child.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
            )
            made.weight = bitsandbytes.nn.Params4bit(
                child.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            setattr(module, name, made.cuda())
        else:
            _quantise(child)


def time_training(model: Any, batch: int, tokens: int) -> dict[str, Any]:
    """Median tokens/s over STEPS steps, after WARM_UP, and the peak of allocated memory in GiB."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), device="cuda")
    seconds = []
    for _ in range(WARM_UP + STEPS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    step = statistics.median(seconds[WARM_UP:])
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"batch": batch, "seq": tokens, "tokens_per_second": batch * tokens / step, "peak_gib": peak}


def ceilings() -> dict[str, float]:
    """TFLOP/s of cuBLAS at PRODUCT in bf16, f16 and f32, and TB/s of a device copy (read and write counted)."""
    import torch

    m, n, k = PRODUCT
    found = {}
    for name, dtype in (("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(size, k, device="cuda", dtype=dtype) for size in (m, n))
        found[f"cublas_{name}_tflops"] = 2 * m * n * k / _seconds(lambda a=a, b=b: a @ b.T) / 1e12
    source = torch.empty(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    found["copy_tb_per_second"] = 2 * COPY_BYTES / _seconds(lambda: target.copy_(source)) / 1e12
    return found


def _seconds(work: Callable[[], Any]) -> float:
    """Seconds of one of REPEATS repetitions on the GPU's clock, once its clocks have risen."""
    import torch

    begun = time.perf_counter()
    while time.perf_counter() - begun < WARM_UP_SECONDS:
        work()
        torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(REPEATS):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / REPEATS / 1e3


if __name__ == "__main__":
    main()
