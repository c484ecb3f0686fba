"""The tokenizer of a model folder: `tokenizer.json`, its special tokens, and the chat template beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers

from entrenar_gpu.data.chat import ChatTemplate, Message, Rendered, Span
from entrenar_gpu.errors import UserError


class Tokenizer:
    """Text to token ids and back, as the model's own `tokenizer.json` says, and its chat templates.

    `vocab_size` counts the tokenizer's entries (a model may hold more rows than that). `eos_id` ends a text in
    training, or is None; generation stops at any of `eos_ids`. `bos_id` is None where the model has none.
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
        named, stop_ids = named or {}, list(stop_ids)
        self.bos_id: int | None = backend.token_to_id(named["bos_token"]) if "bos_token" in named else None
        eos: int | None = backend.token_to_id(named["eos_token"]) if "eos_token" in named else None
        self.eos_id = stop_ids[0] if eos is None and stop_ids else eos
        self.eos_ids = frozenset(stop_ids) | ({self.eos_id} if self.eos_id is not None else set())
        self._special_texts = tuple({*_special_tokens(backend).values(), *named.values()})
        self._templates = dict(templates or {})

    @classmethod
    def load(cls, folder: str | Path, now: datetime | None = None) -> Tokenizer:
        """Read a model folder's tokenizer.

        `now` is the clock shown to chat templates that write the date (Llama 3's do): a resumed run passes the one it
        began with, so that its data stay the same. Raises UserError naming the file at fault.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{path}: not found; the model folder needs its tokenizer")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more precise
            raise UserError(f"{path}: not a tokenizer: {' '.join(str(error).split())[:200]}") from None
        config = _read_json(folder / "tokenizer_config.json")
        named = _named_tokens(config) | _named_tokens(_read_json(folder / "special_tokens_map.json"))
        stops = [i for name in ("generation_config.json", "config.json") for i in _stop_ids(folder / name)]
        special = set(_special_tokens(backend).values()) | set(named.values())
        templates = {
            name: ChatTemplate(source, origin, named, special, now or datetime.now())
            for name, (source, origin) in _template_sources(folder, config).items()
        }
        return cls(backend, str(folder), named, stops, templates)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with what tokenizer.json itself adds around it (Llama: BOS) unless told not to.

        A text that already begins with BOS, as chat templates write it, does not get a second one.
        """
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0][0]

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[tuple[list[int], list[Span]]]:
        """For each text its token ids, and the characters [start, end) each token stands for."""
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        result = []
        for encoding in encodings:
            ids, offsets = encoding.ids, encoding.offsets
            doubled = self.bos_id is not None and ids[:2] == [self.bos_id, self.bos_id]
            result.append((ids[1:], offsets[1:]) if doubled else (ids, offsets))
        return result

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def ends_with_special(self, text: str) -> bool:
        """Whether the last thing in `text`, white space aside, is a special token: an end of turn or of text."""
        return text.rstrip().endswith(self._special_texts)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: Sequence[Any] | None = None
    ) -> str:
        """The conversation as the model reads it; encode it with `add_special_tokens=False`, it holds its own."""
        template = self._template(tools)
        return template.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)

    def render_turns(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> Rendered:
        """The same, with the character spans of what the assistant says (see chat.py)."""
        return self._template(tools).render_turns(messages, tools)

    def _template(self, tools: Sequence[Any] | None) -> ChatTemplate:
        """As transformers chooses: the template named tool_use for conversations with tools, else the default."""
        for name in ("tool_use", "default") if tools else ("default",):
            if name in self._templates:
                return self._templates[name]
        raise UserError(f"{self.folder}: the model has no {'default ' * self.has_chat_template}chat template")


def _special_tokens(backend: tokenizers.Tokenizer) -> dict[int, str]:
    return {i: token.content for i, token in backend.get_added_tokens_decoder().items() if token.special}


def _read_json(path: Path) -> dict[str, Any]:
    """The object in an optional JSON file; empty where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def _named_tokens(values: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token`, ...: written as text, or as an object with its `content`."""
    named = {}
    for key, value in values.items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            named[key] = content
    return named


def _stop_ids(path: Path) -> list[int]:
    value = _read_json(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise UserError(f"{path}: eos_token_id must be a token id or a list of them, not {value!r}")
    return ids


def _template_sources(folder: Path, config: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Each chat template's text and the file it is in, by name. A file of its own wins over tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return {"default": (path.read_text(encoding="utf-8"), str(path))}
        except (OSError, UnicodeDecodeError):
            raise UserError(f"{path}: cannot be read as UTF-8 text") from None
    value, origin = config.get("chat_template"), str(folder / "tokenizer_config.json")
    named = [{"name": "default", "template": value}] if isinstance(value, str) else value or []
    try:
        sources = {entry["name"]: (entry["template"], origin) for entry in named}
    except (TypeError, KeyError):
        sources = {None: (None, origin)}
    if not all(isinstance(name, str) and isinstance(source, str) for name, (source, _) in sources.items()):
        raise UserError(f"{origin}: chat_template must be text, or a list of objects with name and template")
    return sources
