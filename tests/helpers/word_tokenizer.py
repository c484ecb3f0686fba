"""A tokenizer of words w1, w2, ..., with a chat template of such words."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from entrenar_gpu.data import Tokenizer

END = 0
TEMPLATE = (
    "{% for m in messages %}{{ {'system': 'w1', 'user': 'w2', 'assistant': 'w3'}[m.role] }} {{ m.content }} <end> "
    "{% endfor %}{% if add_generation_prompt %}w3{% endif %}"
)


def word_tokenizer(folder: Path, vocabulary: int = 32) -> Tokenizer:
    """Token 0 ends turns, token i is the word wi; unknown words are w1."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {word: i for i, word in enumerate(["<end>", *(f"w{i}" for i in range(1, vocabulary))])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w1"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<end>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": TEMPLATE}))
    return Tokenizer.load(folder)


def text(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)
