"""The demo's corpus: what becomes a pair, what is held out, and the tokenizer trained on the rest."""

import json
from pathlib import Path

import pytest

from entrenar_gpu.cli import docstrings
from entrenar_gpu.data.load import load_samples
from entrenar_gpu.data.tokenizer import Tokenizer
from entrenar_gpu.errors import UserError

LONG = "This sentence says what the thing does. " * 9

SOURCES = {
    "alpha.py": '''"""Alpha is the first module."""
raise RuntimeError("parsed, not run")
def visible(a, /, b, *rest, key=None, **more):
    """Return what is
    visible.

    A second paragraph says more.

    >>> visible(1)
    """
def named(*, key):
    """Return what a name stands for."""
def _hidden():
    """Nobody asks about this one."""
def bare(): pass
def short():
    """Too short."""
class Thing:
    """A thing that has methods.

    Return what is visible.
    """
    def method(self, x):
        """Do the thing to x at once."""
    async def later(cls):
        """Do the thing some other time."""
    def copied(self):
        """return what is visible"""
''',
    "pkg/__init__.py": f'''"""What a package is good for."""
def long():
    """{LONG}"""
def longest():
    """{LONG.replace(". ", " ")}"""
def signed(a):
    """signed(a) -> int

    Return the sign of a number."""
def example():
    """Called like this.
    >>> example()"""
def leading():
    """This is how it is used:

    >>> leading()"""
''',
    "_pydelta.py": '''def twin():\n    """Written again in Python."""\n''',
    "_private.py": '''def secret():\n    """Nobody asks about this either."""\n''',
    "test/test_alpha.py": '''def test():\n    """A test is not the library."""\n''',
    "broken.py": '''"""A file that does not parse.""" def''',
}  # fmt: skip


@pytest.fixture
def library(tmp_path) -> Path:
    for name, source in SOURCES.items():
        path = tmp_path / "library" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return tmp_path / "library"


def all_pairs(found: docstrings.Corpus) -> dict[str, str]:
    return {pair.prompt: pair.completion for pair in (*found.train, *found.valid)}


def test_what_becomes_a_pair(library):
    assert all_pairs(docstrings.collect(library, held_out_every=2)) == {
        "What is the module alpha for?": "Alpha is the first module.",
        "What does alpha.visible(a, b, *rest, key, **more) do?": "Return what is visible.",
        "What does alpha.named(*, key) do?": "Return what a name stands for.",
        "What is alpha.Thing?": "A thing that has methods.",
        "What does alpha.Thing.method(x) do?": "Do the thing to x at once.",
        "What does alpha.Thing.later() do?": "Do the thing some other time.",
        "What is the module pkg for?": "What a package is good for.",
        "What does pkg.long() do?": (LONG[:40] * 7).strip(),
        "What does pkg.signed(a) do?": "Return the sign of a number.",
        "What does delta.twin() do?": "Written again in Python.",
    }


def test_further_paragraphs_are_kept_for_pretraining_without_held_out_answers():
    told = docstrings.Pair("What is b?", "Return what is visible.")
    kept = docstrings.Pair("What is a?", "The answer is this.", ("And more of it.", "Note: return  what is visible!"))
    texts = list(docstrings.Corpus(train=(kept,), valid=(told,)).pretraining_texts())
    assert texts == ["What is a?\n\nThe answer is this.\n\nAnd more of it."]


@pytest.fixture(scope="module")
def standard_library() -> docstrings.Corpus:
    return docstrings.collect()


def test_the_standard_library_gives_enough(standard_library):
    assert len(standard_library.train) > 2000
    share = len(standard_library.valid) / len(all_pairs(standard_library))
    assert 0.07 < share < 0.13
    for pair in (*standard_library.train, *standard_library.valid):
        assert docstrings.SHORTEST <= len(pair.completion) <= docstrings.LONGEST
        assert "\n" not in pair.completion


def test_nothing_held_out_is_in_training(standard_library):
    keys = [pair.key for pair in (*standard_library.train, *standard_library.valid)]
    assert len(set(keys)) == len(keys)
    trained = "\n".join(standard_library.pretraining_texts())
    assert not [pair.completion for pair in standard_library.valid if pair.completion in trained]


def test_a_held_out_answer_is_so_in_every_corpus():
    answers = [f"Return the number {i} of all." for i in range(1000)]
    chosen = [a for a in answers if docstrings.Pair("What is it?", a).held_out()]
    assert 70 < len(chosen) < 130
    assert all(docstrings.Pair("And this?", a.upper().rstrip(".")).held_out() for a in chosen)


def test_written_as_training_data(library, tmp_path):
    found = docstrings.collect(library, held_out_every=2)
    found.write(tmp_path / "data")
    for name, pairs in (("train", found.train), ("valid", found.valid)):
        lines = (tmp_path / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [
            {"prompt": pair.prompt, "completion": pair.completion} for pair in pairs
        ]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["train.jsonl", "valid.jsonl"]


def test_a_python_without_its_source(tmp_path):
    with pytest.raises(UserError, match="holds too few Python source files"):
        docstrings.collect(tmp_path)


def test_the_tokenizer_is_small_whole_and_the_same_each_time(standard_library, tmp_path):
    texts = list(standard_library.pretraining_texts())[:1000]
    for name in ("one", "other"):
        docstrings.train_tokenizer(texts, 1024, tmp_path / name)
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "other/tokenizer.json").read_bytes()
    tokenizer = Tokenizer.load(tmp_path / "one")
    assert tokenizer.vocab_size == 1024
    assert [tokenizer.backend.token_to_id(token) for token in docstrings.SPECIAL_TOKENS] == [0, 1, 2]
    assert tokenizer.eos_id == 2
    assert tokenizer.decode(tokenizer.encode("naïve 日本語\n\tx ")) == "naïve 日本語\n\tx "
    assert len(tokenizer.encode(" ".join(texts))) < len(" ".join(texts)) / 2.5


def test_the_corpus_trains_the_answers(library, tmp_path):
    found = docstrings.collect(library, held_out_every=2)
    found.write(tmp_path)
    docstrings.train_tokenizer(found.pretraining_texts(), 300, tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    samples = load_samples(tmp_path / "train.jsonl", tokenizer, vocab_size=300, seq=512)
    assert len(samples) == len(found.train)
    tokens, targets = samples[0]
    text = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
    question, answer = found.train[0].prompt, found.train[0].completion
    assert text == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    said = targets[targets >= 0].tolist()
    assert tokenizer.decode(said, skip_special_tokens=False) == f"{answer}<|im_end|>"
