"""The tokenizer of a model folder: `tokenizer.json`, its special tokens, and the chat templates beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from entrenar_gpu.chat import ChatTemplate, Conversation, Message, Rendered, Span
from entrenar_gpu.data.growth import MOST_BESIDE, too_much
from entrenar_gpu.data.prefix import Beginning, Encoded, PrefixEncoder
from entrenar_gpu.data.tokenizer_files import (
    DEFAULT,
    TOOL_USE,
    faults_of,
    load_backend,
    named_tokens,
    read_optional_json,
    stop_ids,
    template_sources,
)
from entrenar_gpu.errors import UserError
from entrenar_gpu.stderr import without_panics_text


class Tokenizer:
    """Text to token ids and back, as the model's own `tokenizer.json` says, and its chat templates.

    `vocab_size` counts the tokenizer's entries (a model may hold more rows than that). `eos_id` ends a text in
    training, or is None. Generation stops at any of `eos_ids`: those that the model's files name, and `end_ids`: EOS,
    what tokenizer.json itself puts after a text, and what closes a turn in the chat templates; and at any of
    `stop_texts`, where a template closes turns with words. `bos_id` is None where the model has none. `opening` and
    `ending` are the ids that tokenizer.json itself puts around a text.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        folder: str,
        named: Mapping[str, str] | None = None,
        stop_ids: Iterable[int] = (),
        templates: Mapping[str, ChatTemplate] | None = None,
    ) -> None:
        # a saved tokenizer may cut or pad by itself; samples are cut and counted in one place only
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.folder = folder
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        named, stops = named or {}, list(stop_ids)
        self.bos_id: int | None = backend.token_to_id(named["bos_token"]) if "bos_token" in named else None
        eos: int | None = backend.token_to_id(named["eos_token"]) if "eos_token" in named else None
        self.eos_id = stops[0] if eos is None and stops else eos
        self._path = Path(folder) / "tokenizer.json"
        if why := too_much(backend):
            raise UserError(f"{self._path}: {why}")
        with faults_of(self._path, "cannot encode a text"):
            self.opening, self.ending = _added_around(backend)
        if len(self.opening) + len(self.ending) > MOST_BESIDE:
            raise UserError(f"{self._path}: puts more than {MOST_BESIDE:,} tokens around a text")
        self._templates = dict(templates or {})
        closings = dict.fromkeys(text for template in self._templates.values() for text in template.closings)
        closing_ids = {text: backend.token_to_id(text) for text in closings}
        turn_ends = [i for i in closing_ids.values() if i is not None]
        self.stop_texts = tuple(text for text, i in closing_ids.items() if i is None)
        # what training teaches to end with: EOS, what stands behind every text, what closes a turn
        self.end_ids = (*([] if self.eos_id is None else [self.eos_id]), *self.ending[:1], *turn_ends)
        self.eos_ids = frozenset([*stops, *self.end_ids])
        self._special_texts = tuple({*_special_tokens(backend).values(), *named.values()})
        self._encoder = PrefixEncoder(backend)

    @classmethod
    def load(cls, folder: str | Path, now: datetime | None = None) -> Tokenizer:
        """Read a model folder's tokenizer.

        `now` is the clock shown to chat templates that write the date (Llama 3's do): a resumed run passes the one it
        began with, so that its data stay the same. Raises UserError naming the file at fault.
        """
        with without_panics_text():
            return cls._loaded(Path(folder), now or datetime.now())

    @classmethod
    def _loaded(cls, folder: Path, now: datetime) -> Tokenizer:
        backend = load_backend(folder / "tokenizer.json")
        config = read_optional_json(folder / "tokenizer_config.json")
        named = named_tokens(config) | named_tokens(read_optional_json(folder / "special_tokens_map.json"))
        stops = [i for name in ("generation_config.json", "config.json") for i in stop_ids(folder / name)]
        special = set(_special_tokens(backend).values()) | set(named.values())
        templates = {
            name: ChatTemplate(source, origin, named, special, now)
            for name, (source, origin) in template_sources(folder, config).items()
        }
        return cls(backend, str(folder), named, stops, templates)

    @cached_property
    def highest_id(self) -> int:
        """Of all that a text may become; a vocabulary may have holes."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with what tokenizer.json itself puts around it (Llama: BOS) unless told not to.

        What a text already begins or ends with, as chat templates write BOS, is not put there a second time.
        """
        ids = self._plain(text)
        before, after = self.missing_around(ids) if add_special_tokens else ([], [])
        return [*before, *ids, *after]

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text to be continued: with what tokenizer.json puts before it, without what ends it."""
        ids = self._plain(text)
        return [*self._missing_opening(ids), *ids]

    def _plain(self, text: str) -> list[int]:
        with faults_of(self._path, "cannot encode a text"):
            return list(self.backend.encode(text, add_special_tokens=False).ids)

    def begin(self, texts: Sequence[str], limit: int, placed: Sequence[bool]) -> list[Beginning]:
        """Each text without anything around it tokenised, or so much of it; see PrefixEncoder.begin."""
        with without_panics_text(), faults_of(self._path, "cannot encode a text"):
            return self._encoder.begin(texts, limit, placed)

    def locate(self, begun: Sequence[Beginning], spans: Sequence[Sequence[Span]]) -> list[Encoded]:
        """Token ids of what `begin` gave, and where spans of characters lie in them; see PrefixEncoder.locate."""
        with faults_of(self._path, "cannot encode a text"):
            return self._encoder.locate(begun, spans)

    def missing_around(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """What tokenizer.json puts before and after a text's ids, as far as it is not there yet."""
        ended = list(ids[-len(self.ending) :]) == self.ending
        return self._missing_opening(ids), [] if ended else self.ending

    def _missing_opening(self, ids: Sequence[int]) -> list[int]:
        there = bool(self.opening) and list(ids[:1]) == self.opening[:1]
        return [] if there else self.opening

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        with faults_of(self._path, "cannot decode tokens"):
            return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def ends_with_special(self, text: str) -> bool:
        """Whether the last thing in `text`, white space aside, is a special token: an end of turn or of text."""
        return text.rstrip().endswith(self._special_texts)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: Sequence[Any] | None = None
    ) -> str:
        """The conversation as the model reads it; encode it with `add_special_tokens=False`, it holds its own."""
        return self.template(tools).render(messages, add_generation_prompt=add_generation_prompt, tools=tools)

    def render_turns(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> Rendered:
        """The same, with the character spans of what the assistant says (see chat/turns.py)."""
        (rendered,) = self.template(tools).render_all([Conversation(messages, tools)], "turns")
        return rendered

    def template(self, tools: Sequence[Any] | None) -> ChatTemplate:
        """As transformers chooses: the template named tool_use for conversations with tools, else the default."""
        for name in (TOOL_USE, DEFAULT) if tools is not None else (DEFAULT,):
            if name in self._templates:
                return self._templates[name]
        raise UserError(f"{self.folder}: the model has no {'default ' * self.has_chat_template}chat template")


def _special_tokens(backend: tokenizers.Tokenizer) -> dict[int, str]:
    return {i: token.content for i, token in backend.get_added_tokens_decoder().items() if token.special}


def _added_around(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that a post-processor puts before and after a text, seen on a short one."""
    try:
        encoding = backend.encode("a", add_special_tokens=True)
    except Exception:  # a vocabulary of words, without one for the unknown
        return [], []
    ids, added = list(encoding.ids), list(encoding.special_tokens_mask)
    first = next((i for i, special in enumerate(added) if not special), len(ids))
    last = next((i for i, special in enumerate(reversed(added)) if not special), 0)
    if first == len(ids):  # "a" itself is no token here
        return ids, []
    return ids[:first], ids[len(ids) - last :]
