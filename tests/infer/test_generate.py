"""Text from a model: the next token, how it is drawn, and where it stops."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from entrenar_gpu.adapters.peft_files import save_adapter
from entrenar_gpu.adapters.spec import AdapterSpec
from entrenar_gpu.cli.demo import MODEL
from entrenar_gpu.config.train_config import TrainConfig
from entrenar_gpu.data.tokenizer import Tokenizer
from entrenar_gpu.errors import UserError
from entrenar_gpu.infer.generate import Generator, _draw, next_logits
from entrenar_gpu.model.registry import load_model_config
from tests.helpers.runs import config_of, train
from tests.helpers.tiny import make_model

TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 32, "num_hidden_layers": 1}
WORDS = [f"w{i}" for i in range(30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model whose tokens are words w0 ... w29, and which has learnt to count up to w29 and end there."""
    path = tmp_path_factory.mktemp("generate")
    make_model(path / "model", **TINY)
    vocabulary = {word: i for i, word in enumerate(["<end>", "<unknown>", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unknown>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(path / "model/tokenizer.json"))
    (path / "model/tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    lines = [{"text": " ".join(WORDS[start:])} for start in range(0, 28, 3)]
    (path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train(path, device="numpy", method="full", steps=60, lr=1e-2, seq=40)
    return path


def generator(folder: Path, kernels: Any = None, model: str = "run", **options: Any) -> Generator:
    config = config_of(
        folder, **({"model": str(folder / model), "device": "numpy", "seq": 24, "method": "lora"} | options)
    )
    return Generator(config, config.adapter_init is not None, kernels)


def test_it_goes_on_as_it_learnt_and_ends_there(folder):
    counting = generator(folder)
    assert counting.text("w4 w5 w6", 5) == "w7 w8 w9 w10 w11"
    assert counting.text("w22 w23", 20) == "w24 w25 w26 w27 w28 w29"
    assert list(counting.pieces("w4 w5 w6", 3)) == ["w7", " w8", " w9"]


def test_temperature_draws_and_the_seed_repeats_it(folder):
    hot = generator(folder)
    texts = {seed: hot.text("w1", 12, temperature=3.0, seed=seed) for seed in range(3)}
    assert len(set(texts.values())) == 3
    assert hot.text("w1", 12, temperature=3.0, seed=1) == texts[1]
    assert hot.text("w4 w5 w6", 5, temperature=1e-3) == "w7 w8 w9 w10 w11"  # cold enough to be certain


def test_the_draw_follows_the_probabilities(folder):
    """Frequencies of 4,000 draws within four standard errors."""
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    rng = np.random.default_rng(0)
    counts = np.bincount([_draw(logits, 2.0, rng) for _ in range(4000)], minlength=3)
    wanted = np.sqrt([0.5, 0.3, 0.2]) / np.sqrt([0.5, 0.3, 0.2]).sum()
    assert np.abs(counts / 4000 - wanted).max() < 4 * np.sqrt(0.25 / 4000)


@pytest.mark.gpu
def test_logits_are_those_of_numpy_and_blind_to_padding(folder, kernels):
    ids = [5, 6, 7, 9]
    want = next_logits(generator(folder, method="qlora").session, ids)
    for seq in (8, 24):
        ours = generator(folder, kernels, method="qlora", seq=seq)
        np.testing.assert_allclose(next_logits(ours.session, ids), want, rtol=0, atol=1e-5 * np.abs(want).max())
        ours.close()


def test_the_adapter_is_heard(folder, tmp_path):
    model = load_model_config(folder / "run")
    spec = AdapterSpec.from_config(TrainConfig(rank=2, target="down"), model)
    rng = np.random.default_rng(0)
    save_adapter(tmp_path, spec, {n: rng.standard_normal(s, np.float32) for n, s in spec.shapes().items()}, "x")
    plain, adapted = generator(folder), generator(folder, adapter_init=str(tmp_path))
    logits = [next_logits(g.session, [5, 6, 7]) for g in (plain, adapted)]
    assert np.abs(logits[0] - logits[1]).max() > 0.1


def test_prompts_go_through_the_chat_template(folder):
    templated = generator(folder)
    template = "{% for m in messages %}w1 {{ m.content }} w2{% endfor %}{% if add_generation_prompt %} w3{% endif %}"
    path = folder / "run/chat_template.jinja"
    path.write_text(template)
    try:
        chat = generator(folder)
    finally:
        path.unlink()
    ids = templated.encode("w1 w9 w2 w3")
    assert chat.encode("w9") == ids
    assert all(type(i) is int for i in ids)
    assert [b - a for a, b in pairwise(ids)] == [8, -7, 1]
    chat.config = replace(chat.config, completions="raw")
    assert chat.encode("w9") == templated.encode("w9")


def test_prompts_that_leave_no_room_or_nothing_are_refused(folder):
    short = generator(folder, seq=8)
    with pytest.raises(UserError, match="--prompt: 3 tokens and --max-tokens 6 exceed --seq 8"):
        short.text("w1 w2 w3", 6)
    assert short.text("w1 w2 w3", 5)
    with pytest.raises(UserError, match="--prompt: empty"):
        short.text("", 5)


# --- what ends it, and what is shown of it


class Spoken(Generator):
    """A generator that says given tokens, whatever the model thinks."""

    def __init__(self, tokenizer, said):
        self.tokenizer, self.said = tokenizer, said

    def encode(self, prompt):
        return [0]

    def tokens(self, prompt, max_tokens, temperature, seed):
        for token in self.said[:max_tokens]:
            if token in self.tokenizer.eos_ids:
                return
            yield token


def demo_tokens(text: str) -> list[int]:
    return Tokenizer.load(MODEL).encode(text, add_special_tokens=False)


@pytest.mark.parametrize("text", ["naïve 中文 😀 end", "\ufffd real", "😀"])
def test_what_is_streamed_is_what_is_returned_wherever_it_is_cut(text):
    tokenizer = Tokenizer.load(MODEL)
    ids = demo_tokens(text)
    for most in range(1, len(ids) + 1):
        spoken = Spoken(tokenizer, ids)
        pieces = list(spoken.pieces("", most))
        assert "".join(pieces) == spoken.text("", most) == tokenizer.decode(ids[:most])
        assert all(pieces)
        assert all(not piece.endswith("\ufffd") for piece in pieces[:-1]) or "\ufffd" in text


def test_words_that_close_a_turn_end_it_and_are_not_shown():
    tokenizer = Tokenizer.load(MODEL)
    tokenizer.stop_texts = ("### End",)
    spoken = Spoken(tokenizer, demo_tokens("It is ### or ### Endless"))
    assert spoken.text("", 100) == "It is ### or "
    assert Spoken(tokenizer, demo_tokens("It is ## E")).text("", 100) == "It is ## E"


def test_what_closes_a_turn_in_the_template_stops_a_base_model(folder):
    """eos_token ends documents; the model counts on to w29 and the template closes turns with w26."""
    path = folder / "closing"
    shutil.copytree(folder / "run", path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m.content }} w26 {% endfor %}"
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    counting = generator(folder, model="closing", completions="raw")
    assert counting.text("w22 w23", 20) == "w24 w25"


def test_a_token_beyond_the_embedding_is_named(folder):
    path = folder / "beyond"
    shutil.copytree(folder / "run", path)
    backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    backend.add_special_tokens(["<new>"])
    backend.save(str(path / "tokenizer.json"))
    beyond = generator(folder, model="beyond")
    with pytest.raises(UserError, match=r"--prompt: token id 32 \('<new>'\) is outside the model's vocabulary of 32"):
        beyond.text("w1 <new>", 5)
