"""Every option of a training run, declared once (options.py says what becomes of a declaration)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from entrenar_gpu.config.options import MOST, Options, option

Method = Literal["qlora", "lora", "full"]
Schedule = Literal["constant", "linear", "cosine", "warmup-cosine", "step", "exponential"]
Optimizer = Literal["adamw", "adam", "sgd"]
Precision = Literal["f32", "f16", "int8", "auto"]


# The default of --target. It stands for every projection, whatever a family calls them, and names those of Llama: what
# runs have saved stays equal to it.
EVERY_TARGET = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


@dataclass(frozen=True)
class TrainConfig(Options):
    """What `entrenar-gpu train` can be told: field `save_every` is the flag `--save-every` and a YAML key."""

    model: str = option("", "model folder in Hugging Face layout, or a Hub id (downloaded once)")
    data: str | tuple[str, ...] = option(
        "",
        "file of rows (JSON lines or array, CSV, Parquet), a folder with train and valid files, or a data set of the"
        " Hub, as OWNER/NAME or OWNER/NAME:SUBSET; may be given again",
    )
    split: str | None = option(None, "split of a data set of the Hub (default: train)")
    mix: str | None = option(None, "share of samples of each --data, as in 0.7,0.3 (default: all of all)", listed=True)
    map: str | None = option(None, "columns by other names, as in prompt=question,completion=answer", listed=True)
    output: str = option("", "run folder: adapter or weights, metrics.jsonl, checkpoints")
    init: Literal["checkpoint", "random"] = option(
        "checkpoint", "random: from scratch, with --method full; --model may be a --shape's name (docs/models.md)"
    )
    method: Method = option("qlora", "qlora: NF4 base and adapters; lora: base as stored; full: every weight")

    rank: int = option(16, "adapter rank R", low=1, high=MOST)
    alpha: float | None = option(None, "adapter scale numerator; update = alpha/R * B A (default 2*rank)", low=0)
    target: str = option(
        EVERY_TARGET,
        "projections that get adapters, as q,k,v,o,gate,up,down or by their full names; the default is all-linear:"
        " every one that the model has; embed_tokens and lm_head too where they are named",
        listed=True,
    )
    layers: int | None = option(
        None, "train the last N layers only; the backward pass and its memory end there", "layers", low=1, high=10_000
    )
    layers_to_transform: str | None = option(None, "adapters in these layers only, as in 0,1,30", listed=True)
    modules_to_save: str | None = option(
        None, "beside the adapters, train these whole: embed_tokens, lm_head or both", listed=True
    )
    trainable_token_indices: str | None = option(
        None, "beside the adapters, train the embeddings of these token ids alone, as in 49150,49151", listed=True
    )
    rslora: bool = option(False, "scale by alpha/sqrt(R) instead of alpha/R (arXiv 2312.03732)")
    dropout: float = option(0.0, "dropout on the input of each adapter", "probability", 0, 0.99)
    lora_init: Literal["kaiming", "gaussian"] = option(
        "kaiming", "A: kaiming = U(-1/sqrt(in), 1/sqrt(in)), as PEFT; gaussian = N(0, 1/R^2); B is zero"
    )
    adapter_init: str | None = option(None, "start from this adapter folder (PEFT's or mlx-lm's), not a fresh one")
    double_quant: bool = option(True, "quantise the NF4 block scales to 8 bits too, as bitsandbytes does")

    steps: int | None = option(None, "optimizer steps; wins over --epochs", "steps", low=1)
    epochs: float | None = option(
        None, "passes over the data (default 3 when --steps is not given)", "passes", low=1e-6, high=1e4
    )
    batch: int = option(4, "rows per micro-batch", "rows", low=1, high=MOST)
    seq: int = option(512, "positions per row; longer samples are cut", "tokens", low=2, high=MOST)
    accumulate: int = option(1, "micro-batches per optimizer step", "micro-batches", low=1, high=MOST)

    lr: float = option(2e-4, "peak learning rate", low=0)
    schedule: Schedule = option("warmup-cosine", "learning rate over steps")
    warmup: int | None = option(
        None, "linear warm-up (default: 3% of the steps for warmup-cosine, else 0)", "steps", low=0
    )
    min_lr: float = option(0.0, "floor of every schedule", low=0)
    step_size: int | None = option(None, "steps between drops of the step schedule (default: a third)", "steps", low=1)
    gamma: float | None = option(
        None, "factor per drop (step, default 0.1) or per step (exponential, default 0.999)", low=0, high=1
    )
    lr_ratio_b: float | None = option(
        None, "LoRA+: the B of each adapter learns at lr times this (arXiv 2402.12354; 16 is usual)", low=0, high=1e6
    )
    optimizer: Optimizer = option("adamw", "adamw: decoupled decay (arXiv 1711.05101); adam, sgd: decay as L2")
    momentum: float = option(0.9, "momentum of sgd", low=0, high=0.9999)
    weight_decay: float = option(0.0, "weight decay; norms and biases are left out in full training", low=0)
    beta1: float = option(0.9, "Adam: decay of the first moment", low=0, high=0.999999)
    beta2: float = option(0.999, "Adam: decay of the second moment", low=0, high=0.9999999)
    eps: float = option(1e-8, "Adam: added to the root of the second moment", low=1e-30)
    clip: float = option(1.0, "largest global gradient norm; 0 switches clipping off", low=0)
    label_smoothing: float = option(0.0, "share of the target spread over the vocabulary", "probability", 0, 0.99)

    neftune: float | None = option(
        None,
        "noise on the embeddings in training, uniform within ALPHA/sqrt(L*D) for samples of L tokens (arXiv 2310.05914;"
        " 5 is usual)",
        "alpha",
        low=0,
        high=1e6,
    )

    loss_on: Literal["completions", "all"] = option(
        "completions", "completions: only what the assistant says, where the format tells; all: every token"
    )
    completions: Literal["chat", "raw"] = option(
        "chat",
        "prompt and completion texts: chat = a turn of the user and one of the assistant, where the model has a chat"
        " template; raw = as they are",
    )
    pack: bool = option(True, "fill rows with several whole samples (--no-pack: one padded row per sample)")
    shuffle: bool = option(True, "draw samples in seeded random order (--no-shuffle: file order)")
    seed: int = option(0, "seeds adapter init, shuffling, dropout and noise", low=0, high=2**32 - 1)

    eval_data: str | None = option(None, "evaluation data, likewise (default: the valid file of a --data folder)")
    eval_split: str | None = option(None, "split of a data set of the Hub to evaluate on; alone, of --data")
    eval_every: int | None = option(None, "evaluate every N steps, and at step 0 and the end", "steps", low=1)
    save_every: int | None = option(None, "checkpoint every N steps; the end is always saved", "steps", low=1)
    save_total_limit: int | None = option(None, "keep only the newest N checkpoints", "checkpoints", low=1)
    eval_epochs: float | None = option(
        None, "evaluate every so many passes over the data, instead of --eval-every", "passes", low=1e-6, high=1e4
    )
    keep_best: bool = option(
        False, "checkpoint at each best evaluation loss, keep that one, and make it the run's result"
    )
    patience: int | None = option(None, "stop after N evaluations without a better loss", "evaluations", low=1)
    steps_per_report: int | None = option(
        None, "print every N steps where output is no terminal (default: 20 times a run)", "steps", low=1
    )
    sample_prompts: str | None = option(
        None, 'JSONL file of {"prompt": ...} or {"messages": [...]} that the model answers at step 0 and the end'
    )
    sample_every: int | None = option(None, "answer them every N steps too", "steps", low=1)
    sample_tokens: int = option(64, "longest answer to them", "tokens", low=1, high=MOST)
    resume: str | None = option(None, "go on from a checkpoint folder, or from the newest of --output")

    precision: Precision = option(
        "f32",
        "arithmetic of matmuls with NF4 weights (with f16 and int8, attention and the vocabulary use f16 where the GPU"
        " has it); auto: f16 where the GPU has it; sums and everything else stay f32",
    )
    tune: bool = option(
        False, "benchmark matmul tile sizes on this GPU, once per GPU and driver; otherwise sizes alone decide"
    )
    memory_budget: float | None = option(
        None,
        "device memory the run may use (default: 90% of GPU memory; 16 GiB if unknown)",
        "GiB",
        low=0.01,
        high=MOST,
    )
    cache: bool = option(False, "qlora: keep the quantised weights, so that the next start reads instead of quantising")
    cache_dir: str | None = option(
        None, "folder of --cache (default: entrenar-gpu/weights in the system's cache folder); holds at most 64 GiB"
    )
    trace_level: Literal["step", "phase", "layer", "kernel"] = option(
        "layer", "how finely GPU time is measured and traced"
    )
    trace_kernels_every: int | None = option(
        None,
        "at trace level kernel: keep the kernels of every Nth step (default: of some 1,000 steps)",
        "steps",
        low=1,
    )
    otlp_sample: int | None = option(
        None, "send every Nth step to the OTLP endpoint (default: some 50,000 spans of a run)", "steps", low=1
    )
    report_to: str | None = option(
        None, "also tell these of the run: tensorboard, wandb, mlflow, trackio (each an extra)", listed=True
    )
    otlp: str | None = option(None, "also send traces and metrics to this OTLP endpoint, http://... or grpc://...")
    device: str | None = option(None, "GPU by index or name as listed by `info`, or numpy (default: the best)")
    engine: Literal["auto", "wgpu", "dawn"] | None = option(
        None,
        "WebGPU library; auto: dawn where it is installed and grants matrix units or wgpu finds no GPU, else wgpu"
        " (default: ENTRENAR_ENGINE, else auto)",
    )

    @property
    def data_names(self) -> tuple[str, ...]:
        """Everything that --data names."""
        return self.data if isinstance(self.data, tuple) else (self.data,)

    @property
    def lora_alpha(self) -> float:
        return 2.0 * self.rank if self.alpha is None else self.alpha
