"""A release as a folder for `fedcompose.vllm_model`: base and attention LoRA merged, experts and router beside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fedcompose.bases import Base, base_shapes
from fedcompose.composition import ROUTER_FILE
from fedcompose.errors import ConfigError
from fedcompose.export import ORIGIN_FILE, origin
from fedcompose.files import new_folder, read_json, write_json
from fedcompose.model.experts import Expert, read_expert
from fedcompose.model.lm import load_base
from fedcompose.model.merged import add_into, attention, check_base
from fedcompose.release import VerifiedRelease
from fedcompose.tensors import parse_safetensors
from fedcompose.vllm_model import ARCHITECTURE, PREFIX, SETTINGS

EXPERTS_FILE = "fedcompose-experts.safetensors"
PARTS = ("gate", "up", "down")
KNOWN = {"scorer": "linear", "granularity": "token", "decides": "block"}
HARD = ("hard", "hard_selected")


def export_vllm(release: VerifiedRelease, base: Base, target: Path) -> None:
    """Write the whole composition for vLLM, in float32.

    Raises: ConfigError: `EXPORT_UNSUPPORTED` for compositions of another kind than the default.
            RefusedError: `BASE_MISMATCH`, `FILE_CHANGED`.
    """
    check_base(release, base)
    shapes = base_shapes(base)
    model, tokenizer = load_base(base.path, torch.float32)
    experts = [read_expert(each, shapes) for each in release.experts]
    _check_kind(release, model.config.model_type, experts)
    for each in attention(release, shapes):
        add_into(model, each)
    layers = model.config.num_hidden_layers
    routers = _routers(release, layers)
    tensors = {
        f"{PREFIX}{layer}.{name}": tensor.contiguous()
        for layer in range(layers)
        for name, tensor in _of_layer(layer, experts, *routers[layer])
    }
    with new_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_file(tensors, folder / EXPERTS_FILE)
        config = read_json(folder / "config.json")
        settings = {"ranks": [_rank(expert) for expert in experts]}
        write_json(folder / "config.json", config | {"architectures": [ARCHITECTURE], SETTINGS: settings})
        write_json(folder / ORIGIN_FILE, origin(release))


def _routers(release: VerifiedRelease, layers: int) -> list[tuple[Tensor, Tensor]]:
    """Weights and bias of every layer, also where one router serves all of them, and zeros where it has no bias."""
    stored = {name: torch.tensor(each.float32()) for name, each in parse_safetensors(release.read(ROUTER_FILE)).items()}
    places = [0] * layers if release.composition["router"]["sharing"] == "model" else range(layers)
    without = torch.zeros(len(release.experts))
    return [(stored[f"weights.{place}"], stored.get(f"biases.{place}", without)) for place in places]


def _of_layer(layer: int, experts: Sequence[Expert], router: Tensor, bias: Tensor) -> list[tuple[str, Tensor]]:
    """The tensors of one layer: all experts' rows one below the other, the scale in B."""
    found = [("router", router.clone()), ("router_bias", bias.clone())]
    for part in PARTS:
        updates = [expert.updates[f"model.layers.{layer}.mlp.{part}_proj"] for expert in experts]
        found.append((f"{part}_a", torch.cat([update.a for update in updates])))
        found.append((f"{part}_b", torch.cat([update.scale * update.b.T for update in updates])))
    return found


def _rank(expert: Expert) -> int:
    return len(next(iter(expert.updates.values())).a)


def _check_kind(release: VerifiedRelease, model_type: str, experts: Sequence[Expert]) -> None:
    router = release.composition["router"]
    named = {name.rpartition(".mlp.")[2] for expert in experts for name in expert.updates}
    same_rank = all(len(update.a) == _rank(expert) for expert in experts for update in expert.updates.values())
    usual = {name: router[name] for name in KNOWN} == KNOWN and router["estimator"] in HARD
    if model_type != "llama" or not usual or named != {f"{part}_proj" for part in PARTS} or not same_rank:
        raise ConfigError(
            "EXPORT_UNSUPPORTED",
            "the model class for vLLM does not know compositions of this kind",
            expected="a Llama, experts on gate, up and down of one rank each, a linear hard router per block",
        )
