"""What stands beside tokenizer.json in a model folder: named special tokens, ids that stop, and chat templates."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from entrenar_gpu.errors import UserError
from entrenar_gpu.files import read_json_object, read_text

DEFAULT, TOOL_USE = "default", "tool_use"

# Far above what real models have (Gemma's tokenizer: 33 MB), low enough to be refused at once.
_MOST_OF_TOKENIZER, _MOST_OF_TEMPLATE = 128 << 20, 4 << 20


def load_backend(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a tokenizer.json. Raises UserError naming the file."""
    if not path.is_file():
        raise UserError(f"{path}: not found; the model folder needs its tokenizer")
    text = read_text(path, _MOST_OF_TOKENIZER, "tokenizer.json")
    with faults_of(path, "not a tokenizer"):
        return tokenizers.Tokenizer.from_str(text)


@contextlib.contextmanager
def faults_of(path: Path, what: str) -> Iterator[None]:
    """Whatever the tokenizers library raises in the block, as a UserError that names the file."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # it raises nothing more precise than Exception, and panics beside that
        raise UserError(f"{path}: {what}: {' '.join(str(error).split())[:200]}") from None


def read_optional_json(path: Path) -> dict[str, Any]:
    """The object in an optional JSON file; empty where there is no such file. Raises UserError naming the file."""
    return read_json_object(path) if path.exists() else {}


def named_tokens(values: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token`, ...: written as text, or as an object with its `content`."""
    named = {}
    for key, value in values.items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            named[key] = content
    return named


def stop_ids(path: Path) -> list[int]:
    """`eos_token_id` of a generation_config.json or config.json: one id, a list of them, or none."""
    value = read_optional_json(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        shown = json.dumps(value)
        raise UserError(f"{path}: eos_token_id must be a token id or a list of them, not {shown[:80]}")
    return ids


def template_sources(folder: Path, config: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Each chat template's text and the file it is in, by name.

    As transformers reads them: chat_template.jinja and additional_chat_templates/NAME.jinja where there is any of
    them, else tokenizer_config.json; and last chat_template.json, in which processors kept theirs.
    """
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").exists():
        files[DEFAULT] = folder / "chat_template.jinja"
    if files:
        return {name: (read_text(path, _MOST_OF_TEMPLATE, "chat template"), str(path)) for name, path in files.items()}
    origin, value = folder / "tokenizer_config.json", config.get("chat_template")
    if not value:
        origin = folder / "chat_template.json"
        value = read_optional_json(origin).get("chat_template")
    return _declared(value, str(origin))


def _declared(value: Any, origin: str) -> dict[str, tuple[str, str]]:
    """The templates of a `chat_template` key: one text, or several with their names."""
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        value = {DEFAULT: value}
    elif isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    texts = isinstance(value, dict) and all(isinstance(part, str) for pair in value.items() for part in pair)
    if not texts:
        raise UserError(f"{origin}: chat_template must be text, or a list of objects with name and template")
    return {name: (source, origin) for name, source in value.items()}
