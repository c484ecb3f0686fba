"""Changes to valid files that no writer would make: of bytes, and of values within JSON."""

from __future__ import annotations

import json
import random
from typing import Any

ODD_BYTES = [
    *(b"null", b"true", b"-1", b"0", b"1e999", b"9" * 400, b"[]", b"{}", b'""', b"[" * 3000),
    *(b"\x00", b"\xff\xfe", b"NaN", b"\xed\xa0\x80", b"\\ud800"),
]
ODD_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3.5, 1e308, float("inf"), float("nan"), 2**31, 2**63, -(2**63), 10**30),
    *("", "a", "null", "\x00", "\ud800", "../../x", "(a+)+$", "(", "%s%n", "🦙" * 50, "x" * 100_000),
    *([], {}, [[]], [None], ["a", "a"], {"a": {}}, {"": 0}, [0] * 1000),
]
_NESTED = 40  # levels around a value, at most


def damaged(content: bytes, rng: random.Random) -> bytes:
    """`content` with a few changes of bytes; the first kilobyte gets most, where formats have their headers."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(min(len(data), 1024) if rng.random() < 0.7 else len(data)) if data else 0
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.choice((1, 2, 8, 200))]
        elif kind == 2:
            data[at:at] = data[at : at + rng.choice((1, 8, 100))]
        elif kind == 3:
            data[at : at + rng.choice((0, 1, 4))] = rng.choice(ODD_BYTES)
        elif kind == 4:
            del data[at:]
        else:
            data[at : at + 8] = rng.randbytes(8)
    return bytes(data)


def changed_json(content: bytes, rng: random.Random) -> bytes:
    """JSON, or lines of it, with a few of its values replaced, doubled, moved or removed; it stays JSON."""
    text = content.decode()
    if "\n" in text.strip() and not text.lstrip().startswith("{\n"):
        lines = text.splitlines()
        at = rng.randrange(len(lines))
        lines[at] = _changed(lines[at], rng)
        return ("\n".join(lines) + "\n").encode(errors="surrogatepass")
    return _changed(text, rng).encode(errors="surrogatepass")


def changed_header(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file with changes of values within its header, the length of which fits again."""
    length = int.from_bytes(content[:8], "little")
    header = changed_json(content[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _changed(text: str, rng: random.Random) -> str:
    value = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        value = _with_one_change(value, rng)
    return json.dumps(value, ensure_ascii=rng.random() < 0.5)


def _with_one_change(value: Any, rng: random.Random) -> Any:
    """Steps down into a value at random, and changes what it comes to."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(keys)
        kind = rng.random()
        if kind < 0.08:
            del value[key]
        elif kind < 0.12 and isinstance(value, dict):
            value[rng.choice(("", "a", "__class__", "type", str(key) + " "))] = value.pop(key)
        elif kind < 0.16:
            value[key] = value[rng.choice(keys)]
        else:
            value[key] = _with_one_change(value[key], rng)
        return value
    kind = rng.random()
    if kind < 0.15 and isinstance(value, int) and not isinstance(value, bool):
        return value * rng.choice((-1, 2, 1000, 2**32)) + rng.choice((-1, 0, 1))
    if kind < 0.25 and isinstance(value, str):
        return value[:10_000] * rng.choice((2, 100)) if rng.random() < 0.5 else value[: rng.randrange(len(value) + 1)]
    if kind < 0.3:
        for _ in range(rng.randrange(_NESTED)):
            value = [value]
        return value
    return json.loads(json.dumps(rng.choice(ODD_VALUES)))  # a copy: later changes must not reach the list
