"""A model to talk to: what it continues, chats, streams and scores, from files to text."""

from __future__ import annotations

import json
import shutil
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from entrenar_gpu import load
from entrenar_gpu.config import SamplingOptions
from entrenar_gpu.errors import UserError
from entrenar_gpu.infer import LanguageModel
from entrenar_gpu.infer.sampling import log_softmax
from tests.helpers.fake_decoder import FakeDecoder
from tests.helpers.runs import train
from tests.helpers.tiny import make_model
from tests.helpers.word_tokenizer import END, text, word_tokenizer
from tests.infer.test_scheduler import alone

TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 32, "num_hidden_layers": 1}
WORDS = [f"w{i}" for i in range(30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model whose tokens are words w0 ... w29, and which has learnt to count up to w29 and end there; and an adapter
    that has learnt to count down."""
    path = tmp_path_factory.mktemp("generate")
    make_model(path / "model", **TINY)
    vocabulary = {word: i for i, word in enumerate(["<end>", "<unknown>", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unknown>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(path / "model/tokenizer.json"))
    (path / "model/tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    write_texts(path, [WORDS[start:] for start in range(0, 28, 3)])
    train(path, "up", device="numpy", method="full", steps=60, lr=1e-2, seq=40)
    write_texts(path, [WORDS[start::-1] for start in range(2, 30, 3)])
    train(path, "down", device="numpy", method="lora", model=str(path / "up"), steps=60, lr=1e-2, seq=40)
    return path


def write_texts(path: Path, texts: list[list[str]]) -> None:
    lines = [json.dumps({"text": " ".join(words)}) + "\n" for words in texts]
    (path / "train.jsonl").write_text("".join(lines))


@pytest.fixture(scope="module")
def counting(folder):
    with load(str(folder / "up"), adapters={"down": folder / "down"}, context=48, slots=2, device="numpy") as model:
        yield model


@pytest.fixture
def model(tmp_path) -> LanguageModel:
    """A decoder of known logits."""
    return LanguageModel(FakeDecoder(slots=2, vocabulary=32, adapters=["a"]), word_tokenizer(tmp_path), 32, ["a"])


def test_it_goes_on_as_it_learnt_and_ends_there(counting):
    assert counting.generate("w4 w5 w6", max_tokens=5) == "w7 w8 w9 w10 w11"
    assert counting.generate("w22 w23", max_tokens=20) == "w24 w25 w26 w27 w28 w29"
    assert list(counting.stream("w4 w5 w6", max_tokens=3)) == ["w7", " w8", " w9"]
    batch = counting.generate(["w2 w3", "w9 w10 w11", "w22 w23"], max_tokens=3)
    assert batch == ["w4 w5 w6", "w12 w13 w14", "w24 w25 w26"]


def test_lists_give_lists_and_n_lists_of_answers(model):
    alone_text = text(alone([2, 7, END, 3], SamplingOptions(max_tokens=4))[0])
    question = [{"role": "user", "content": "w7"}]
    assert model.chat("w7", max_tokens=4) == model.chat(question, max_tokens=4) == alone_text
    assert model.chat(["w7", question], max_tokens=4) == [alone_text, alone_text]
    drawn = {"max_tokens": 4, "temperature": 1.0, "seed": 2}
    both = model.generate("w4 w5", n=2, **drawn)
    assert both == [text(alone([4, 5], SamplingOptions(**drawn), stream=i)[0]) for i in (0, 1)]
    assert model.generate(["w9", "w4 w5"], n=2, **drawn)[1] == both


def test_an_adapter_is_switched_and_the_base_stays(counting):
    assert counting.adapter is None
    counting.adapter = "down"
    assert counting.generate("w20 w19", max_tokens=3) == "w18 w17 w16"
    counting.adapter = None
    assert counting.generate("w20 w21", max_tokens=3) == "w22 w23 w24"
    with pytest.raises(UserError, match="adapter 'up': not loaded; there is down"):
        counting.adapter = "up"


def test_temperature_draws_and_the_seed_repeats_it(counting):
    texts = {seed: counting.generate("w1", max_tokens=12, temperature=3.0, seed=seed) for seed in range(3)}
    assert len(set(texts.values())) == 3
    assert counting.generate("w1", max_tokens=12, temperature=3.0, seed=1) == texts[1]
    assert counting.generate("w4 w5 w6", max_tokens=5, temperature=1e-3) == "w7 w8 w9 w10 w11"


@pytest.mark.gpu
def test_a_gpu_says_what_numpy_says(folder, kernels, counting):
    with load(str(folder / "up"), str(folder / "down"), context=48, slots=2, kernels=kernels) as gpu:
        counting.adapter = "down"
        want = counting.logits([5, 6, 7, 9])
        counting.adapter = None
        np.testing.assert_allclose(gpu.logits([5, 6, 7, 9]), want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_conversations_go_through_the_chat_template(folder):
    path = folder / "templated"
    shutil.copytree(folder / "up", path)
    template = "{% for m in messages %}w1 {{ m.content }} w2{% endfor %}{% if add_generation_prompt %} w3{% endif %}"
    (path / "chat_template.jinja").write_text(template)
    with load(str(path), device="numpy", context=16) as chat:
        ids = chat.encode_chat("w9")
        assert ids == chat.encode("w1 w9 w2 w3") == chat.encode_chat([{"role": "user", "content": "w9"}])
        assert all(type(i) is int for i in ids)
        assert [b - a for a, b in pairwise(ids)] == [8, -7, 1]
        assert chat.chat("w9", max_tokens=4) == chat.generate("w1 w9 w2 w3", max_tokens=4)
        assert "".join(chat.stream("w9", chat=True, max_tokens=4)) == chat.chat("w9", max_tokens=4)


def test_what_closes_a_turn_in_the_template_stops_a_base_model(folder):
    """eos_token ends documents; the model counts on to w29 and the template closes turns with w26."""
    path = folder / "closing"
    shutil.copytree(folder / "up", path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m.content }} w26 {% endfor %}"
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    with load(str(path), device="numpy", context=40) as closing:
        assert closing.generate("w22 w23", max_tokens=20) == "w24 w25"


def test_a_token_beyond_the_embedding_is_named(folder):
    path = folder / "beyond"
    shutil.copytree(folder / "up", path)
    backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    backend.add_special_tokens(["<new>"])
    backend.save(str(path / "tokenizer.json"))
    with load(str(path), device="numpy", context=16) as beyond:
        with pytest.raises(UserError, match=r"token id 32 \('<new>'\) is outside the model's vocabulary of 32"):
            beyond.generate("w1 <new>", max_tokens=5)
        with pytest.raises(UserError, match="token id 99"):
            beyond.logits([1, 99])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"context": 513}, "context: 513 exceeds the model's 512 positions"),
        ({"context": 1}, "context: 1 is below 2"),
        ({"adapter": "missing"}, "missing"),
        ({"devise": "numpy"}, "unknown key 'devise'; did you mean 'device'"),
    ],
)
def test_what_cannot_be_loaded_is_told(folder, given, message):
    with pytest.raises(UserError, match=message):
        load(str(folder / "up"), **{"device": "numpy", **given})


# --- over known logits


def test_a_score_is_the_sum_of_the_tokens_log_probabilities(model):
    ids, said = [4, 5, 6], [7, 8, 9]
    rows = [model.decoder.logits([(i, None) for i in (ids + said)[:n]]) for n in range(3, 6)]
    want = sum(float(log_softmax(row)[token]) for row, token in zip(rows, said, strict=True))
    score = model.score("w4 w5 w6", " w7 w8 w9")
    assert score.logprob == pytest.approx(want)
    assert (score.tokens, score.greedy) == (3, False)
    likely = alone(ids, SamplingOptions(max_tokens=4))[0]
    assert model.score("w4 w5 w6 ", text(likely)).greedy
    assert model.score_ids([4], [[]])[0].logprob == 0
    assert model.encode_pair("", "w4 w5") == ([END], [4, 5])


def test_logits_are_those_after_each_token_whatever_was_in_the_cache(model):
    ids = list(range(1, 21))
    want = np.stack([model.decoder.logits([(i, None) for i in ids[: n + 1]]) for n in range(20)])
    for _ in range(2):
        np.testing.assert_array_equal(model.logits(ids), want)
    model.adapter = "a"
    assert not np.array_equal(model.logits(ids), want)
    model.adapter = None
    other = model.score_ids(ids[:18], [[3, 4]])
    assert other == LanguageModel(FakeDecoder(vocabulary=32), model.tokenizer, 32).score_ids(ids[:18], [[3, 4]])


def test_choices_share_the_prefill_of_their_question_and_go_together(model):
    question, choices = list(range(1, 31)), [[5], [6, 7], [8, 9, 10]]
    scores = model.score_ids(question, choices)
    calls = [dict(call) for call in model.decoder.calls]
    assert [sorted(call.values()) for call in calls] == [[29], [1, 2], [3]]  # two slots
    apart = [
        LanguageModel(FakeDecoder(vocabulary=32), model.tokenizer, 32).score_ids(question, [c])[0] for c in choices
    ]
    assert scores == apart


def test_a_stream_that_nobody_listens_to_frees_its_slot(model):
    stream = model.stream("w4 w5", max_tokens=40, logit_bias={END: -100})
    assert next(stream)
    assert model.scheduler.slots.free == 1
    assert model.generate("w4 w5", max_tokens=3) == text(alone([4, 5], SamplingOptions(max_tokens=3))[0])
    stream.close()
    assert model.scheduler.slots.free == 2
    stopped = threading.Event()
    deltas = model.deltas(model.request([4, 5], SamplingOptions(max_tokens=40, logit_bias={END: -100})), stopped)
    next(deltas)
    stopped.set()
    assert len(list(deltas)) <= 1
    assert model.scheduler.slots.free == 2


def test_open_streams_do_not_hold_up_a_score_for_ever(model):
    streams = [model.stream(f"w{i}", max_tokens=30) for i in (4, 5)]
    want = [next(stream) for stream in streams]
    assert model.score("w4 w5 w6", " w7").tokens == 1
    texts = [first + "".join(stream) for first, stream in zip(want, streams, strict=True)]
    assert texts == [text(alone([i], SamplingOptions(max_tokens=30))[0]) for i in (4, 5)]


def test_many_requests_come_back_in_order_and_few_run_ahead(model):
    drawn: list[int] = []

    def requests() -> Any:
        for i in range(1, 25):
            drawn.append(i)
            yield model.request([i], SamplingOptions(max_tokens=5))

    for number, (completion,) in enumerate(model.answer(requests()), 1):
        assert completion.text == text(alone([number], SamplingOptions(max_tokens=5))[0])
        assert len(drawn) <= number + 2 * model.decoder.slots
    assert drawn == list(range(1, 25))


def test_threads_share_a_model(model):
    found: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: model.generate(f"w{i}", max_tokens=20)}))
        for i in range(1, 9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == {i: text(alone([i], SamplingOptions(max_tokens=20))[0]) for i in range(1, 9)}


def test_an_option_that_is_none_is_told(model):
    with pytest.raises(UserError, match="unknown key 'tempreature'; did you mean 'temperature'"):
        model.generate("w4", tempreature=1)
    with pytest.raises(UserError, match="temperature: -1 is below 0"):
        model.generate("w4", temperature=-1)
    with pytest.raises(UserError, match="not UTF-8"):
        model.generate("\ud800")


WRONG = {
    "no text": (lambda m: m.generate(None), r"^prompt: expected text, not a NoneType$"),
    "bytes": (lambda m: m.generate(b"w1"), r"^prompt: expected text, not a int$"),
    "another's option": (lambda m: m.generate("w1", max_new_tokens=3), r"unknown key 'max_new_tokens'; did you mean"),
    "no number": (lambda m: m.generate("w1", n="2"), r"^n: '2' is not a whole number$"),
    "no answer": (lambda m: m.chat("w1", n=0), r"^n: 0 is below 1$"),
    "one message": (lambda m: m.chat({"role": "user", "content": "w1"}), r"^messages must be a list of messages, not"),
    "nobody's message": (lambda m: m.chat([{"content": "w1"}]), r"^messages: message 1 must be an object with a role"),
    "a picture": (lambda m: m.chat([{"role": "user", "content": [{"type": "image"}]}]), r"part of type 'image'; only"),
    "nothing said": (lambda m: m.chat([{"role": "user", "content": None}]), r"must have a content that is text, not n"),
    "a list to score": (lambda m: m.score("w1", ["w2"]), r"^completion: expected text, not a list$"),
    "a text as ids": (lambda m: m.logits("w1"), r"^ids: expected a sequence of token ids"),
    "a table of ids": (lambda m: m.logits(np.ones((2, 2), int)), r"^ids: expected a sequence of token ids"),
    "ids not in a list": (lambda m: m.complete([3, 4]), r"^prompt: expected a sequence of token ids"),
    "half an id": (lambda m: m.score_ids([1.5], [[2]]), r"^prompt: expected a sequence of token ids"),
    "beyond the context": (lambda m: m.logits([3] * 1000), r"^context: 1000 tokens exceed"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_named(model, case):
    ask, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        ask(model)


def test_arguments_are_taken_as_python_has_them(model):
    turn = {"role": "user", "content": [{"type": "text", "text": "w7"}], "tool_calls": None}
    assert model.chat((turn,), max_tokens=4) == model.chat("w7", max_tokens=np.int64(4))
    assert (model.logits(np.array([2, 7])) == model.logits([2, 7])).all()
    model.adapter = Path("a")
    assert model.adapter == "a"


def test_a_model_that_is_closed_says_so(model):
    model.close()
    for ask in (lambda: model.generate("w1"), lambda: model.score("w1", "w2"), lambda: list(model.stream("w1"))):
        with pytest.raises(UserError, match="this model is closed; load it again"):
            ask()
