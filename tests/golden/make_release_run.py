"""Record small runs of the first release people have (commit 559bb59): writes release_run/ beside this file.

Run it with that release's code, not with today's, on a machine with a Vulkan device (lavapipe will do):
    git worktree add /tmp/release 559bb59
    PYTHONPATH=/tmp/release python tests/golden/make_release_run.py
What is left there is what users have on their disks: run folders with checkpoints, an adapter, a trace, and the caches
of quantised weights and of tiles. continuation.json holds what the release itself made of each checkpoint on NumPy.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).with_name("release_run")
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 48,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "eos_token_id": 0,
}
RUN = [
    *("--model", "model", "--data", "train.jsonl", "--batch", "2", "--seq", "16", "--rank", "2", "--lr", "5e-3"),
    *("--schedule", "constant"),
]
# By run folder: its options, and the steps of the run and of what follows it.
RUNS: dict[str, list[str]] = {
    "qlora": ["--method", "qlora", "--tune", "--cache", "--cache-dir", "weights", "--target", "q,v,down"],
    "full": ["--method", "full"],
}
STEPS, MORE = 6, 10


def shapes() -> dict[str, tuple[int, ...]]:
    hidden, ffn, heads, key_values = 32, 48, 32, 16
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (key_values, hidden),
        "self_attn.v_proj": (key_values, hidden),
        "self_attn.q_norm": (16,),
        "self_attn.k_norm": (16,),
        "self_attn.o_proj": (hidden, heads),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    inner = {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    return {"model.embed_tokens.weight": (48, hidden), **inner, "model.norm.weight": (hidden,)}


def write_inputs() -> None:
    """A random model in BF16, and pre-tokenised samples that follow a simple rule."""
    rng = np.random.default_rng(3)
    (HERE / "model").mkdir(parents=True)
    (HERE / "model/config.json").write_text(json.dumps(CONFIG) + "\n")
    tensors = {}
    for name, shape in shapes().items():
        values = rng.standard_normal(shape)
        values = 1 + 0.2 * values if len(shape) == 1 else values / np.sqrt(shape[1])
        tensors[name] = values.astype(ml_dtypes.bfloat16)
    save_file(tensors, HERE / "model/model.safetensors", {"format": "pt"})
    with open(HERE / "train.jsonl", "w") as stream:
        for _ in range(16):
            start, stride = rng.integers(1, 48), rng.integers(1, 4)
            ids = ((start + stride * np.arange(rng.integers(6, 16))) % 48).tolist()
            stream.write(json.dumps({"input_ids": ids}) + "\n")


def train(output: str, *arguments: str) -> None:
    """One run of the release's command line, with its caches inside the fixture."""
    environment = os.environ | {"XDG_CACHE_HOME": str(HERE / "caches"), "MESA_SHADER_CACHE_DISABLE": "true"}
    command = [sys.executable, "-c", "from entrenar_gpu.cli import main; main()", "train", *RUN, "--output", output]
    subprocess.run([*command, *arguments, "--quiet"], cwd=HERE, env=environment, check=True)


def losses(run: str) -> list[list[float]]:
    """(step, loss, gradient norm) of each step in a run's metrics."""
    rows = [json.loads(line) for line in (HERE / run / "metrics.jsonl").read_text().splitlines()]
    return [[row["step"], row["loss"], row["grad_norm"]] for row in rows if "grad_norm" in row]


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    write_inputs()
    continued = {}
    for run, options in RUNS.items():
        train(run, *options, "--steps", str(STEPS))
        resume = ("--device", "numpy", "--resume", f"{run}/checkpoint-{STEPS:06}", "--steps", str(MORE))
        train("continued", *[o for o in options if o != "--tune"], *resume)
        continued[run] = losses("continued")
        shutil.rmtree(HERE / "continued")
    (HERE / "full/trace.jsonl").unlink()  # one trace is enough
    (HERE / "continuation.json").write_text(json.dumps(continued, indent=1) + "\n")
    files = [path for path in sorted(HERE.rglob("*")) if path.is_file()]
    for path in files:
        print(f"{path.stat().st_size:8} {path.relative_to(HERE)}")
    print(f"{sum(path.stat().st_size for path in files):8} in all")


if __name__ == "__main__":
    main()
