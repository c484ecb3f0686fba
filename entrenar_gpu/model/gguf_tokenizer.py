"""The tokenizer of a GGUF file as tokenizer.json has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from entrenar_gpu.errors import UserError

CONTROL, USER_DEFINED = 3, 4
# Patterns that cut text into words, by llama.cpp's names for them; several names have one pattern.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS = {"qwen2": QWEN2_WORDS} | dict.fromkeys(("llama-bpe", "llama3", "smaug-bpe", "dbrx"), LLAMA3_WORDS)
DIGITS = ("smollm", "starcoder", "refact", "command-r")  # each digit a word, the rest as GPT-2 has it
GPT2 = ("gpt-2", "default", "olmo", "phi-2")


def tokenizer_of(fields: Mapping[str, Any], source: str) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """(the tokenizer, the names of its special tokens) of a file's metadata. Raises UserError naming `source`."""
    pieces = fields.get("tokenizer.ggml.tokens")
    kinds = fields.get("tokenizer.ggml.token_type")
    if not isinstance(pieces, list) or not isinstance(kinds, list) or len(kinds) != len(pieces):
        raise UserError(f"{source}: holds no tokenizer")
    model = fields.get("tokenizer.ggml.model")
    if model == "gpt2":
        tokenizer = _of_words(pieces, fields, source)
    elif model == "llama":
        tokenizer = _of_bytes(pieces, fields, source)
    else:
        raise UserError(f"{source}: a tokenizer of kind {str(model)[:40]!r} is not read; gpt2 and llama are")
    for piece, kind in zip(pieces, kinds, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(piece, special=kind == CONTROL, normalized=False)])
    named = {}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        i = fields.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(i, int) and 0 <= i < len(pieces):
            named[name] = pieces[i]
    begins = fields.get("tokenizer.ggml.add_bos_token", model == "llama")
    if begins and "bos_token" in named:
        bos = named["bos_token"]
        around = [(bos, pieces.index(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos}:0 $A:0", special_tokens=around)
    return tokenizer, named


def _of_words(pieces: Sequence[str], fields: Mapping[str, Any], source: str) -> tokenizers.Tokenizer:
    """Byte-level BPE, within words."""
    pre = str(fields.get("tokenizer.ggml.pre", "default"))
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges") or []]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in ("llama-bpe", "llama3")))
    of_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in SPLITS)
    if pre in SPLITS:
        split = pre_tokenizers.Split(tokenizers.Regex(SPLITS[pre]), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, of_bytes])
    elif pre in DIGITS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), of_bytes])
    elif pre in GPT2:
        tokenizer.pre_tokenizer = of_bytes
    else:
        raise UserError(f"{source}: texts are cut into words as {pre[:40]!r} does it, which is not known here")
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _of_bytes(pieces: Sequence[str], fields: Mapping[str, Any], source: str) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: pieces are joined in the order of their scores, what has none is spelled in bytes."""
    scores = fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(pieces):
        raise UserError(f"{source}: its tokenizer has no scores")
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    unknown = fields.get("tokenizer.ggml.unknown_token_id", 0)
    merges = []
    for piece, i in vocabulary.items():
        parts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        here = [pair for pair in parts if pair[0] in vocabulary and pair[1] in vocabulary]
        here.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += [(scores[i], pair) for pair in here]
    merges.sort(key=lambda merge: -merge[0])
    model = models.BPE(
        vocabulary, [pair for _, pair in merges], unk_token=pieces[unknown], fuse_unk=True, byte_fallback=True
    )
    tokenizer = tokenizers.Tokenizer(model)
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer
