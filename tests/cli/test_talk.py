"""generate and chat, as they are typed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from entrenar_gpu import cli
from entrenar_gpu.cli.chat import Chat
from entrenar_gpu.cli.demo import MODEL
from entrenar_gpu.config import SamplingOptions
from entrenar_gpu.infer import LanguageModel
from tests import ROOT
from tests.helpers.fake_decoder import FakeDecoder
from tests.helpers.word_tokenizer import END, text, word_tokenizer
from tests.infer.test_scheduler import alone

QUESTION = "What does os.path.exists(path) do?"
MODEL_FLAGS = ("--model", str(MODEL), "--device", "numpy")


def run(capsys: Any, command: str, *arguments: object, status: int = 0) -> str:
    assert cli.run([command, *MODEL_FLAGS, *map(str, arguments)]) == status
    captured = capsys.readouterr()
    return str(captured.out if status == 0 else captured.err)


def test_one_prompt_is_shown_as_it_comes_or_told_as_json(capsys):
    shown = run(capsys, "generate", "--prompt", QUESTION, "--max-tokens", 8)
    told = json.loads(run(capsys, "generate", "--prompt", QUESTION, "--max-tokens", 8, "--json", "--logprobs", 0))
    assert shown == told["text"] + "\n"
    assert told["finish_reason"] == "length"
    assert told["completion_tokens"] == len(told["logprobs"]) == 8


def test_a_file_of_prompts_gives_a_line_for_each_answer(capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": QUESTION, "id": 7}, {"messages": [{"role": "user", "content": "What does os.sep do?"}]}]
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    flags = ("--max-tokens", 6, "--temperature", 1, "--seed", 3)
    lines = [json.loads(line) for line in run(capsys, "generate", "--prompts", path, "--n", 2, *flags).splitlines()]
    assert [line.get("id") for line in lines] == [7, 7, None, None]
    assert lines[2]["messages"] == rows[1]["messages"]
    single = json.loads(run(capsys, "generate", "--prompt", QUESTION, "--json", *flags))
    assert lines[0]["text"] == single["text"] != lines[1]["text"]


def test_a_prompt_as_it_is_and_a_system_message_are_other_prompts(capsys):
    def tokens(*flags: str) -> int:
        told = run(capsys, "generate", "--prompt", QUESTION, "--max-tokens", 1, "--json", *flags)
        return int(json.loads(told)["prompt_tokens"])

    assert tokens("--no-chat") == tokens("--completions", "raw") < tokens() == tokens("--chat")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--prompt: give it, or --prompts"),
        (("--prompt", "a", "--prompts", "b"), "--prompt: give it, or --prompts"),
        (("--prompt", "", "--no-chat"), "--prompt: empty"),
        (("--prompts", "missing.jsonl"), "--prompts: missing.jsonl: cannot be read"),
        (("--prompt", "a", "--top-p", "2"), "--top-p: 2 is above 1"),
        (("--prompt", "a", "--logit-bias", "x"), "--logit-bias: 'x' is not a token id and a number"),
        (("--prompt", "a", "--logit-bias", "99999=1"), "--logit-bias: token 99999 is outside"),
        (("--prompt", "a", "--context", "100000"), "--context: 100000 exceeds"),
        (("--prompt", "word " * 600, "--no-chat"), "leave no room for an answer within --context 512"),
        (("--prompt", "a", "--no-chat", "--system", "b"), "--system: belongs to a chat"),
        (("--prompt", "a", "--adapter", "nowhere"), "nowhere"),
        (("--prompt", "a\udcff"), "--prompt: not UTF-8 text"),
    ],
)
def test_bad_flags_get_one_line(capsys, flags, message):
    said = run(capsys, "generate", *flags, status=2).splitlines()
    assert message in said[-1]


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": 3}', '{"messages": []}'])
def test_a_bad_row_is_named(capsys, tmp_path, line):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n")
    assert f"{path}:2" in run(capsys, "generate", "--prompts", path, status=2)


# --- chat


@pytest.fixture
def chat(tmp_path) -> Chat:
    decoder = FakeDecoder(slots=1, context=64, vocabulary=32)
    return Chat(LanguageModel(decoder, word_tokenizer(tmp_path), 32), {"max_tokens": 5, "logit_bias": {END: -100}})


def said(ids: list[int]) -> str:
    return text(alone(ids, SamplingOptions(max_tokens=5, logit_bias={END: -100}))[0])


def test_a_conversation_goes_on_and_is_kept(chat, tmp_path, capsys):
    assert chat.take("w7")
    first = said([2, 7, END, 3])
    assert capsys.readouterr().out == first + "\n"
    chat.take("w8")
    answered = [int(word[1:]) for word in first.split()]
    assert chat.messages[-1]["content"] == said([2, 7, END, 3, *answered, END, 2, 8, END, 3])
    path = tmp_path / "saved.jsonl"
    chat.take(f"/save {path}")
    assert json.loads(path.read_text()) == {"messages": chat.messages}
    chat.take("/system w9")
    assert chat.messages == [{"role": "system", "content": "w9"}]
    chat.take("w7")
    assert chat.messages[-1]["content"] == said([1, 9, END, 2, 7, END, 3])
    chat.take("/reset")
    assert chat.messages == [{"role": "system", "content": "w9"}]
    chat.take("/system")
    assert chat.messages == []
    assert chat.take("")
    assert not chat.take("/quit")
    chat.take("/nothing")
    assert "/nothing: not known" in capsys.readouterr().err


def test_what_has_no_room_is_told_and_taken_back(chat, capsys):
    chat.take("w7 " * 80)
    assert "leave no room for an answer within context 64; /reset" in capsys.readouterr().err
    assert chat.messages == []
    chat.take("w7")
    assert len(chat.messages) == 2


def test_control_c_stops_the_answer_and_not_the_program(chat, capsys):
    def interrupted(batch: Any, all_logits: bool = False, prompt: bool | None = None) -> Any:
        if len(chat._model.decoder.calls) == 2:
            chat._interrupt(signal.SIGINT, None)
        return FakeDecoder.extend(chat._model.decoder, batch, all_logits, prompt)

    chat._model.decoder.extend = interrupted
    chat.take("w7")
    assert "(stopped)" in capsys.readouterr().err
    assert 0 < len(chat.messages[-1]["content"].split()) < 5
    with pytest.raises(KeyboardInterrupt):
        chat._interrupt(signal.SIGINT, None)
    assert chat._model.scheduler.slots.free == 1


def test_a_real_interrupt_and_the_end_of_the_input(tmp_path):
    command = [sys.executable, "-m", "entrenar_gpu.cli", "chat", *MODEL_FLAGS, "--max-tokens", "200"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdin is not None
        process.stdin.write("/foo\n")
        process.stdin.flush()
        assert process.stderr is not None
        while "/foo" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)  # at the prompt
        time.sleep(0.2)
        out, err = process.communicate("What does os.sep do?\n", timeout=60)
    assert process.returncode == 0, err
    assert out.strip()
    assert Path(MODEL).is_dir()
