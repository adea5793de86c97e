"""Strings that must not be found, and a search for them in bytes, whatever they were wrapped in.

planted = Canaries.made("prompt", "answer")
planted["prompt"]                       # a text to put into a question
planted.found_in(data, tokenizer)       # where: {"prompt: base64", ...}

A fragment of eight characters is enough. It finds what was copied, in the encodings below and inside what was
compressed. It cannot find what was hidden with intent, say in the low bits of weights.
"""

from __future__ import annotations

import base64
import secrets
import string
import struct
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

LENGTH, FRAGMENT = 24, 8
MAX_UNPACKED_BYTES, MAX_DEPTH = 64 << 20, 3
PACKED = (b"\x1f\x8b\x08", b"x\x01", b"x\x5e", b"x\x9c", b"x\xda", b"PK\x03\x04")
Tokenize = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Canaries:
    """A random text for every place where one is planted."""

    texts: Mapping[str, str]

    @classmethod
    def made(cls, *places: str) -> Canaries:
        """Letters and digits of both cases, so that no fragment occurs by chance."""
        alphabet = string.ascii_letters + string.digits
        return cls({place: "".join(secrets.choice(alphabet) for _ in range(LENGTH)) for place in places})

    def __getitem__(self, place: str) -> str:
        return self.texts[place]

    def found_in(self, data: bytes, tokenize: Tokenize | None = None) -> set[str]:
        """Which canary was found in which encoding."""
        needles = [(place, *needle) for place, text in self.texts.items() for needle in patterns(text, tokenize)]
        found: set[str] = set()
        for layer in layers(data):
            folded = layer.lower()
            normal = unicodedata.normalize("NFKC", layer.decode(errors="ignore")).lower().encode()
            for place, encoding, needle in needles:
                exact = encoding.startswith(("base64", "token", "utf-16"))
                if needle in layer or (not exact and (needle.lower() in folded or needle.lower() in normal)):
                    found.add(f"{place}: {encoding}")
        return found


def patterns(text: str, tokenize: Tokenize | None) -> Iterator[tuple[str, bytes]]:
    """Every encoding of every fragment."""
    for start in range(len(text) - FRAGMENT + 1):
        part = text[start : start + FRAGMENT]
        raw = part.encode()
        yield "raw", raw
        yield "reversed", raw[::-1]
        yield "hex", raw.hex().encode()
        yield "url", "".join(f"%{byte:02x}" for byte in raw).encode()
        yield "json", "".join(f"\\u{byte:04x}" for byte in raw).encode()
        yield "utf-16 le", part.encode("utf-16-le")
        yield "utf-16 be", part.encode("utf-16-be")
    for shift in range(3):
        whole = base64.b64encode(b"\0" * shift + text.encode())
        inside = whole[4:-4]  # away from neighbours that share a character
        yield "base64", inside[: 4 * FRAGMENT // 3]
        yield "base64", inside[-(4 * FRAGMENT // 3) :]
    if tokenize is not None:
        yield from token_patterns(tokenize(text))


def token_patterns(ids: Sequence[int]) -> Iterator[tuple[str, bytes]]:
    """Its token ids as decimals and as binary numbers."""
    for separator in (", ", ",", " ", "\n"):
        yield "token decimals", separator.join(map(str, ids)).encode()
    for kind in ("<i", ">i", "<q", ">q"):
        yield f"token {kind}", b"".join(struct.pack(kind, each) for each in ids)


def layers(data: bytes, depth: int = 0) -> Iterator[bytes]:
    """The bytes, and what is compressed in them, as deep as that goes."""
    yield data
    if depth == MAX_DEPTH:
        return
    for magic in PACKED:
        at = data.find(magic)
        while at >= 0:
            if unpacked := _unpacked(data, at, magic):
                yield from layers(unpacked, depth + 1)
            at = data.find(magic, at + 1)


def _unpacked(data: bytes, at: int, magic: bytes) -> bytes:
    """What decompresses from here on; nothing if this is no compressed stream after all."""
    kind, start = (31, at) if magic == PACKED[0] else (15, at)
    if magic == PACKED[-1] and len(data) > at + 30:
        names = struct.unpack_from("<HH", data, at + 26)
        kind, start = -15, at + 30 + sum(names)
    try:
        return zlib.decompressobj(kind).decompress(data[start:], MAX_UNPACKED_BYTES)
    except zlib.error:
        return b""
