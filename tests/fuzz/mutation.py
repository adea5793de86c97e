"""Damage: one input from another, at random, by the structure of a document or by its bytes."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

from tests.fuzz.targets import TENSORS, Form

MAX_BYTES = 1 << 16
JUNK: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 1 << 31, 1 << 53, 1 << 64, 10**400, 0.5, 1e308, -0.0, "", " ", "a", "x" * 300,
    "0" * 64, "\u202e", "\ud800", "\0", "\x1b[2J", "\n", "../x", "2026-11-20T09:00:00Z", [], {}, [[]], {"a": 1},
    ["a"] * 20,
)  # fmt: skip
TOKENS = (
    b"NaN", b"Infinity", b"1e999", b"-", b"\xff", b"\xef\xbb\xbf", b"\\ud800", b"\\u0000", b'"', b"{", b"}", b"[" * 50,
    b"]", b",", b":", b"\r\n", b"\n", b" ", b"null", b"true", b"=", b"\x00", b"\x1b", b"9" * 30,
)  # fmt: skip


def mutated(data: bytes, form: Form, random: Random) -> bytes:
    """Something else than `data`, or nearly always."""
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        changed = _document(data, form, random) if random.random() < 0.6 else None
        data = _bytes(data, random) if changed is None else changed
    return data[:MAX_BYTES]


def _document(data: bytes, form: Form, random: Random) -> bytes | None:
    """One change of a document's structure, where there is a document."""
    if form == "json":
        return _json(data, random)
    if form == "lines":
        lines = data.splitlines(keepends=True) or [b""]
        place = random.randrange(len(lines))
        choice = random.random()
        if choice < 0.15:
            lines.insert(random.randrange(len(lines)), lines.pop(place))
        elif choice < 0.3:
            lines.insert(place, lines[random.randrange(len(lines))])
        else:
            lines[place] = (_json(lines[place], random) or b"") + b"\n"
        return b"".join(lines)
    if form == "safetensors" and (match := TENSORS.fullmatch(data)):
        header = _json(match["header"], random)
        if header is not None:
            header += b" " * (-len(header) % 8)
            return len(header).to_bytes(8, "little") + header + match["body"]
    return None


def _json(data: bytes, random: Random) -> bytes | None:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    places = _places(document)
    if not places:
        return None
    holder, key = random.choice(places)
    _change(holder, key, random.choice(places), random)
    try:
        text = json.dumps(
            document, sort_keys=random.random() < 0.5, separators=random.choice(((",", ":"), (", ", ": ")))
        )
    except (ValueError, RecursionError):
        return None
    if random.random() < 0.1:  # a key twice
        text = text.replace("{", "{" + json.dumps(str(key)) + ":" + json.dumps(random.choice(JUNK)) + ",", 1)
    return text.encode("utf-8", "surrogatepass")


def _change(holder: Any, key: Any, other: tuple[Any, Any], random: Random) -> None:
    value, choice = holder[key], random.random()
    if choice < 0.15:
        del holder[key]
    elif choice < 0.3:
        holder[key] = copy.deepcopy(other[0][other[1]])
    elif choice < 0.4 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(value))
    elif choice < 0.4:
        holder[random.choice(("x", "a" * 300, "\ud800", "", "sha256"))] = value
    elif choice < 0.6 and isinstance(value, str) and value:
        place = random.randrange(len(value))
        holder[key] = value[:place] + random.choice(("", "0", "g", "Z", "\n", "/", "é")) + value[place + 1 :]
    elif choice < 0.6 and type(value) in (int, float):
        holder[key] = random.choice((value - 1, value + 1, -value, value // 2, f"{value}"))
    else:
        holder[key] = random.choice(JUNK)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place inside a document, as what holds it and where."""
    found: list[tuple[Any, Any]] = []
    stack = [value]
    while stack and len(found) < 5000:
        holder = stack.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else []
        for key in keys:
            found.append((holder, key))
            stack.append(holder[key])
    return found


def _bytes(data: bytes, random: Random) -> bytes:
    start = random.randrange(len(data) + 1)
    stop = min(len(data), start + random.choice((0, 1, 1, 2, 8, 64)))
    choice = random.random()
    if choice < 0.3 and start < len(data):
        return data[:start] + bytes([data[start] ^ 1 << random.randrange(8)]) + data[start + 1 :]
    if choice < 0.6:
        return data[:start] + random.choice(TOKENS) + data[stop:]
    if choice < 0.7:
        return data[:start] + random.randbytes(stop - start) + data[stop:]
    if choice < 0.8:
        return data[:start] + data[stop:]
    if choice < 0.9:
        other = random.randrange(len(data) + 1)
        return data[:start] + data[other : other + 64] + data[stop:]
    return data[: random.randrange(len(data) + 1)]
