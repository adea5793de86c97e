"""A contribution as one stream of bytes: its files in a fixed order, one after the other, and windows of that.

Names come from a closed list with a limit each, so that none is a path. It needs neither a network nor Flower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedcompose.contribution import OPTIONAL, REQUIRED, Kind
from fedcompose.files import sha256_hex


@dataclass(frozen=True)
class Part:
    """One file of a contribution, named `<kind>/<file>`."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Slice:
    """`length` bytes of `part` from `offset` on."""

    part: Part
    offset: int
    length: int


def part_limits(kinds: Sequence[Kind]) -> dict[str, int]:
    """Every name that a contribution of these kinds may have, in stream order, with its limit in bytes."""
    return {
        f"{kind}/{name}": limit
        for kind in sorted(kinds)
        for name, limit in (*REQUIRED[kind].items(), *OPTIONAL[kind].items())
    }


def plan(parts: Sequence[Part], start: int, length: int) -> list[Slice]:
    """The slices that make up bytes `start` to `start + length` of the stream; empty at and after its end."""
    slices, position, end = [], 0, start + length
    for part in parts:
        first, last = max(start, position), min(end, position + part.size)
        if first < last:
            slices.append(Slice(part, first - position, last - first))
        position += part.size
    return slices


def stream_bytes(parts: Sequence[Part]) -> int:
    return sum(part.size for part in parts)


def offer_digest(parts: Sequence[Part]) -> str:
    """SHA-256 over names, sizes and digests: it stands for every byte of the stream."""
    return sha256_hex("".join(f"{part.sha256} {part.size} {part.name}\n" for part in parts).encode())
