"""Safetensors, by a reader stricter than the library's, and in one canonical form.

No tensor library is needed: tensors stay bytes with a type and a shape, and numpy looks at their values.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from fedcompose.errors import RefusedError
from fedcompose.files import READ_CHUNK_BYTES, parse_json

MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 4096
MAX_NAME_CHARS = 256
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as it lies in the file: `dtype` is F32, F16 or BF16, `data` its little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def float32(self) -> NDArray[np.float32]:
        """The values."""
        return _float32(self.dtype, self.data).reshape(self.shape)


class Readable(Protocol):
    """What the weights are read from: `read` gives as many bytes as asked for, unless they end before."""

    def read(self, size: int, /) -> bytes: ...


def parse_safetensors(data: bytes) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file held in memory, by a reader stricter than the library's.

    Raises: RefusedError: `SAFETENSORS_INVALID`, before any size in the header is trusted.
    """
    stream = io.BytesIO(data)
    layouts = read_header(stream, len(data))
    body = memoryview(data)[stream.tell() :]
    return {each.name: StoredTensor(each.dtype, each.shape, body[each.begin : each.end]) for each in layouts}


def canonical_safetensors(tensors: Mapping[str, StoredTensor]) -> bytes:
    """A safetensors file with metadata `{"format": "pt"}`; wide types first for alignment, then by name."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    parts: list[memoryview] = []
    for name in sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name].dtype], name)):
        tensor = tensors[name]
        end = position + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        parts.append(tensor.data)
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def _invalid(reason: str) -> NoReturn:
    raise RefusedError("SAFETENSORS_INVALID", "a file of weights is not acceptable", got=reason)


class Layout(NamedTuple):
    """Where one tensor lies in the file's data."""

    name: str
    begin: int
    end: int
    dtype: str
    shape: tuple[int, ...]


def read_header(stream: Readable, file_bytes: int) -> list[Layout]:
    """The layout of a safetensors file of this size, in the order of the data, which begins where reading stopped."""
    length = stream.read(8)
    header_bytes = int.from_bytes(length, "little")
    if len(length) < 8 or header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
        _invalid("the header is missing, truncated or too large")
    text = stream.read(header_bytes)
    if len(text) != header_bytes or text[:1] != b"{":
        _invalid("the header is truncated or no JSON object")
    header = parse_json(text, "the header of a file of weights")
    if header.pop("__metadata__", {"format": "pt"}) != {"format": "pt"}:
        _invalid("metadata other than the format")
    if not 1 <= len(header) <= MAX_TENSORS:
        _invalid(f"{len(header)} tensors")
    layouts = sorted((_layout(name, value) for name, value in header.items()), key=lambda layout: layout.begin)
    position = 0
    for layout in layouts:
        if layout.begin != position:
            _invalid("tensors overlap or leave a hole")
        if (8 + header_bytes + position) % ITEM_BYTES[layout.dtype]:
            _invalid("a tensor that is not aligned")
        position = layout.end
    if position != file_bytes - 8 - header_bytes:
        _invalid("the data is shorter or longer than the header says")
    return layouts


def _layout(name: str, value: Any) -> Layout:
    """One header entry, its size checked against its shape."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"} or len(name) > MAX_NAME_CHARS:
        _invalid("a header entry with other fields")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in ("F32", "F16", "BF16"):
        _invalid(f"type {str(dtype)[:16]!a}; F32, F16 and BF16 are known")
    if not _numbers(shape, 1) or len(shape) not in (1, 2) or not _numbers(offsets, 0) or len(offsets) != 2:
        _invalid("a shape or an offset that is not one")
    if offsets[1] - offsets[0] != math.prod(shape) * ITEM_BYTES[dtype]:
        _invalid("a tensor's size differs from its shape")
    return Layout(name, offsets[0], offsets[1], dtype, tuple(shape))


def _numbers(values: Any, least: int) -> bool:
    return isinstance(values, list) and all(type(value) is int and least <= value < 1 << 40 for value in values)


def read_norm(stream: Readable, layout: Layout) -> float:
    """Read the next tensor in pieces: its Frobenius norm, if every value is finite."""
    remaining, squares = layout.end - layout.begin, 0.0
    while remaining:
        piece = stream.read(min(remaining, READ_CHUNK_BYTES))
        if not piece or len(piece) % ITEM_BYTES[layout.dtype]:
            _invalid("the data ended while it was read")
        remaining -= len(piece)
        values = _float32(layout.dtype, piece)
        with np.errstate(over="ignore", invalid="ignore"):
            square = float(values @ values)  # not finite if any value is not
        if not math.isfinite(square) and not np.isfinite(values).all():
            raise RefusedError("ADAPTER_NOT_FINITE", f"the tensor {layout.name!a} holds NaN or infinity")
        squares += square
    return math.sqrt(squares)


def _float32(dtype: str, data: bytes | memoryview) -> NDArray[np.float32]:
    """Stored values; bfloat16 is float32 without its lower half."""
    if dtype == "BF16":
        bits = np.frombuffer(data, dtype="<u2").astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return np.frombuffer(data, dtype="<f4" if dtype == "F32" else "<f2").astype(np.float32, copy=False)
