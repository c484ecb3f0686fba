"""What README and docs tell people to type, typed: every command and every piece of Python, on small models that stand
in the Hub's cache under the names that the pages use."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from entrenar_gpu import cli
from tests import ROOT
from tests.data.test_chat import model_folder
from tests.helpers import chat_templates
from tests.helpers.tiny import make_model

SMALL = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 320, "num_hidden_layers": 1,
         "max_position_embeddings": 8192}  # fmt: skip
MODELS = {
    "Qwen/Qwen3-4B": {},
    "HuggingFaceTB/SmolLM2-135M-Instruct": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
}
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
SHELL, PYTHON = ("sh", "bash"), ("python",)
# What is no command of ours: set-up, which make, .ci and docs-test run.
OTHERS = ("make ", "sudo ", "pip ", "python3 -m venv ", "for ", "    echo ", "done ", "M=")
NOT_RUN = {
    ("docs/adding-a-family.md", 0): "a piece of a file",
    ("docs/custom-ops.md", 0): "tests/test_custom_op.py runs it on the device and in NumPy",
    ("docs/generate.md", 1): "needs lm-eval and its tasks' data; make parity has it",
    ("docs/server.md", 0): "asks a server, as tests/serve does",
}
BEFORE = {
    (
        "docs/python.md",
        1,
    ): "from dataclasses import replace\ntrainer = Trainer(replace(config, output='runs/steps'), data=rows)"
}
SMALLER = {
    ("docs/python.md", 0): ("steps=50", "steps=2, batch=1, seq=128, device='numpy'"),
    ("docs/python.md", 3): ("load(", "load(device='numpy', model="),
    ("docs/generate.md", 0): ("load(", "load(device='numpy', model="),
}


def blocks(page: str, languages: tuple[str, ...]) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^( *)```(\w+)\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
    return [code for _, language, code in found if language in languages]


def commands(page: str) -> list[list[str]]:
    """The arguments of every `entrenar-gpu` of a page, variables filled in."""
    found = []
    for code in blocks(page, SHELL):
        names = dict(re.findall(r"^(\w+)=(\S+)$", code, re.MULTILINE)) | {"KEY": "key"}
        for line in code.splitlines():
            line = line.strip() if page == "README.md" and line.startswith("  sudo") else line
            if line.startswith("entrenar-gpu "):
                words = shlex.split(re.sub(r"\$(\w+)", lambda match, names=names: names[match[1]], line), comments=True)
                found.append(words[1 : words.index(">") if ">" in words else None])
            else:
                assert line.startswith(OTHERS), f"{page}: {line!r} is no command that this test knows"
    return found


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with the files that pages speak of, in which commands are typed, and the Hub's cache beside it."""
    import huggingface_hub.constants as hub

    folder = tmp_path_factory.mktemp("desk")
    for name, changes in MODELS.items():
        cached = folder / "hub" / f"models--{name.replace('/', '--')}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs/main").write_text("made")
        made = make_model(cached / "snapshots/made", **(SMALL | changes))
        names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": chat_templates.QWEN3}
        model_folder(made, names)
    os.symlink(made, folder / "M")
    (folder / "work").mkdir()
    rows = {
        "train": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "valid": {"prompt": "a", "completion": "b"},
        "harbour": {"prompt": "Which?", "completion": "That."},
        "questions": {"prompt": "a", "question": "a", "choices": ["b", "c"], "answer": 0},
        "book": {"text": "abc " * 200},
    }
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(hub, "HF_HUB_CACHE", str(folder / "hub"))
        patch.setattr(hub, "HF_HUB_OFFLINE", True)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield folder


def adapter(desk: Path, *names: str) -> None:
    """Adapters where pages have some."""
    made = desk / "made-adapter"
    if not made.exists():
        given = ["--model", "Qwen/Qwen3-4B", "--data", "train.jsonl", "--steps", "1", "--seq", "128", "--quiet"]
        assert cli.run(["train", *given, "--device", "numpy", "--output", str(made)]) == 0
    for name in names:
        if not (desk / name).exists():
            shutil.copytree(made, desk / name)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_of_the_pages_end_well(desk, monkeypatch, capfd, page):
    """As they stand there, but for the NumPy executor and shorter rows, and all but `serve`, which would not end."""
    if page != "README.md":
        adapter(desk, "run", "runs/a", "runs/law", "runs/code")
    for words in commands(page):
        options = {"train": ["--seq", "128"], "generate": ["--max-tokens", "2"]}
        has_device = words[0] in ("train", "eval", "generate", "chat", "serve")
        words = [*words, *options.get(words[0], []), *(["--device", "numpy"] if has_device else [])]
        if words[0] == "serve":
            monkeypatch.setattr("entrenar_gpu.cli.options.open_model", _stopped)
            with pytest.raises(SystemExit):
                cli.run(words)
            continue
        monkeypatch.setattr("sys.stdin", io.StringIO(""))
        assert cli.run(words) == 0, (words, capfd.readouterr().err)


def _stopped(*given, **named):
    raise SystemExit


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/api.md" and blocks(page, PYTHON)])
def test_python_of_the_pages_runs(desk, page):
    """The pieces of a page one after the other, as in a notebook; smaller, and without those that need more."""
    adapter(desk, "run", "runs/law", "runs/code")
    names: dict = {}
    for number, code in enumerate(blocks(page, PYTHON)):
        if (page, number) not in NOT_RUN:
            exec(BEFORE.get((page, number), ""), names)
            large, small = SMALLER.get((page, number), ("", ""))
            assert large in code
            exec(code.replace(large, small) if large else code, names)
    for value in names.values():
        if hasattr(value, "close") and not isinstance(value, type):
            value.close()
