"""Flags and files of mlx-lm and TRL: what means the same is taken as that, what does not is said."""

import pytest
import yaml

from entrenar_gpu import cli
from entrenar_gpu.cli.options import FIELDS, make_config
from entrenar_gpu.cli.other_names import ALIASES, import_mlx_config, our_names
from entrenar_gpu.errors import UserError

MLX = """
model: M
train: true
data: folder
fine_tune_type: lora
num_layers: 16
batch_size: 2
iters: 100
grad_accumulation_steps: 8
learning_rate: 1e-5
max_seq_length: 1024
mask_prompt: true
steps_per_eval: 20
adapter_path: adapters
lora_parameters: {rank: 8, scale: 20.0, dropout: 0.1, keys: ["self_attn.q_proj", "self_attn.v_proj"]}
lr_schedule: {name: cosine_decay, warmup: 10, arguments: [1e-5, 1000, 1e-7]}
wandb: project
"""


def test_aliases_are_flags_of_ours():
    assert {name.replace("-", "_") for name in ALIASES.values()} <= FIELDS.keys()
    assert not {name.replace("-", "_") for name in ALIASES} & FIELDS.keys()


def test_both_spellings_are_understood():
    words = ["train", "--learning_rate", "1e-4", "--batch-size=2", "--lora_r", "4", "--seq", "64"]
    assert our_names(words) == ["train", "--lr", "1e-4", "--batch=2", "--rank", "4", "--seq", "64"]
    assert our_names(["train", "--num-layers", "4", "--seq", "9"]) == ["train", "--layers", "4", "--seq", "9"]
    for everything in (["--num_layers", "-1"], ["--num-layers=-1"]):
        assert our_names(["train", *everything, "--seq", "9"]) == ["train", "--seq", "9"]
    assert our_names(["eval", "--max-length", "4"]) == ["eval", "--max-length", "4"]


def test_switches_may_have_values_and_what_is_needless_is_said(capsys):
    assert our_names(["train", "--packing", "False", "--lr", "1"]) == ["train", "--no-pack", "--lr", "1"]
    assert our_names(["train", "--packing=true", "--use_rslora", "True"]) == ["train", "--pack", "--rslora"]
    assert our_names(["train", "--packing", "--lr_scheduler_type", "linear"]) == [
        "train",
        "--pack",
        "--schedule",
        "linear",
    ]
    assert capsys.readouterr().err == ""
    words = ["train", "--train", "--grad-checkpoint", "--gradient_checkpointing", "True", "--lr", "1"]
    assert our_names(words) == ["train", "--lr", "1"]
    said = capsys.readouterr().err.splitlines()
    assert said[1:] == [f"{flag}: nothing to do: the planner decides what is computed again"
                        for flag in ("--grad-checkpoint", "--gradient_checkpointing")]  # fmt: skip


def test_iterations_are_micro_batches(capsys):
    words = our_names(["train", "--iters", "100", "--grad-accumulation-steps", "8"])
    assert words == ["train", "--steps", "13", "--accumulate", "8"]
    assert capsys.readouterr().err == "--iters 100 of 8 micro-batches a step: --steps 13\n"
    assert our_names(["train", "--iters=7"]) == ["train", "--steps", "7"]
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="--iters: 'x' is not a whole number"):
        our_names(["train", "--iters", "x"])


def test_a_flag_by_another_name_reaches_the_run(capsys):
    assert cli.run(["train", "--model", "/nowhere", "--batch-size", "0"]) == 2
    assert "--batch: 0 is below 1" in capsys.readouterr().err


def test_a_file_of_mlx_lm_is_read_as_ours(tmp_path, capsys):
    (tmp_path / "mlx.yaml").write_text(MLX)
    text, left = import_mlx_config(str(tmp_path / "mlx.yaml"))
    (tmp_path / "ours.yaml").write_text(text)
    config = make_config({}, str(tmp_path / "ours.yaml"))
    assert (config.rank, config.alpha, config.target, config.dropout) == (8, 160.0, "q_proj,v_proj", 0.1)
    assert (config.steps, config.accumulate, config.batch, config.seq) == (13, 8, 2, 1024)
    assert (config.schedule, config.lr, config.min_lr, config.warmup) == ("cosine", 1e-5, 1e-7, 10)
    assert (config.output, config.method, config.eval_every, config.loss_on) == ("adapters", "lora", 20, "completions")
    assert config.layers == 16
    assert left == ["wandb: project"]
    assert cli.run(["import-config", str(tmp_path / "mlx.yaml")]) == 0
    captured = capsys.readouterr()
    assert yaml.safe_load(captured.out) == yaml.safe_load(text)
    assert captured.err == "no counterpart: wandb: project\n"
