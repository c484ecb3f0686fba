"""Long texts and long lines: the tokens of their beginning, in bounded memory."""

import json
import tracemalloc

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from entrenar_gpu.cli.demo import MODEL
from entrenar_gpu.data import lines
from entrenar_gpu.data.load import load_samples
from entrenar_gpu.data.prefix import PrefixEncoder
from entrenar_gpu.data.rows import JsonFile
from entrenar_gpu.data.tokenizer import Tokenizer
from entrenar_gpu.errors import UserError

WORDS = [
    "the",
    "cat",
    "sat",
    "mat,",
    "12345",
    "dogs\n\n",
    "",
    "",
    "running",
    "éàü",
    "中文字符",
    "<|im_end|>",
    "aaaaaaa",
]


@pytest.fixture(scope="module")
def backends() -> dict[str, tokenizers.Tokenizer]:
    """Byte-level BPE as shipped, and two without any split into words: BPE and Unigram over whole texts."""
    found = {"bytes": Tokenizer.load(MODEL).backend}
    corpus = [" ".join(WORDS)] * 20 + ["aaaa bbbb aaaaaa bbb aa"] * 5
    options = {"special_tokens": ["?"], "show_progress": False}
    for name, model, trainer in (
        ("bpe", models.BPE(unk_token="?"), trainers.BpeTrainer(vocab_size=200, **options)),
        ("unigram", models.Unigram(), trainers.UnigramTrainer(vocab_size=120, unk_token="?", **options)),
    ):
        backend = tokenizers.Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
        backend.train_from_iterator(corpus, trainer)
        found[name] = backend
    return found


@pytest.mark.parametrize("name", ["bytes", "bpe", "unigram"])
@given(
    st.lists(st.sampled_from([*WORDS, "a", " ", "\n", "b" * 50, "aaa"]), min_size=1, max_size=30), st.integers(1, 40)
)
@settings(deadline=None, max_examples=40)
def test_the_first_tokens_are_those_of_the_whole(backends, name, words, limit):
    text = " ".join(words) * 60
    backend = backends[name]
    whole = backend.encode(text, add_special_tokens=False)
    places = [(0, 1), (3, 20), (len(text) // 300, len(text) // 100), (7, len(text)), (5, 6)]
    ((ids, spans),) = PrefixEncoder(backend).encode([text], limit, [places])
    assert list(ids[:limit]) == whole.ids[:limit]
    found, wanted = np.zeros(limit, bool), np.zeros(limit, bool)
    for start, end in places:
        wanted |= [begin < end and stop > start for begin, stop in whole.offsets[:limit]] + [False] * (
            limit - len(whole)
        )
    for first, last in spans:
        found[first:last] = True
    assert found.tolist() == wanted.tolist()
    assert (len(ids) > limit) == (len(whole.ids) > limit)


def test_of_a_long_text_no_more_is_tokenised_than_its_beginning(backends):
    seen = []

    class Counting:
        def __getattr__(self, name):
            return getattr(backends["bytes"], name)

        def encode_batch_fast(self, texts, add_special_tokens):
            seen.extend(map(len, texts))
            return backends["bytes"].encode_batch_fast(texts, add_special_tokens=add_special_tokens)

    PrefixEncoder(Counting()).encode(["the cat sat on a mat. " * 100_000], 128)
    assert sum(seen) < 20_000


def test_samples_of_long_texts_are_those_of_their_beginning(tmp_path):
    tokenizer = Tokenizer.load(MODEL)
    texts = ["the cat sat on the mat. " * n for n in (1, 10, 100, 1000)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    samples = load_samples(path, tokenizer, vocab_size=tokenizer.vocab_size, seq=48)
    assert samples.cut == 3
    for i, text in enumerate(texts):
        whole = [*tokenizer.backend.encode(text).ids, tokenizer.eos_id]
        assert samples[i][0].tolist() == whole[:48]


# --- lines


@pytest.fixture
def short_lines(monkeypatch):
    monkeypatch.setattr(lines, "LONG_LINE", 64)
    monkeypatch.setattr(lines, "KEPT_OF_TEXT", 40)
    monkeypatch.setattr(lines, "_PIECE", 7)


LONG_TEXTS = {
    "plain": "a b c " * 100,
    "quotes": '"' * 300,
    "backslashes": "\\" * 300,
    "both": '\\"' * 150,
    "backslashes after one letter": "x" + "\\" * 299,
    "two bytes": "é" * 300,
    "four bytes": "😀" * 300,
    "short": "abc",
}


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("text", LONG_TEXTS.values(), ids=LONG_TEXTS)
@pytest.mark.parametrize("pad", range(8))
def test_a_shortened_line_holds_the_beginning_of_each_text(tmp_path, short_lines, text, ascii_only, pad):
    record = {"pad" * pad: 1, "a\\": "x", "text": text, "more": ["y", text, {"z": None}], "end": pad}
    whole = json.dumps(record, ensure_ascii=ascii_only)
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "before"}\n' + whole + '\n\n{"text": "after"}', encoding="utf-8")
    before, line, after = JsonFile(path)
    assert [before.content, after.content, after.number] == [b'{"text": "before"}\n', b'{"text": "after"}', 4]
    found = json.loads(line.content)
    assert line.shortened == (text != "abc")
    assert len(line.content) < 64 + 2 * 40 + 60
    for there, was in ((found.pop("text"), record.pop("text")), (found["more"].pop(1), record["more"].pop(1))):
        assert was.startswith(there)
        assert len(there.encode()) > 0
        assert there == was or len(json.dumps(there, ensure_ascii=ascii_only).encode()) > 40 - 26
    assert found == record


def test_a_line_of_a_hundred_megabytes_takes_a_few(tmp_path):
    tokenizer = Tokenizer.load(MODEL)
    path = tmp_path / "data.jsonl"
    sentence = "the cat sat on the mat. "
    with open(path, "w") as stream:
        stream.write('{"text": "' + sentence * (24 << 20 >> 4) + '"}\n{"prompt": "a", "completion": "b"}\n')
    assert path.stat().st_size > 36 << 20
    tracemalloc.start()
    samples = load_samples(path, tokenizer, vocab_size=tokenizer.vocab_size, seq=64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 36 << 20
    assert samples[0][0].tolist() == tokenizer.backend.encode(sentence * 40).ids[:64]
    assert len(samples) == 2


def test_a_line_of_which_too_little_is_text_is_refused(tmp_path, short_lines, monkeypatch):
    monkeypatch.setattr(lines, "MOST_OF_LINE", 200)
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"input_ids": list(range(300))}))
    with pytest.raises(UserError, match=r"data\.jsonl:1: more than 0 MiB in one line"):
        load_samples(path, None, vocab_size=300, seq=64)


def test_a_shortened_text_that_does_not_fill_a_row_is_refused(tmp_path, short_lines):
    tokenizer = Tokenizer.load(MODEL)
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": " " * 3000}))
    with pytest.raises(UserError, match=r"data\.jsonl:1: the line is too long"):
        load_samples(path, tokenizer, vocab_size=tokenizer.vocab_size, seq=64)


def test_samples_share_the_memory_they_were_gathered_in():
    from entrenar_gpu.data.samples import SampleBuilder

    builder = SampleBuilder(8)
    builder.add([1, 2, 3], [1, 2, 3])
    samples = builder.samples()
    assert np.shares_memory(samples.tokens, np.frombuffer(builder.tokens, np.uint32))
