"""What an option is: a field declared once, with default, help text, unit and bounds; checked when it is set.

The command line derives its flags from the fields, `from_mapping` reads YAML, and scripts/options_table.py prints
docs/options.md.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from entrenar_gpu.errors import UserError, naming_arguments

MOST = 2**20  # rows, positions and the like: beyond any device, and planned in seconds
LARGEST = 1e30  # of any number: on the device they are f32
SEVERAL = tuple[str, ...]  # what a flag that may be given again adds to the type of its field


def option(
    default: Any, help: str, unit: str = "", low: float | None = None, high: float = LARGEST, listed: bool = False
) -> Any:
    """A field of a run's configuration. `low` and `high` are inclusive bounds on a number; text that is `listed` may
    also be given as a list of its parts, or as a mapping."""
    return field(default=default, metadata={"help": help, "unit": unit, "low": low, "high": high, "listed": listed})


@dataclass(frozen=True)
class Options:
    """A group of options: field `save_every` is the flag `--save-every` and a YAML key."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        with naming_arguments():
            for f in dataclasses.fields(self):
                if f.metadata:  # what `option` declared; lists and mappings are their class's own to check
                    value = _checked(f, hints[f.name], getattr(self, f.name))
                    object.__setattr__(self, f.name, value)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str) -> Self:
        """A configuration from decoded YAML or flags; `source` names it in errors. Unknown keys fail."""
        return cls(**known_keys(cls, values, source))

    def to_mapping(self) -> dict[str, Any]:
        """The options by name, for files and records: of an address, nothing that may be a credential."""
        values = dataclasses.asdict(self)
        return {k: without_credentials(v) if isinstance(v, str) else v for k, v in values.items()}


def without_credentials(text: str) -> str:
    """An address without user, password, query and fragment; where one may be taken for the other, as with a ? before
    the @, its scheme alone. Any other text as it is."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        return text
    address, _, fragment = rest.partition("#")
    place, _, query = address.partition("?")
    if "@" in query + fragment:
        return f"{scheme}://..."
    return f"{scheme}://{place.rpartition('@')[2]}{'?...' if query else ''}"


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def known_keys(
    cls: type, values: Mapping[str, Any], source: str, elsewhere: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """`values` with keys checked against the fields of `cls`; both save_every and save-every are understood.

    `elsewhere` has our flags by what others call them, for the hint about an unknown key.
    """
    names = [f.name for f in dataclasses.fields(cls)]
    result = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in names:
            import difflib

            ours = (elsewhere or {}).get(name.replace("_", "-"), "").replace("-", "_")
            near = [ours] if ours else difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{source}: unknown key {key!r}{hint}")
        if name in result:
            raise UserError(f"{source}: {name} is given twice, with - and with _")
        result[name] = value
    return result


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError with the file and line."""
    import yaml

    refuse_named_pipe(path)
    try:
        with open(path, encoding="utf-8") as stream:
            loader = yaml.SafeLoader(stream)
            node = loader.get_single_node()
            if (twin := _key_given_twice(node)) is not None:
                raise UserError(f"{path}: line {twin.start_mark.line + 1}: {twin.value!r} is given twice")
            values = None if node is None else loader.construct_document(node)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{path}:{where} not valid YAML: {getattr(error, 'problem', error)}") from None
    except (ValueError, LookupError, AttributeError, RecursionError) as error:  # of dates, tags, depths
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines")
    return values


def refuse_named_pipe(path: str | Path, flag: str = "") -> None:
    """Raise UserError for a pipe that lies in a folder: opening one waits for somebody to write, maybe for ever. What
    the shell hands over as a file (/dev/fd/63, /dev/stdin) has its writer."""
    if Path(path).is_fifo() and not os.path.abspath(path).startswith(("/dev/", "/proc/")):
        raise UserError(f"{flag and flag + ': '}{path}: cannot be read: it is no file")


def path_text(value: Any, flag: str) -> str:
    """A path, or a name that stands for one, as text. Raises UserError naming the flag for what is neither."""
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str) or "\0" in text:
        raise UserError(f"{flag}: {value!r} is neither text nor a path")
    return text


def whole_number(value: Any, flag: str, low: int) -> int:
    """An argument that counts something, as Python's own integer. Raises UserError naming the flag."""
    try:
        number = operator.index(value)
    except TypeError:
        raise UserError(f"{flag}: {value!r} is not a whole number") from None
    if number < low:
        raise UserError(f"{flag}: {number} is below {low}")
    return number


def _key_given_twice(node: Any) -> Any:
    """The node of a key that a YAML mapping has twice, which PyYAML takes the last of; None without."""
    seen = set()
    for key, _ in node.value if node is not None and node.id == "mapping" else ():
        if key.id == "scalar" and key.value in seen:
            return key
        seen.add(key.value if key.id == "scalar" else None)
    return None


def is_union(hint: Any) -> bool:
    """Whether a type hint is `A | B`, which Python 3.11 spells in two ways."""
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def _checked(f: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """`value` as the field's type, within its bounds; a UserError naming the flag otherwise."""
    options = typing.get_args(hint) if is_union(hint) else (hint,)
    if value is None and type(None) in options:
        return None
    if isinstance(value, (list, tuple)) and SEVERAL in options:
        texts = tuple(_checked(f, str, text) for text in value)
        return texts[0] if len(texts) == 1 else texts
    options = tuple(option for option in options if option != SEVERAL)
    (kind,) = [o for o in options if o is not type(None)]
    # what a list or mapping holds is not shown: headers of a collector, say, hold its password
    shown = f"a {type(value).__name__}" if isinstance(value, (list, tuple, dict)) else repr(value)
    name, bad = flag(f.name), UserError(f"{flag(f.name)}: {shown} is not {_describe(kind)}")
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise bad
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise bad
        return value
    if kind is str:
        value = _joined(value) if f.metadata["listed"] else value
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        value = str(value) if type(value) is int else value  # as YAML reads a name or an index that is all digits
        if not isinstance(value, str) or "\0" in value:
            raise bad
        return value
    # YAML reads 2e-4 as text; a whole float is a fine int
    try:
        number = float(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or not math.isfinite(number) or (kind is int and number != int(number)):
        raise bad
    low, high = f.metadata["low"], f.metadata["high"]
    if low is not None and number < low:
        raise UserError(f"{name}: {value} is below {low}")
    if number > high:
        raise UserError(f"{name}: {value} is above {high}")
    return kind(number)


def _joined(value: Any) -> Any:
    """A list or a mapping as the command line would have it."""
    if isinstance(value, Mapping):
        return ",".join(f"{key}={inner}" for key, inner in value.items())
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
