"""The flags of mlx-lm and TRL that mean what one of ours means, and mlx-lm's configuration files read as ours."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from entrenar_gpu.config import load_yaml
from entrenar_gpu.errors import UserError

# Of `train`, written with hyphens: both spellings are understood.
ALIASES = {
    # mlx-lm
    "batch-size": "batch",
    "learning-rate": "lr",
    "max-seq-length": "seq",
    "steps-per-eval": "eval-every",
    "num-layers": "layers",  # of which -1 is all
    "grad-accumulation-steps": "accumulate",
    "adapter-path": "output",
    # TRL and transformers
    "model-name-or-path": "model",
    "dataset-name": "data",
    "output-dir": "output",
    "max-length": "seq",
    "max-steps": "steps",
    "num-train-epochs": "epochs",
    "per-device-train-batch-size": "batch",
    "gradient-accumulation-steps": "accumulate",
    "warmup-steps": "warmup",
    "max-grad-norm": "clip",
    "lora-r": "rank",
    "lora-alpha": "alpha",
    "lora-dropout": "dropout",
    "use-rslora": "rslora",
    "label-smoothing-factor": "label-smoothing",
    "adam-beta1": "beta1",
    "adam-beta2": "beta2",
    "adam-epsilon": "eps",
    "eval-steps": "eval-every",
    "save-steps": "save-every",
    "resume-from-checkpoint": "resume",
    "logging-steps": "steps-per-report",
    "lr-scheduler-type": "schedule",
    "packing": "pack",
    "neftune-noise-alpha": "neftune",
    "loraplus-lr-ratio": "lr-ratio-b",  # PEFT's
}
# Switches that TRL also gives a value.
_SWITCHES = ("packing", "use-rslora")
# What the planner does by itself, or a command of ours is for.
_NEEDLESS = ("grad-checkpoint", "gradient-checkpointing", "train", "use-peft")
ITERS = "iters"  # mlx-lm counts micro-batches

# mlx-lm's configuration by our keys; what has no counterpart is listed.
_MLX_KEYS = {
    "model": "model",
    "data": "data",
    "adapter_path": "output",
    "seed": "seed",
    "batch_size": "batch",
    "learning_rate": "lr",
    "max_seq_length": "seq",
    "grad_accumulation_steps": "accumulate",
    "steps_per_report": "steps_per_report",
    "steps_per_eval": "eval_every",
    "save_every": "save_every",
}
_NOTHING_TO_DO = ("train", "config", "grad_checkpoint", "resume_adapter_file", "val_batches", "test", "test_batches")


def our_names(arguments: Sequence[str]) -> list[str]:
    """A command line of `train` in our own flags. `--iters N` becomes steps, and that is said where they differ."""
    if not arguments or arguments[0] != "train":
        return list(arguments)
    words = _without_all_layers([_ours(word) for word in _needed(_switched(arguments))])
    flags = [word.partition("=")[0] for word in words]
    if f"--{ITERS}" not in flags:
        return words
    iters, accumulate = _value(words, f"--{ITERS}"), _value(words, "--accumulate") or "1"
    if not (iters or "").isdecimal() or not accumulate.isdecimal() or not int(accumulate):
        raise UserError(f"--iters: {iters!r} is not a whole number")
    steps = math.ceil(int(iters or 0) / int(accumulate))
    if steps != int(iters or 0):
        print(f"--iters {iters} of {accumulate} micro-batches a step: --steps {steps}", file=sys.stderr)
    at = flags.index(f"--{ITERS}")
    return [*words[:at], "--steps", str(steps), *words[at + (1 if "=" in words[at] else 2) :]]


def _plain(word: str) -> str:
    """A flag's name, with hyphens."""
    return word.removeprefix("--").partition("=")[0].replace("_", "-") if word.startswith("--") else ""


def _switched(arguments: Sequence[str]) -> list[str]:
    """Switches that have a value as switches of ours: --packing False is --no-pack."""
    words: list[str] = []
    for word in arguments:
        before = words[-1] if words else ""
        name, equals, value = word.partition("=")
        if _plain(name) in _SWITCHES and equals:
            words.append(name if value.lower() == "true" else f"--no-{ALIASES[_plain(name)]}")
        elif _plain(before) in _SWITCHES and word.lower() in ("true", "false"):
            words[-1] = before if word.lower() == "true" else f"--no-{ALIASES[_plain(before)]}"
        else:
            words.append(word)
    return words


def _needed(words: Sequence[str]) -> list[str]:
    """Without the flags that have nothing to do here, which is said."""
    needless = [word for word in words if _plain(word) in _NEEDLESS]
    for word in needless:
        why = "the planner decides what is computed again" if "checkpoint" in word else "as it is"
        print(f"{word}: nothing to do: {why}", file=sys.stderr)
    return [word for at, word in enumerate(words) if word not in needless and not _value_of(words, at, needless)]


def _value_of(words: Sequence[str], at: int, needless: Sequence[str]) -> bool:
    return at > 0 and words[at - 1] in needless and words[at].lower() in ("true", "false")


def _without_all_layers(words: list[str]) -> list[str]:
    """mlx-lm's --num-layers -1 stands for every layer, as no --layers does."""
    at = [i for i, word in enumerate(words) if word == "--layers=-1" or words[i : i + 2] == ["--layers", "-1"]]
    return [word for i, word in enumerate(words) if i not in at and not (i - 1 in at and words[i - 1] == "--layers")]


def _ours(word: str) -> str:
    name, equals, value = word.partition("=")
    ours = ALIASES.get(name.removeprefix("--").replace("_", "-")) if name.startswith("--") else None
    return word if ours is None else f"--{ours}{equals}{value}"


def _value(words: Sequence[str], name: str) -> str | None:
    for at, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag == name:
            return value if equals else words[at + 1] if at + 1 < len(words) else None
    return None


def import_mlx_config(path: str) -> tuple[str, list[str]]:
    """(our YAML, what of an mlx-lm configuration has no counterpart). Raises UserError naming the file."""
    import yaml

    given = load_yaml(path)
    ours: dict[str, Any] = {name: given[key] for key, name in _MLX_KEYS.items() if given.get(key) is not None}
    left: list[str] = []
    method = given.get("fine_tune_type", "lora")
    if method in ("lora", "full"):
        ours["method"] = method
    else:
        left.append(f"fine_tune_type: {method}")
    _read_lora(given.get("lora_parameters"), ours, left)
    _read_schedule(given.get("lr_schedule"), ours, left)
    if given.get("optimizer") in ("adam", "adamw", "sgd"):
        ours["optimizer"] = given["optimizer"]
    elif given.get("optimizer") is not None:
        left.append(f"optimizer: {given['optimizer']}")
    if isinstance(given.get("iters"), int):
        ours["steps"] = math.ceil(given["iters"] / max(int(given.get("grad_accumulation_steps") or 1), 1))
    if given.get("mask_prompt") is not None:
        ours["loss_on"] = "completions" if given["mask_prompt"] else "all"
    layers = given.get("num_layers", -1)
    if isinstance(layers, int) and layers > 0:
        ours["layers"] = layers
    elif layers not in (None, -1):
        left.append(f"num_layers: {layers}")
    read = {*_MLX_KEYS, "fine_tune_type", "lora_parameters", "lr_schedule", "optimizer", "iters", "mask_prompt"}
    known = {*read, "num_layers", "optimizer_config", *_NOTHING_TO_DO}
    left += [f"{key}: {given[key]}" for key in given if key not in known]
    return yaml.safe_dump(ours, sort_keys=False, allow_unicode=True), left


def _read_lora(lora: Any, ours: dict[str, Any], left: list[str]) -> None:
    if not isinstance(lora, Mapping):
        return
    rank, scale = lora.get("rank"), lora.get("scale")
    if isinstance(rank, int):
        ours["rank"] = rank
        if isinstance(scale, (int, float)):
            ours["alpha"] = float(scale) * rank  # their scale is alpha / rank
    if lora.get("dropout") is not None:
        ours["dropout"] = lora["dropout"]
    if isinstance(lora.get("keys"), list):
        ours["target"] = ",".join(str(key).rpartition(".")[2] for key in lora["keys"])
    left += [f"lora_parameters.{key}: {lora[key]}" for key in lora if key not in ("rank", "scale", "dropout", "keys")]


def _read_schedule(schedule: Any, ours: dict[str, Any], left: list[str]) -> None:
    """mlx-lm's rate is constant without one; of its schedules the cosine has a counterpart."""
    if not isinstance(schedule, Mapping):
        ours["schedule"] = "constant"
        return
    arguments = schedule.get("arguments")
    if schedule.get("name") == "cosine_decay" and isinstance(arguments, list) and arguments:
        ours |= {"schedule": "cosine", "lr": arguments[0]}
        if len(arguments) > 2:
            ours["min_lr"] = arguments[2]
    else:
        left.append(f"lr_schedule: {schedule.get('name')}")
    if schedule.get("warmup") is not None:
        ours["warmup"] = schedule["warmup"]
