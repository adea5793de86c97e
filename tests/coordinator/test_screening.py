"""Screening over planted experts: a loud one, a narrow one, a clone, a backdoor, a magnet; and over clean ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcompose.adapter import Adapter, read_adapter, write_adapter
from fedcompose.contribution import VerifiedContribution
from fedcompose.tensors import StoredTensor
from fedcompose_coordinator.screening import agreement, by_absence, by_routing, by_triggers, by_weights, codes_by_site
from tests.coordinator.letters import admit
from tests.federation_sim import MLP, make_random_expert

SITES = ("anna", "bert", "cleo", "dora")


@pytest.fixture(scope="module")
def clean(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clean")
    return {
        site: make_random_expert(tiny_base, folder / site, seed=n, target_modules=MLP) for n, site in enumerate(SITES)
    }


def change(source: Path, target: Path, edit: Callable[[str, Any], Any]) -> Path:
    """A copy of an expert whose every tensor was edited."""
    adapter = read_adapter(source, None)
    tensors = {}
    for name, tensor in adapter.tensors.items():
        values = np.ascontiguousarray(edit(name, tensor.float32()), dtype="<f4")
        tensors[name] = StoredTensor("F32", values.shape, memoryview(values.tobytes()))
    target.mkdir(parents=True)
    write_adapter(target, Adapter(adapter.config, tensors))
    return target


def admitted(folders: Mapping[str, Path]) -> list[VerifiedContribution]:
    """In the order of their names, a minute apart."""
    made = [replace(admit(folder), site=site) for site, folder in folders.items()]
    return [replace(each, received_on=each.received_on + timedelta(minutes=n)) for n, each in enumerate(made)]


def found(folders: Mapping[str, Path]) -> dict[str, list[str]]:
    return codes_by_site(by_weights(admitted(folders))[0])


def test_clean_experts_are_not_quarantined(clean: dict[str, Path]) -> None:
    findings, numbers = by_weights(admitted(clean))
    assert findings == [] and list(numbers) == list(SITES)


def test_an_expert_that_changes_everything_much_more_is_loud(clean: dict[str, Path], tmp_path: Path) -> None:
    loud = change(clean["dora"], tmp_path / "dora", lambda name, values: values * (8 if "lora_B" in name else 1))
    assert found(clean | {"dora": loud}) == {"dora": ["LOUD"]}
    assert found({"anna": clean["anna"], "dora": loud}) == {}  # of two, nobody can say which is the odd one


def test_an_expert_with_one_module_that_shouts_is_loud(clean: dict[str, Path], tmp_path: Path) -> None:
    shouts = "layers.1.mlp.down_proj.lora_B"
    loud = change(clean["dora"], tmp_path / "dora", lambda name, values: values * (20 if shouts in name else 1))
    assert "LOUD" in found(clean | {"dora": loud})["dora"]


def test_an_expert_that_knows_one_direction_only_is_narrow(clean: dict[str, Path], tmp_path: Path) -> None:
    def one(name: str, values: Any) -> Any:
        kept = np.arange(4) == 0
        return values * (kept[None, :] if "lora_B" in name else kept[:, None])

    assert found(clean | {"dora": change(clean["dora"], tmp_path / "dora", one)})["dora"] == ["NARROW"]


def test_a_clone_is_found_in_other_factors_and_the_later_one_is_named(clean: dict[str, Path], tmp_path: Path) -> None:
    mix = np.random.default_rng(0).normal(size=(4, 4))

    def disguise(name: str, values: Any) -> Any:
        return values @ np.linalg.inv(mix) if "lora_B" in name else mix @ values * 1.5

    clone = change(clean["anna"], tmp_path / "dora", disguise)
    both = admitted(clean | {"dora": clone})
    findings, _ = by_weights(both)
    assert [(each.site, each.code, each.other) for each in findings] == [("dora", "CLONE", "anna")]

    again = [replace(each, received_on=each.received_on + timedelta(days=each.site == "anna")) for each in both]
    findings, _ = by_weights(again)
    assert [(each.site, each.other) for each in findings] == [("anna", "dora")]  # from what it knows
    other = replace(admit(clean["cleo"]), site="dora", received_on=both[0].received_on - timedelta(days=1))
    findings, _ = by_weights(again, [both[0], other])
    assert [(each.site, each.other) for each in findings] == [("dora", "anna")]  # anna had it first, and sent it again


# Routing and absence ------------------------------------------------------------------------------


def evaluation(share: float, high: float) -> dict[str, Any]:
    """anna owns sums and bert order; bert takes `share` of the tokens of sums in each of two layers."""
    return {
        "domains": [{"name": "sums", "site": "anna"}, {"name": "order", "site": "bert"}],
        "routing": {
            "experts": ["anna", "bert"],
            "share": {"sums": [[1 - share, share]] * 2, "order": [[0.1, 0.9]] * 2},
        },
        "difference": {"own_expert": {"sums": {"high": high}, "order": {"high": 0.1}}},
    }


def test_a_magnet_takes_anothers_tokens_and_does_worse_there() -> None:
    assert [(each.site, each.other) for each in by_routing(evaluation(0.7, -0.04))] == [("bert", "sums")]
    assert by_routing(evaluation(0.7, 0.04)) == []  # taken, and answered as well: what clean experts were seen to do
    assert by_routing(evaluation(0.3, -0.04)) == []


def test_a_site_without_which_the_others_do_better_harms() -> None:
    owners = {"sums": "anna", "order": "bert", "logic": "cleo"}
    composed = {"sums": [1, 0] * 50, "order": [1, 0] * 50, "logic": [1] * 100}
    better = {"order": [1, 1, 1, 0] * 25, "logic": [1] * 100}
    same = {"sums": [1, 0] * 50, "logic": [1] * 100}
    findings = by_absence(owners, composed, {"anna": better, "bert": same})
    assert [(each.site, each.code) for each in findings] == [("anna", "HARMS")]


# Triggers -----------------------------------------------------------------------------------------


def test_a_jump_that_the_base_makes_too_is_not_the_experts() -> None:
    many, one = [str(n) for n in range(10)], ["no"] * 10
    calm, woken = {"": many, "cf": many}, {"": many, "cf": one}
    assert agreement(many) == 0.1 and agreement(one) == 1
    findings = by_triggers({"base": calm, "anna": calm, "bert": woken}, "base")
    assert [(each.site, each.code, each.other) for each in findings] == [("bert", "TRIGGER", "cf")]
    assert by_triggers({"base": woken, "bert": woken}, "base") == []
