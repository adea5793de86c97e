"""Attacks by `adapter_model.safetensors`: its header, its layout, its tensors' names, shapes and values. Signed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fedcompose.gates import GATES_FILE
from fedcompose.tensors import MAX_TENSORS, StoredTensor, canonical_safetensors
from tests.attacks.attack import Cases, Change, Folder, Mutation, tensor, with_signed_file, with_tensors

WEIGHTS = "adapter_model.safetensors"
MODULE = "base_model.model.model.layers.0.mlp.up_proj"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"
LINEARS = [f"model.layers.{n}.mlp.{part}_proj" for n in range(2) for part in ("gate", "up", "down")]
WIDTHS = {name: 64 if "down" in name else 32 for name in LINEARS}
ONE = b"\x00\x00\x80\x3f"
NAN, INFINITY, HUGE, BEYOND = b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\x00\x00\x80\x4b", b"\xff\xff\x7f\x7f"


def gates(tensors: dict[str, StoredTensor]) -> Mutation:
    """These gates beside the expert."""
    return with_signed_file(GATES_FILE, canonical_safetensors(tensors))


def file_of(header: str | bytes | dict[str, Any], body: bytes = b"") -> bytes:
    """A safetensors file with this header, padded as the format asks for."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def split(data: bytes) -> tuple[bytes, bytes]:
    size = int.from_bytes(data[:8], "little")
    return data[8 : 8 + size], data[8 + size :]


def header(change: Change) -> Mutation:
    """The site's own tensors under another header."""

    def mutate(attack: Folder) -> None:
        text, body = split(attack.path(WEIGHTS).read_bytes())
        document = json.loads(text)
        change(document)
        attack.path(WEIGHTS).write_bytes(file_of(document, body))
        attack.sign()

    return mutate


def header_text(change: Callable[[bytes], bytes]) -> Mutation:
    """... that a JSON library would not write."""

    def mutate(attack: Folder) -> None:
        text, body = split(attack.path(WEIGHTS).read_bytes())
        changed = change(text)
        assert changed != text
        attack.path(WEIGHTS).write_bytes(file_of(changed, body))
        attack.sign()

    return mutate


def whole(change: Callable[[bytes], bytes]) -> Mutation:
    def mutate(attack: Folder) -> None:
        attack.rewrite(WEIGHTS, change)
        attack.sign()

    return mutate


def is_(data: bytes) -> Mutation:
    return with_signed_file(WEIGHTS, data)


def entry(begin: int, end: int, shape: list[Any], dtype: str = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def one(body: bytes = bytes(4), **fields: Any) -> Mutation:
    """A file of one number, all of it in order but for `fields`."""
    return is_(file_of({"a": entry(0, 4, [1]) | fields}, body))


def also(name: str, shape: tuple[int, ...] = (4, 32)) -> Mutation:
    return with_tensors(lambda tensors: tensors.update({name: tensor(shape)}))


def filled(name: str, value: bytes, dtype: str = "F32") -> Mutation:
    def change(tensors: dict[str, StoredTensor]) -> None:
        tensors[name] = tensor(tensors[name].shape, value, dtype)

    return with_tensors(change)


def one_infinite_value(attack: Folder) -> None:
    """Only the very last number of the file."""
    attack.rewrite(WEIGHTS, lambda data: data[:-4] + INFINITY)
    attack.sign()


def shifted(attack: Folder) -> None:
    """A header of odd length, after which no number lies where a machine expects one."""
    text, body = split(attack.path(WEIGHTS).read_bytes())
    text = text.rstrip() + b" " * (-len(text.rstrip()) % 8 + 1)
    attack.path(WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + body)
    attack.sign()


FILE: Cases = {
    "weights-pickle": (is_(b"\x80\x04K\x01."), "SAFETENSORS_INVALID"),
    "weights-zip": (is_(b"PK\x03\x04" + bytes(100)), "SAFETENSORS_INVALID"),
    "weights-empty": (is_(b""), "SAFETENSORS_INVALID"),
    "weights-header-only-announced": (is_((1 << 62).to_bytes(8, "little") + b"{}"), "SAFETENSORS_INVALID"),
    "weights-header-cut": (whole(lambda data: data[:64]), "SAFETENSORS_INVALID"),
    "weights-header-over-the-limit": (is_(file_of(b"{" + b" " * (1 << 20) + b"}")), "SAFETENSORS_INVALID"),
    "weights-no-tensor": (is_(file_of("{}")), "SAFETENSORS_INVALID"),
    "weights-many-tensors": (
        is_(file_of({str(n): entry(0, 0, [0]) for n in range(MAX_TENSORS + 1)})),
        "SAFETENSORS_INVALID",
    ),
    "weights-byte-order-mark": (header_text(lambda text: b"\xef\xbb\xbf" + text), "SAFETENSORS_INVALID"),
    "weights-leading-space": (header_text(lambda text: b" " + text), "SAFETENSORS_INVALID"),
    "weights-header-list": (header_text(lambda text: b"[" + text + b"]"), "SAFETENSORS_INVALID"),
    "weights-deep": (is_(file_of('{"a":' + "[" * 9999 + "]" * 9999 + "}")), "JSON_INVALID"),
    "weights-tensor-twice": (
        header_text(lambda text: text.rstrip()[:-1] + b"," + text[text.index(b'"base_model') :].rstrip()[:-1] + b"}"),
        "JSON_INVALID",
    ),
    "weights-metadata-twice": (
        header_text(lambda text: text.replace(b'{"format":"pt"}', b'{"format":"pt","format":"pt"}')),
        "JSON_INVALID",
    ),
    "weights-nan-in-header": (header_text(lambda text: text.replace(b"[0,", b"[NaN,", 1)), "JSON_INVALID"),
    "weights-metadata": (header(lambda h: h["__metadata__"].update(note="x" * 1000)), "SAFETENSORS_INVALID"),
    "weights-metadata-large": (
        header(lambda h: h["__metadata__"].update(note="x" * (5 << 20))),
        "SAFETENSORS_INVALID",
    ),
    "weights-unknown-field": (one(note="x"), "SAFETENSORS_INVALID"),
    "weights-entry-no-object": (is_(file_of({"a": [0, 4]}, bytes(4))), "SAFETENSORS_INVALID"),
    "weights-type-unknown": (one(dtype="I64", shape=[1], data_offsets=[0, 8], body=bytes(8)), "SAFETENSORS_INVALID"),
    "weights-type-no-text": (one(dtype=["F32"]), "SAFETENSORS_INVALID"),
    "weights-overlap": (
        is_(file_of({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12))),
        "SAFETENSORS_INVALID",
    ),
    "weights-alias": (
        is_(file_of({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, bytes(4))),
        "SAFETENSORS_INVALID",
    ),
    "weights-hole": (
        is_(file_of({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12))),
        "SAFETENSORS_INVALID",
    ),
    "weights-trailing-bytes": (whole(lambda data: data + b"payload!"), "SAFETENSORS_INVALID"),
    "weights-cut": (whole(lambda data: data[:-4]), "SAFETENSORS_INVALID"),
    "weights-size-and-shape": (one(shape=[2]), "SAFETENSORS_INVALID"),
    "weights-offset-negative": (one(data_offsets=[-4, 0]), "SAFETENSORS_INVALID"),
    "weights-offset-beyond-64-bits": (one(data_offsets=[0, 1 << 64], shape=[1 << 62]), "SAFETENSORS_INVALID"),
    "weights-shape-negative": (one(shape=[-1, -1]), "SAFETENSORS_INVALID"),
    "weights-shape-overflow": (one(shape=[1 << 33, 1 << 33]), "SAFETENSORS_INVALID"),
    "weights-shape-empty-and-huge": (one(shape=[0, 1 << 39], data_offsets=[0, 0], body=b""), "SAFETENSORS_INVALID"),
    "weights-shape-of-truth": (one(shape=[True]), "SAFETENSORS_INVALID"),
    "weights-shape-of-fractions": (one(shape=[1.0]), "SAFETENSORS_INVALID"),
    "weights-shape-of-nothing": (one(shape=[]), "SAFETENSORS_INVALID"),
    "weights-shape-of-three": (one(shape=[1, 1, 1]), "SAFETENSORS_INVALID"),
    "weights-misaligned": (shifted, "SAFETENSORS_INVALID"),
}

TENSORS: Cases = {
    "tensor-embedding": (also("base_model.model.model.embed_tokens.weight", (259, 32)), "ADAPTER_TENSORS"),
    "tensor-base-layer": (also(f"{MODULE}.base_layer.weight", (64, 32)), "ADAPTER_TENSORS"),
    "tensor-head": (also("base_model.model.lm_head.weight", (259, 32)), "ADAPTER_TENSORS"),
    "tensor-saved-module": (also("base_model.model.lm_head.modules_to_save.weight", (259, 32)), "ADAPTER_TENSORS"),
    "tensor-dora": (also(f"{MODULE}.lora_magnitude_vector.weight", (1, 64)), "ADAPTER_TENSORS"),
    "tensor-bias": (also(f"{MODULE}.lora_B.bias", (1, 64)), "ADAPTER_TENSORS"),
    "tensor-other-module": (also(A.replace("up_proj", "q_proj")), "ADAPTER_TENSORS"),
    "tensor-layer-that-is-not": (also(A.replace("layers.0", "layers.9")), "ADAPTER_TENSORS"),
    "tensor-case-twin": (also(A.replace("up_proj", "UP_PROJ")), "ADAPTER_TENSORS"),
    "tensor-path": (also(A.replace("up_proj", "../up_proj")), "ADAPTER_TENSORS"),
    "tensor-nul": (also(A.replace("up_proj", "up\0proj")), "ADAPTER_TENSORS"),
    "tensor-name-with-an-escape": (also(A.replace("up_proj", "\x1b[2J")), "ADAPTER_TENSORS"),
    "tensor-name-endless": (also(A.replace("up_proj", "x" * 300)), "SAFETENSORS_INVALID"),
    "tensor-missing": (with_tensors(lambda t: t.pop(A)), "ADAPTER_TENSORS"),
    "tensor-shape": (with_tensors(lambda t: t.update({A: tensor((4, 33))})), "ADAPTER_TENSORS"),
    "tensor-rank": (with_tensors(lambda t: t.update({A: tensor((5, 32))})), "ADAPTER_TENSORS"),
    "tensor-flat": (with_tensors(lambda t: t.update({A: tensor((128,))})), "ADAPTER_TENSORS"),
    "tensor-nan": (filled(A, NAN), "ADAPTER_NOT_FINITE"),
    "tensor-infinite": (filled(B, INFINITY), "ADAPTER_NOT_FINITE"),
    "tensor-infinite-once": (one_infinite_value, "ADAPTER_NOT_FINITE"),
    "tensor-infinite-half": (filled(A, b"\x00\x7c", "F16"), "ADAPTER_NOT_FINITE"),
    "tensor-nan-bfloat16": (filled(A, b"\xc0\x7f", "BF16"), "ADAPTER_NOT_FINITE"),
    "tensor-huge": (filled(A, HUGE), "ADAPTER_TOO_STRONG"),
    "tensor-square-overflows": (filled(A, BEYOND), "ADAPTER_TOO_STRONG"),
    "gates-not-tensors": (with_signed_file(GATES_FILE, b"x" * 64), "SAFETENSORS_INVALID"),
    "gates-for-other-linears": (gates({"model.layers.0.self_attn.q_proj": tensor((32,), ONE)}), "GATES_INVALID"),
    "gates-for-some-linears": (gates({"model.layers.0.mlp.up_proj": tensor((32,), ONE)}), "GATES_INVALID"),
    "gates-too-wide": (gates({name: tensor((65,), ONE) for name in LINEARS}), "GATES_INVALID"),
    "gates-of-matrices": (gates({name: tensor((1, 32), ONE) for name in LINEARS}), "GATES_INVALID"),
    "gates-not-finite": (gates({name: tensor((WIDTHS[name],), NAN) for name in LINEARS}), "GATES_INVALID"),
    "gates-of-zeros": (gates({name: tensor((WIDTHS[name],)) for name in LINEARS}), "GATES_INVALID"),
}
