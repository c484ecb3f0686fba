"""A tokenizer as llama.cpp reads it from a GGUF file: its pieces, their kinds, and how texts fall into words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entrenar_gpu.data import Tokenizer
from entrenar_gpu.errors import UserError
from entrenar_gpu.model import LLAMA3_WORDS, QWEN2_WORDS

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


def add_tokenizer(writer: Any, folder: Path, vocab_size: int) -> None:
    """Write the tokenizer of a model folder, with its special tokens and chat template, for `vocab_size` rows of the
    embedding. Raises UserError where llama.cpp has no such tokenizer."""
    import gguf

    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.load(folder)
    content = json.loads(path.read_text(encoding="utf-8"))
    model = content["model"]
    if model.get("type") != "BPE":
        raise UserError(f"{path}: a {model.get('type')} tokenizer cannot be written as GGUF; BPE can")
    pieces, kinds = _pieces(model, content.get("added_tokens") or [], vocab_size, path)
    of_bytes = bool(model.get("byte_fallback"))
    writer.add_tokenizer_model("llama" if of_bytes else "gpt2")
    if of_bytes:
        writer.add_token_scores([-float(i) for i in range(vocab_size)])
        writer.add_add_space_prefix("Prepend" in json.dumps(content.get("normalizer")))
    else:
        writer.add_tokenizer_pre(_words(content.get("pre_tokenizer"), bool(model.get("ignore_merges")), path))
    writer.add_token_list(pieces)
    writer.add_token_types(kinds)
    gguf.SpecialVocab(folder, load_merges=not of_bytes, n_vocab=vocab_size).add_to_gguf(writer, quiet=True)
    ends = [i for i in tokenizer.end_ids if i != tokenizer.eos_id]
    if ends:
        writer.add_eot_token_id(ends[0])
    if "tokenizer.ggml.add_bos_token" not in writer.kv_data[0]:
        writer.add_add_bos_token(bool(tokenizer.opening))


def _pieces(
    model: Mapping[str, Any], added: list[dict[str, Any]], vocab_size: int, path: Path
) -> tuple[list[str], list[int]]:
    """Pieces by id with their kinds; ids that no piece has are named, for the embedding has rows for them."""
    pieces = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [_UNUSED] * vocab_size
    special = {token["id"]: bool(token.get("special")) for token in added}
    entries = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
    for piece, i in entries.items():
        if not 0 <= i < vocab_size:
            raise UserError(f"{path}: token id {i} is outside the model's vocabulary of {vocab_size}")
        pieces[i], kinds[i] = piece, _NORMAL
        if i in special:
            kinds[i] = _CONTROL if special[i] else _USER_DEFINED
        if model.get("byte_fallback") and len(piece) == 6 and piece.startswith("<0x"):
            kinds[i] = _BYTE
        if piece == model.get("unk_token"):
            kinds[i] = _UNKNOWN
    return pieces, kinds


def _words(rule: Any, ignore_merges: bool, path: Path) -> str:
    """llama.cpp's name for how a text is cut into words. Raises UserError where it has none."""
    rules = rule.get("pretokenizers", [rule]) if isinstance(rule, dict) else []
    kinds = [each.get("type") for each in rules]
    patterns = [each.get("pattern", {}).get("Regex") for each in rules if each.get("type") == "Split"]
    if patterns == [LLAMA3_WORDS]:
        return "llama-bpe" if ignore_merges else "smaug-bpe"
    if patterns == [QWEN2_WORDS]:
        return "qwen2"
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and rules[0].get("individual_digits"):
        return "smollm"
    raise UserError(f"{path}: its rule for words is none of those known to GGUF: {json.dumps(rule)[:200]}")
