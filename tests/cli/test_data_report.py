"""`entrenar-gpu data`: what is shown is what is trained, and --check fails on what looks wrong."""

import json

import pytest

from entrenar_gpu import cli
from tests.data.test_chat import assistant, model_folder, user
from tests.helpers import chat_templates
from tests.helpers.tiny import QWEN3

CONFIG = QWEN3 | {"eos_token_id": None}


@pytest.fixture
def folder(tmp_path):
    tokens = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": chat_templates.QWEN25}
    model_folder(tmp_path / "model", tokens, bos=True, config=CONFIG)
    return tmp_path


def report(capsys, folder, rows, *options, status=0):
    """(standard output, standard error) of the command on these rows."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["data", str(folder / "rows.jsonl"), "--model", str(folder / "model"), *options]
    assert cli.run(command) == status
    return tuple(capsys.readouterr())


def test_trained_tokens_are_marked_and_nothing_steers_the_terminal(folder, capsys):
    rows = [{"messages": [user("a\x1b[2J"), assistant("b")]}, {"text": "c d"}, {"input_ids": [1]}]
    out, err = report(capsys, folder, rows, "--check")
    assert "assistant\n⟦b<|im_end|>⟧" in out
    assert "<s>⟦c d<|im_end|>⟧" in out
    assert "\x1b" not in out
    assert "a\\x1b[2J" in out
    assert "2 samples, " in out
    assert "1 skipped without a token to train" in out
    assert err == ""


def test_counts_as_json(folder, capsys):
    rows = [{"input_ids": [5] * n} for n in (2, 3, 10, 20)]
    found = json.loads(report(capsys, folder, rows, "--seq", "16", "--json")[0])
    assert (found["samples"], found["tokens"], found["trained_tokens"], found["cut"]) == (4, 31, 27, 1)
    assert found["rows"] == 2
    assert found["packed"] == 31 / 32
    assert found["unpacked"] == 31 / 64
    assert sum(count for _, _, count in found["lengths"]) == 4
    assert found["lengths"][0][:2] == [1, 1]
    assert found["lengths"][-1][1] == 16


WRONG = {
    "no end": (
        [{"input_ids": [5, 6, 7]}] * 2 + [{"text": "a"}],
        "2 of 3 samples that are not cut train no end of turn",
    ),
    "two beginnings": ([{"input_ids": [257, 257, 5, 259]}, {"text": "a"}], "1 samples begin with two BOS tokens"),
    "prompts alone": (
        [{"prompt": "x" * 300, "completion": "b"}, {"text": "a"}],
        "1 of 2 samples are cut before anything that is trained",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_check_fails_on_what_looks_wrong(folder, capsys, name):
    rows, problem = WRONG[name]
    specials = {t: i for i, t in enumerate(chat_templates.SPECIAL_TOKENS, 257)}
    rows = [
        {"input_ids": [{257: specials["<s>"], 259: specials["<|im_end|>"]}.get(i, i) for i in row["input_ids"]]}
        if "input_ids" in row
        else row
        for row in rows
    ]
    _, err = report(capsys, folder, rows, "--seq", "64", "--check", status=1)
    assert err == f"wrong: {err.removeprefix('wrong: ').rstrip()}\n"
    assert problem in err
    report(capsys, folder, rows, "--seq", "64", status=0)


def test_nothing_but_prompts_is_said(folder, capsys):
    _, err = report(capsys, folder, [{"prompt": "x" * 300, "completion": "b"}], "--seq", "64", status=2)
    assert "holds no token to train (1 samples without any, 1 of them cut before it; raise --seq)" in err
