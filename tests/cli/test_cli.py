"""The command line: flags from the configuration, one line and status 2 for bad input."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from entrenar_gpu import cli
from entrenar_gpu.cli import main, options
from entrenar_gpu.cli.demo import MODEL
from entrenar_gpu.config.options import flag
from entrenar_gpu.config.presets import SHAPES
from entrenar_gpu.config.train_config import TrainConfig
from entrenar_gpu.errors import OutOfDeviceMemory, UserError
from tests import ROOT
from tests.helpers.tiny import make_data, make_model
from tests.helpers.word_tokenizer import word_tokenizer


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a failing command prints."""
    assert cli.run(list(arguments)) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--rank", "0"], "--rank: 0 is below 1"),
        (["train", "--rank", "many"], "--rank: 'many' is not a whole number"),
        (["train", "--alpha", "1e300"], "--alpha: 1e300 is above 1e+30"),  # no f32, so no shader compiles
        (["train", "--eps", "0"], "--eps: 0 is below 1e-30"),  # where a gradient is 0, as A's at first, 0 / 0
        (["plan", "--memory-budget", "1e300"], "--memory-budget: 1e300 is above 1048576"),
        (["plan", "--batch", "1e9"], "--batch: 1e9 is above 1048576"),
        (["train", "--schedule", "zigzag"], "--schedule: 'zigzag' is not one of constant"),
        (["plan", "--model", str(MODEL), "--target", "q,nose"], "--target: nose_proj"),
        (["train", "--lr", "nan"], "--lr: 'nan' is not a number"),
        (["train", "--batch", "nan"], "--batch: 'nan' is not a whole number"),
        (["train", "--steps", "inf"], "--steps: 'inf' is not a whole number"),
        (["train", "--epochs", "0"], "--epochs: 0 is below 1e-06"),
        (["train", "--epochs", "1e30"], "--epochs: 1e30 is above 10000.0"),  # every epoch is packed at the start
        (["train", "--gamma", "1e30"], "--gamma: 1e30 is above 1"),  # to the power of the steps
        (["train", "--output", "a\0b"], "--output: 'a\\x00b' is not text"),
        (["train", "--no-such-flag"], "No such option: --no-such-flag"),
        (["train"], "--model: missing"),
        (["train", "--otlp", "nonsense"], "--otlp: expected"),
        (["train", "--model", "/nowhere"], "--data: missing"),
        (["plan", "--model", "/nowhere"], "--model: /nowhere: no such folder"),
        (["plan", "--model", "/nowhere", "--profile", "x"], "--profile: 'x' is not one of webgpu"),
        (["frobnicate"], "frobnicate"),
        (["bench", "train", "--shape", "qwen9"], "--shape: 'qwen9' is not one of gemma2-2b"),
        (["bench", "train", "--shape", "llama2-7b", "--seq", "5000"], "--seq: 5000 exceeds the model's 4096 positions"),
        (["bench", "gemm", "--rows", "²"], "--rows: '²' is not a list of whole numbers"),
        (["bench", "gemm", "--rows", "100000000000000"], "lower --batch or --seq"),  # and no memory is taken for it
        (["plan", "--model", "/nowhere", "--device", "²"], "--device '²' matches no GPU"),
        (["demo", "--device", "numpy", "--steps", "1", "--output", "/dev/null/x"], "/dev/null/x"),
    ],
)
def test_bad_flags_get_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert says in failure(capsys, *arguments)


def test_yaml_file_and_flags_that_win(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("rank: 4\nlr: 2e-4\nsave-every: 10\npack: false\ndevice: 0\n")
    config = options.make_config({"rank": "8"}, str(path))
    assert (config.rank, config.lr, config.save_every, config.pack) == (8, 2e-4, 10, False)
    assert config.device == "0"  # an index, which YAML reads as a number
    assert config.lora_alpha == 16


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rnak: 4\n", "unknown key 'rnak'; did you mean 'rank'?"),
        ("learning_rate: 1e-4\n", "unknown key 'learning_rate'; did you mean 'lr'?"),  # as mlx-lm and TRL have it
        ("lr: 1e-4\nrank: 4\nlr: 2e-4\n", "line 3: 'lr' is given twice"),
        ("save-every: 1\nsave_every: 2\n", "save_every is given twice, with - and with _"),
        ("rank: [1\n", "line 2 not valid YAML"),
        ("- rank\n", "expected `key: value` lines"),
        ("rank: true\n", "rank: True is not a whole number"),
        ("steps: .inf\n", "steps: inf is not a whole number"),
        (f"steps: {10**400}\n", "is not a whole number"),
        ("output: 2025-31-12\n", "not valid YAML: month must be in 1..12"),
        ("steps: !!float x\n", "not valid YAML"),
        ("steps: !!int ''\n", "not valid YAML"),
        ("steps: !!timestamp x\n", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
    ],
)
def test_bad_yaml_names_the_file_or_key(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        options.make_config({}, str(path))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes have no names in folders there")
@pytest.mark.parametrize("option", ["--config", "--sample-prompts"])
def test_a_pipe_that_nobody_writes_to_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    data, model = make_data(tmp_path / "train.jsonl"), make_model(tmp_path / "model")
    word_tokenizer(model, 320)
    known = ["--model", str(model), "--data", str(data), "--output", str(tmp_path / "run"), "--device", "numpy"]
    said = failure(capsys, "train", *known, "--seq", "48", option, str(tmp_path / "pipe"))
    assert f"{tmp_path / 'pipe'}: cannot be read: it is no file" in said


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="needs /dev/fd")
def test_what_the_shell_hands_over_as_a_file_is_read() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"rank: 4\n")
    os.close(writing)
    assert options.make_config({}, f"/dev/fd/{reading}").rank == 4
    os.close(reading)


def test_the_package_is_the_command_line() -> None:
    command = [sys.executable, "-m", "entrenar_gpu", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.startswith("entrenar-gpu ")


def test_every_option_has_help_and_a_flag(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.run(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for name, f in options.FIELDS.items():
        assert flag(name) in text
        assert f.metadata["help"]
        if f.metadata["unit"]:
            assert re.search(rf"{flag(name)} .*?\[{f.metadata['unit']}\]", text, re.DOTALL)
    assert "(default qlora)" in text
    assert cli.run(["generate", "--help"]) == 0
    assert "(default: what the adapter was trained on, else as stored)" in " ".join(
        capsys.readouterr().out.replace("│", " ").split()
    )


def test_options_page_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    import runpy

    root = ROOT
    runpy.run_path(str(root / "scripts" / "options_table.py"), run_name="__main__")
    assert capsys.readouterr().out == (root / "docs" / "options.md").read_text()


def test_the_plan_in_the_readme_is_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SHAPES["qwen3-4b"]))
    readme = (ROOT / "README.md").read_text()
    command, shown = re.search(
        r"`entrenar-gpu (plan --model Qwen/Qwen3-4B [^`]*)` prints\n\n```\n(.*?)```", readme, re.S
    ).groups()
    assert cli.run(command.replace("Qwen/Qwen3-4B", str(config)).split()) == 0
    assert shown.split() == capsys.readouterr().out.split()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_nobody_expected_of_a_file_is_one_line(tmp_path: Path) -> None:
    """Standard output on a full disk, as `info > file`."""
    command = [
        sys.executable,
        "-m",
        "entrenar_gpu.cli",
        "plan",
        "--model",
        str(make_model(tmp_path / "m")),
        "--seq",
        "32",
    ]
    with open("/dev/full", "w") as full:
        done = subprocess.run([*command, "--json"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr.splitlines() == ["error: output: No space left on device"]
    assert done.returncode == 2


def test_a_training_goes_on_when_nobody_reads_its_lines_any_more() -> None:
    script = "import sys, time; from entrenar_gpu.cli.display import Progress; p = Progress()\n"
    script += "for i in range(40): p.say(str(i)); time.sleep(0.01)\n"
    script += "print('went on', file=sys.stderr)"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"went on\n"
    assert process.wait() == 0


def test_plan_refuses_what_train_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_model(tmp_path / "model")
    assert "--seq: 4000 exceeds the model's 512 positions" in failure(
        capsys, "plan", "--model", str(folder), "--seq", "4000"
    )
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    for odd in (["bfloat16"], {"a": 1}):
        (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": odd}))
        assert "torch_dtype" in failure(capsys, "plan", "--model", str(folder), "--seq", "32")


@pytest.mark.parametrize(("torch", "nbytes"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_plan_knows_the_types_that_a_config_may_name(
    torch: str, nbytes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_model(tmp_path / "model")
    with_file = planned(capsys, folder)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": torch}))
    assert 4 * planned(capsys, folder) == nbytes * with_file


def planned(capsys: pytest.CaptureFixture[str], folder: Path) -> int:
    """Bytes of embeddings of a LoRA run's plan, which are as the model stores them."""
    assert cli.run(["plan", "--model", str(folder), "--method", "lora", "--seq", "32", "--json"]) == 0
    return json.loads(capsys.readouterr().out)["embedding_bytes"]


@pytest.mark.parametrize("option", ["--split", "--eval-split"])
def test_a_file_has_no_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    """Else evaluation is on what was trained on."""
    model, data = make_model(tmp_path / "model"), make_data(tmp_path / "train.jsonl")
    known = "--model", str(model), "--data", str(data), "--output", str(tmp_path / "run"), "--device", "numpy"
    assert f"{option}: {data} is a file, and has none" in failure(capsys, "train", *known, "--seq", "48", option, "x")


def test_resume_may_stand_alone() -> None:
    assert main._with_resume(["train", "--resume", "--steps", "3"]) == ["train", "--resume", "latest", "--steps", "3"]
    assert main._with_resume(["train", "--resume"]) == ["train", "--resume", "latest"]
    assert main._with_resume(["train", "--resume", "run/checkpoint-000003"])[-1] == "run/checkpoint-000003"


def test_plan_sums_up_and_needs_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert cli.run(["plan", "--model", str(folder / "config.json"), "--json", "--rank", "4", "--seq", "32"]) == 0
    parts = json.loads(capsys.readouterr().out)
    kinds = [key for key in parts if key.endswith("_bytes") and key not in ("peak_bytes", "budget_bytes")]
    assert parts["peak_bytes"] == sum(parts[kind] for kind in kinds)
    weights = 2 * (4 * 24 * 64 + 2 * 2 * 24 * 64 + 64 * 96 + 3 * 64 * 160)
    assert parts["nf4_bytes"] == weights // 2


def test_qwen3_4b_fits_four_gib(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SHAPES["qwen3-4b"]))
    arguments = ["plan", "--model", str(config), "--method", "qlora", "--rank", "16", "--batch", "1", "--seq", "512"]
    assert cli.run([*arguments, "--memory-budget", "4", "--json"]) == 0
    parts = json.loads(capsys.readouterr().out)
    assert parts["peak_bytes"] <= 4 * 2**30
    assert parts["nf4_bytes"] == 3_633_315_840 // 2
    assert parts["recompute"] != "nothing"


def test_a_batch_that_cannot_fit_names_one_that_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_model(tmp_path / "model")
    arguments = ["plan", "--model", str(folder), "--seq", "64", "--rank", "4", "--memory-budget", "0.01"]
    line = failure(capsys, *arguments, "--batch", "64")
    fits = int(line.split("--batch ")[2].split()[0])
    assert cli.run([*arguments, "--batch", str(fits)]) == 0
    capsys.readouterr()
    failure(capsys, *arguments, "--batch", str(fits + 1))


@pytest.mark.gpu
def test_train_eval_merge_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = make_model(tmp_path / "model"), make_data(tmp_path / "train.jsonl")
    run = tmp_path / "run"
    common = ["--model", str(model), "--data", str(data), "--seq", "48"]
    short = ["--steps", "2", "--batch", "2", "--rank", "4"]
    assert cli.run(["train", *common, *short, "--output", str(run), "--eval-data", str(data)]) == 0
    capsys.readouterr()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 2]
    assert {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "step_seconds"} <= set(lines[1])
    assert (run / "trace.jsonl").stat().st_size > 0

    assert cli.run(["eval", *common, "--adapter", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(lines[-1]["eval_loss"], abs=1e-6)
    assert "already holds a run" in failure(capsys, "train", *common, *short, "--output", str(run))
    assert f"--model: {run} holds an adapter" in failure(capsys, "eval", "--model", str(run), "--data", str(data))
    onto = "merge", "--model", str(model), "--adapter", str(run), "--output"
    assert f"--output: {run} holds the adapter" in failure(capsys, *onto, str(run))
    assert failure(capsys, *onto, str(data)).endswith(f"{data}: cannot be written: File exists")
    merged = tmp_path / "merged"
    assert cli.run(["merge", "--model", str(model), "--adapter", str(run), "--output", str(merged)]) == 0
    as_stored = ["--seq", "48", "--method", "lora", "--json"]
    assert cli.run(["eval", "--model", str(merged), "--data", str(data), *as_stored]) == 0


def test_config_round_trip() -> None:
    config = TrainConfig(rank=3, lr=1e-3, target="q,v")
    assert TrainConfig.from_mapping(config.to_mapping(), "saved") == config


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        ("train", "lower --memory-budget, --batch or --seq, or end what else uses it"),
        ("generate", "lower --memory-budget, --slots, --context or --seq, or end what else uses it"),
        ("merge", "lower what is asked of it, or end what else uses it"),
    ],
)
def test_what_to_lower_are_flags_that_the_command_has(command, advice, monkeypatch, capsys):
    def short(*_: object, **__: object) -> None:
        raise OutOfDeviceMemory("the GPU has no memory left")

    monkeypatch.setattr("typer.core.TyperGroup.main", short)
    assert main.run([command]) == 2
    assert capsys.readouterr().err == f"error: the GPU has no memory left; {advice}\n"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")])
def test_a_machine_without_memory_is_one_line(error, monkeypatch, capsys):
    monkeypatch.setattr("typer.core.TyperGroup.main", Mock(side_effect=error))
    assert main.run(["merge"]) == 2
    assert capsys.readouterr().err.startswith("error: this machine has no memory left; lower ")
