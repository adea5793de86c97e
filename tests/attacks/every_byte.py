"""A small federation whose every signed byte can be changed in turn: one site, the smallest expert, one release."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fedcompose.adapter import CONFIG_FILE, WEIGHTS_FILE, tensor_name
from fedcompose.tensors import StoredTensor, canonical_safetensors
from tests.federation_sim import FederationSim, make_federation


def small_expert(folder: Path, module: str, out: int, into: int, rank: int) -> Path:
    """A LoRA on one module of the tiny base, as a trainer leaves it."""
    random = np.random.default_rng(0)
    tensors = {}
    for side, shape in (("A", (rank, into)), ("B", (out, rank))):
        values = random.normal(scale=0.01, size=shape).astype("<f4")
        tensors[tensor_name(module, side)] = StoredTensor("F32", shape, memoryview(values.tobytes()))
    folder.mkdir(parents=True)
    (folder / WEIGHTS_FILE).write_bytes(canonical_safetensors(tensors))
    target = module.removeprefix("model.")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": [target]}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return folder


def small_experts(folder: Path) -> dict[str, Path]:
    """The smallest LoRAs that the tiny base can have: one module each."""
    return {
        "site-a": small_expert(folder / "experts" / "site-a", "model.layers.0.mlp.up_proj", 64, 32, 1),
        "attention": small_expert(folder / "experts" / "attention", "model.layers.0.self_attn.q_proj", 32, 32, 4),
    }


def small_federation(folder: Path, base: Path) -> FederationSim:
    """Everything from the key to the release, of one site with one module."""
    sim = make_federation(folder, base, small_experts(folder), {"site-a": "clock"})
    sim.released()
    return sim


def changes(data: bytes, position: int) -> Iterator[bytes]:
    """This byte with one bit flipped, and this byte as another."""
    for other in (data[position] ^ 1 << position % 8, 0x20 if data[position] != 0x20 else 0x30):
        yield data[:position] + bytes([other]) + data[position + 1 :]
