"""Every option of a training run: one declaration that feeds the flags, YAML files, `--help`, docs and saved runs.

`option(...)` holds the default, the help text and the unit; cli.py derives its flags from the fields, `from_mapping`
reads YAML, and scripts/options_table.py prints docs/options.md.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from entrenar_gpu.errors import UserError

Method = Literal["qlora", "lora", "full"]
Schedule = Literal["constant", "linear", "cosine", "warmup-cosine", "step", "exponential"]
Optimizer = Literal["adamw", "adam", "sgd"]
Precision = Literal["f32", "f16", "int8", "auto"]
MOST = 2**20  # rows, positions and the like: beyond any device, and planned in seconds
LARGEST = 1e30  # of any number: on the device they are f32


def option(default: Any, help: str, unit: str = "", low: float | None = None, high: float = LARGEST) -> Any:
    """A field of a run's configuration. `low` and `high` are inclusive bounds on a number."""
    return field(default=default, metadata={"help": help, "unit": unit, "low": low, "high": high})


@dataclass(frozen=True)
class TrainConfig:
    """What `entrenar-gpu train` can be told: field `save_every` is the flag `--save-every` and a YAML key."""

    model: str = option("", "model folder in Hugging Face layout, or a Hub id (downloaded once)")
    data: str = option("", "JSONL file, or a folder with train.jsonl and valid.jsonl")
    output: str = option("", "run folder: adapter or weights, metrics.jsonl, checkpoints")
    method: Method = option("qlora", "qlora: NF4 base and adapters; lora: base as stored; full: every weight")

    rank: int = option(16, "adapter rank R", low=1, high=MOST)
    alpha: float | None = option(None, "adapter scale numerator; update = alpha/R * B A (default 2*rank)", low=0)
    target: str = option(
        "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        "projections that get adapters: any of q,k,v,o,gate,up,down (or their full names)",
    )
    rslora: bool = option(False, "scale by alpha/sqrt(R) instead of alpha/R (arXiv 2312.03732)")
    dropout: float = option(0.0, "dropout on the input of each adapter", "probability", 0, 0.99)
    lora_init: Literal["kaiming", "gaussian"] = option(
        "kaiming", "A: kaiming = U(-1/sqrt(in), 1/sqrt(in)), as PEFT; gaussian = N(0, 1/R^2); B is zero"
    )
    adapter_init: str | None = option(None, "start from this PEFT adapter folder instead of a fresh one")
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
    optimizer: Optimizer = option("adamw", "adamw: decoupled decay (arXiv 1711.05101); adam, sgd: decay as L2")
    momentum: float = option(0.9, "momentum of sgd", low=0, high=0.9999)
    weight_decay: float = option(0.0, "weight decay; norms and biases are left out in full training", low=0)
    beta1: float = option(0.9, "Adam: decay of the first moment", low=0, high=0.999999)
    beta2: float = option(0.999, "Adam: decay of the second moment", low=0, high=0.9999999)
    eps: float = option(1e-8, "Adam: added to the root of the second moment", low=1e-30)
    clip: float = option(1.0, "largest global gradient norm; 0 switches clipping off", low=0)
    label_smoothing: float = option(0.0, "share of the target spread over the vocabulary", "probability", 0, 0.99)

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
    seed: int = option(0, "seeds adapter init, shuffling and dropout", low=0, high=2**32 - 1)

    eval_data: str | None = option(None, "evaluation JSONL (default: valid.jsonl of a --data folder)")
    eval_every: int | None = option(None, "evaluate every N steps, and at step 0 and the end", "steps", low=1)
    save_every: int | None = option(None, "checkpoint every N steps; the end is always saved", "steps", low=1)
    save_total_limit: int | None = option(None, "keep only the newest N checkpoints", "checkpoints", low=1)
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
    otlp: str | None = option(None, "also send traces and metrics to this OTLP endpoint, http://... or grpc://...")
    device: str | None = option(None, "GPU by index or name as listed by `info`, or numpy (default: the best)")
    engine: Literal["auto", "wgpu", "dawn"] | None = option(
        None,
        "WebGPU library; auto: dawn where it is installed and grants matrix units or wgpu finds no GPU, else wgpu"
        " (default: ENTRENAR_ENGINE, else auto)",
    )

    @property
    def lora_alpha(self) -> float:
        return 2.0 * self.rank if self.alpha is None else self.alpha

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value = _checked(f, hints[f.name], getattr(self, f.name))
            object.__setattr__(self, f.name, value)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str) -> TrainConfig:
        """A configuration from decoded YAML or flags; `source` names it in errors. Unknown keys fail."""
        return cls(**known_keys(cls, values, source))

    def to_mapping(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def known_keys(cls: type, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`values` with keys checked against the fields of `cls`; both save_every and save-every are understood."""
    names = [f.name for f in dataclasses.fields(cls)]
    result = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in names:
            import difflib

            near = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{source}: unknown key {key!r}{hint}")
        result[name] = value
    return result


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError with the file and line."""
    try:
        with open(path, encoding="utf-8") as stream:
            values = yaml.safe_load(stream)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{path}:{where} not valid YAML: {getattr(error, 'problem', error)}") from None
    except (ValueError, LookupError, AttributeError, RecursionError) as error:  # of dates, tags, depths
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines")
    return values


def is_union(hint: Any) -> bool:
    """Whether a type hint is `A | B`, which Python 3.11 spells in two ways."""
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def _checked(f: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """`value` as the field's type, within its bounds; a UserError naming the flag otherwise."""
    options = typing.get_args(hint) if is_union(hint) else (hint,)
    if value is None and type(None) in options:
        return None
    (kind,) = [o for o in options if o is not type(None)]
    name, bad = flag(f.name), UserError(f"{flag(f.name)}: {value!r} is not {_describe(kind)}")
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise bad
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise bad
        return value
    if kind is str:
        value = str(value) if type(value) is int else value  # as YAML reads a name or an index that is all digits
        if not isinstance(value, str) or "\0" in value:
            raise bad
        return value
    # YAML reads 2e-4 as text; a whole float is a fine int
    try:
        number = float(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or not math.isfinite(number) or (kind is int and number != int(number)):
        raise bad
    low, high = f.metadata["low"], f.metadata["high"]
    if low is not None and number < low:
        raise UserError(f"{name}: {value} is below {low}")
    if number > high:
        raise UserError(f"{name}: {value} is above {high}")
    return kind(number)


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
