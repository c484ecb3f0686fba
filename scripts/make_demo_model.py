"""Makes the checkpoint that ships with the project: a small Qwen3 model, pretrained by this trainer from scratch.

    python scripts/make_demo_model.py

Its text is the training side of entrenar_gpu.corpus, one document a docstring; the docstrings that the demo evaluates
on are not in it. Steps and learning rates, the demo's too, were chosen by the loss on 305 of the training documents,
set aside: 2.72, 2.65 and 3.32 after 400, 600 and 1200 steps.

The shipped weights come from CPython 3.11.7's 4,471 documents (their sha256 begins 69c371659f99) and 20 seconds on an
NVIDIA H200: 2.67 nats a token on the held-out documents, 7.62 before. Another Python has other docstrings; `--texts`
takes the folder that a run elsewhere wrote.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np

from entrenar_gpu.cli import docstrings
from entrenar_gpu.cli.demo import MODEL
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.events import EvalRecord, StepRecord
from entrenar_gpu.export import copy_model_files, save_checkpoint
from entrenar_gpu.files import TensorSource, save_safetensors, write_text
from entrenar_gpu.model import SINGLE_FILE, HFCheckpoint, ModelConfig, WeightSpec, parse_model_config
from entrenar_gpu.train import Trainer

SEED = 0
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.02,
    "torch_dtype": "float32",
}
TRAINING = {
    "method": "full",
    "steps": 600,
    "batch": 16,
    "seq": 512,
    "lr": 2e-3,
    "min_lr": 2e-4,
    "warmup": 100,
    "weight_decay": 0.1,
    "beta2": 0.95,
    "seed": SEED,
}


class Progress:
    """Observer that prints every hundredth step and every evaluation."""

    def step_finished(self, record: StepRecord) -> None:
        if record.step % 100 == 0:
            print(f"step {record.step}: loss {record.loss:.3f}, {record.step_seconds * 1e3:.0f} ms", flush=True)

    def eval_finished(self, record: EvalRecord) -> None:
        print(f"step {record.step}: loss on held-out documents {record.loss:.3f}", flush=True)


def write_texts(folder: Path, found: docstrings.Corpus) -> None:
    """Write train.jsonl and, with what is held out in the same form, valid.jsonl: one {"text"} a line."""
    held_out = ("\n\n".join([pair.prompt, pair.completion]) for pair in found.valid)
    for name, texts in (("train.jsonl", found.pretraining_texts()), ("valid.jsonl", held_out)):
        write_text(folder / name, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))


def read_texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def write_random_model(folder: Path, texts: list[str]) -> None:
    """A model folder with random weights and a tokenizer trained on `texts`.

    Weights are normal with GPT-2's deviations: 0.02, and that over sqrt(2 layers) where a block adds to the residual.
    """
    docstrings.train_tokenizer(texts, CONFIG["vocab_size"], folder)
    write_text(folder / "config.json", json.dumps(CONFIG, indent=2) + "\n")
    endings = {key: CONFIG[key] for key in ("eos_token_id", "pad_token_id")}
    write_text(folder / "generation_config.json", json.dumps(endings, indent=2) + "\n")
    config = parse_model_config(CONFIG)
    rng = np.random.default_rng(SEED)
    weights = {spec.name: _initial(rng, spec, config) for spec in config.weights}
    save_safetensors(folder / SINGLE_FILE, weights, {"format": "pt"})


def _initial(rng: np.random.Generator, spec: WeightSpec, config: ModelConfig) -> np.ndarray:
    if spec.kind == "norm":
        return np.ones(spec.shape, np.float32)
    deviation = CONFIG["initializer_range"]
    if spec.name.endswith(("o_proj.weight", "down_proj.weight")):
        deviation /= np.sqrt(2 * len(config.layers))
    return (deviation * rng.standard_normal(spec.shape)).astype(np.float32)


def store_bf16(trained: Path, target: Path) -> None:
    """Write the trained model with weights rounded to BF16."""
    checkpoint = HFCheckpoint.open(trained)
    copy_model_files(trained, target, "bfloat16")
    weights = checkpoint.config.weights
    save_checkpoint(target, [TensorSource(w.name, w.shape, "BF16", partial(checkpoint.f32, w.name)) for w in weights])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/demo-model"), help="folder for the run (made anew)")
    parser.add_argument("--texts", type=Path, help="folder with train.jsonl and valid.jsonl to use as they are")
    parser.add_argument("--output", type=Path, default=MODEL, help="where the model goes")
    parser.add_argument("--device", help="adapter by index or name")
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    texts = args.texts or args.work / "texts"
    if args.texts is None:
        texts.mkdir(parents=True)
        write_texts(texts, docstrings.collect())
    written = texts / "train.jsonl"
    print(f"{written}: {len(read_texts(written))} documents, sha256 {hashlib.sha256(written.read_bytes()).hexdigest()}")
    write_random_model(args.work / "random", read_texts(written))
    config = TrainConfig(
        model=str(args.work / "random"),
        data=str(texts),
        output=str(args.work / "run"),
        device=args.device,
        **TRAINING,
    )
    Trainer(config, [Progress()]).run()
    store_bf16(args.work / "run", args.output)
    print(f"{args.output}: {sum(f.stat().st_size for f in args.output.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
