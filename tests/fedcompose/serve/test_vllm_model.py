"""The folder for vLLM, and the arithmetic of its model class against ours, with a stand-in for vLLM's own parts.

Whether vLLM itself gives the same tokens is for `tests/interop/test_vllm.py`, in an environment that has vLLM.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedcompose.errors import ConfigError
from fedcompose.model.composed import load_release
from fedcompose.model.for_vllm import EXPERTS_FILE, export_vllm
from fedcompose.release import VerifiedRelease
from fedcompose.routing import RouterConfig
from tests.federation_sim import FederationSim, make_federation


@pytest.fixture(params=[RouterConfig(), RouterConfig(sharing="layer", bias=True)], ids=["shared", "guided"])
def release(
    request: pytest.FixtureRequest, tiny_base: Path, talking_experts: dict[str, Path], tmp_path: Path
) -> VerifiedRelease:
    """The same experts under either kind of router that the model class knows."""
    return make_federation(tmp_path / "federation", tiny_base, talking_experts).released(request.param)


@pytest.fixture
def folder(release: VerifiedRelease, talking_sim: FederationSim, tmp_path: Path) -> Path:
    export_vllm(release, talking_sim.base, tmp_path / "out")
    return tmp_path / "out"


def test_the_folder_holds_base_experts_and_router(folder: Path, release: VerifiedRelease) -> None:
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / EXPERTS_FILE)

    assert config["architectures"] == ["FedcomposeLlamaForCausalLM"]
    assert config["fedcompose"] == {"ranks": [4, 4]}
    assert {name.split(".")[1] for name in tensors} == {"0", "1"}
    assert len(tensors) == 2 * 8
    assert json.loads((folder / "origin.json").read_text())["release"] == release.dir_hash


def test_its_tensors_compute_what_our_mlp_computes(
    folder: Path, release: VerifiedRelease, talking_sim: FederationSim
) -> None:
    composed, _ = load_release(release, torch.float32, talking_sim.base)
    base, tensors = load_file(folder / "model.safetensors"), load_file(folder / EXPERTS_FILE)
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    owners = torch.arange(2).repeat_interleave(4)
    for layer in range(2):
        own = {name.removeprefix(f"fedcompose.{layer}."): tensor for name, tensor in tensors.items()}
        choice = torch.nn.functional.linear(x, own["router"], own["router_bias"]).argmax(-1)
        chosen = (choice[:, None] == owners).float()
        assert set(choice.tolist()) == {0, 1}, "one expert alone would not test it"

        def part(name: str, given: torch.Tensor, layer=layer, own=own, chosen=chosen) -> torch.Tensor:
            weight = base[f"model.layers.{layer}.mlp.{name}_proj.weight"]
            return given @ weight.T + ((given @ own[f"{name}_a"].T) * chosen) @ own[f"{name}_b"]

        made = part("down", torch.nn.functional.silu(part("gate", x)) * part("up", x))
        torch.testing.assert_close(made, composed.model.layers[layer].mlp(x[None])[0], rtol=1e-4, atol=1e-4)


def test_a_composition_of_another_kind_is_refused(
    release: VerifiedRelease, talking_sim: FederationSim, tmp_path: Path
) -> None:
    router = release.composition["router"] | {"estimator": "soft"}
    other = dataclasses.replace(release, composition=dict(release.composition) | {"router": router})
    with pytest.raises(ConfigError) as caught:
        export_vllm(other, talking_sim.base, tmp_path / "out")
    assert caught.value.code == "EXPORT_UNSUPPORTED"
