"""Text of models, data and names, fit for a terminal."""

from __future__ import annotations

import json
import logging
import math
import re
from typing import Any

# What steers a terminal or hides text: controls, C1 among them, marks that turn the direction of writing, invisible
# separators and tags, halves of a surrogate pair. Joiners stay: scripts and emoji are written with them.
_STEERING = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
LONGEST = 1000


def printable(text: object, longest: int = LONGEST, keep: str = "") -> str:
    """`text` with what would steer a terminal as escapes (`\\x1b`), but for the characters in `keep`; of what is longer
    than `longest` characters the middle is left out: messages name a file first and a remedy last."""
    shown = str(text)
    if len(shown) > longest:
        tail = longest // 4
        shown = f"{shown[: longest - tail]} … {shown[-tail:]}"
    return _STEERING.sub(lambda found: found[0] if found[0] in keep else _escaped(found[0]), shown)


class _Printable(logging.Formatter):
    """What libraries log, which may quote whoever answered them: a line, but for the traceback of a fault."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t" if record.exc_info else "")


def make_logs_printable() -> None:
    """Have warnings of libraries shown as `printable` does, where the program has not said how to show them."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Printable())


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def print_json(values: Any) -> None:
    """JSON that every reader takes: what is not finite is null."""
    print(json.dumps(_plain(values), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
