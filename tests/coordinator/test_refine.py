from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedcompose.bases import Base, base_shapes
from fedcompose.contribution import VerifiedContribution
from fedcompose.errors import ConfigError
from fedcompose.files import folder_digests, read_json
from fedcompose.model.composed import assemble
from fedcompose.model.experts import load_expert, read_expert
from fedcompose.model.lm import load_base
from fedcompose.routing import RouterConfig
from fedcompose_coordinator.bench import ModelBench
from fedcompose_coordinator.compose import compose
from fedcompose_coordinator.grid import Method
from fedcompose_coordinator.lessons import Lesson, encode
from fedcompose_coordinator.membership import mask
from fedcompose_coordinator.methods import ComposeSettings, recipe
from fedcompose_coordinator.refine import refine
from fedcompose_coordinator.work import prepare
from tests.federation_sim import FederationSim

SETTINGS: dict[str, Any] = {"steps": 1, "batch": 4, "expert_steps": 4, "expert_lr": 1e-2}


def _distance(
    base: Base, contributions: list[VerifiedContribution], lessons: list[Lesson], **settings: Any
) -> tuple[float, Any]:
    """How far the copies went from what was shipped, and the model that they were trained in."""
    model, tokenizer = load_base(base.path)
    shipped = [read_expert(each, base_shapes(base)) for each in contributions]
    rows = encode(tokenizer, lessons, [each.domain for each in contributions])
    own = [[row for row in rows if row.domain == index] for index in range(len(shipped))]
    wanted = ComposeSettings(**{**SETTINGS, **settings})
    copies = refine(model, shipped, own, tokenizer.pad_token_id, wanted, 0)
    moved = [
        (getattr(copy.updates[name], part) - getattr(was.updates[name], part)).square().sum()
        for was, copy in zip(shipped, copies, strict=True) for name in was.updates for part in "ab"
    ]  # fmt: skip
    return float(sum(moved)), model


def test_copies_learn_and_the_price_of_leaving_holds_them(
    base: Base, contributions: list[VerifiedContribution], lessons: list[Lesson]
) -> None:
    """They are shown the other one's letters, which they have to change for."""
    swapped = [
        Lesson({"alpha": "beta", "beta": "alpha"}[each.domain], each.prompt, each.completion) for each in lessons
    ]
    free, model = _distance(base, contributions, swapped, preserve=0.0)
    held, _ = _distance(base, contributions, swapped, preserve=1e4)

    assert free > 1e-3 and held < 0.5 * free
    assert type(model.get_submodule("model.layers.0.mlp.up_proj")) is torch.nn.Linear


def test_a_candidate_with_trained_copies_says_so_carries_them_and_uses_them(
    base: Base, contributions: list[VerifiedContribution], lessons: list[Lesson], tmp_path: Path
) -> None:
    shipped, out = [each.path for each in contributions], tmp_path / "candidate"
    before = [folder_digests(folder) for folder in shipped]

    composition = compose(contributions, lessons, base, recipe("lora-mixer", SETTINGS), 0, out)

    assert composition["changed"] is True and [folder_digests(folder) for folder in shipped] == before
    copies = [out / "changed" / each.site for each in contributions]
    work = prepare(contributions, lessons, base, recipe("lora-mixer", SETTINGS), 0, "cpu")
    for folder, expert in zip(copies, work.experts, strict=True):
        again = load_expert(folder, base_shapes(base))
        for name, update in expert.updates.items():
            torch.testing.assert_close(again.updates[name].delta(), update.delta())
    bench = ModelBench({each.site: each.path for each in contributions}, base)
    config = RouterConfig.model_validate(composition["router"])
    ids = torch.tensor([[3, 70, 71, 72]])
    with torch.no_grad():
        measured = bench.become(Method("learned", "", out))(ids).logits
        changed, unchanged = (assemble(base, folders, out, config)[0](ids).logits for folders in (copies, shipped))
    assert torch.equal(measured, changed) and not torch.equal(measured, unchanged)

    mask(out, contributions[0].site)
    assert not copies[0].exists() and copies[1].exists()


def test_trained_copies_are_never_released(sim: FederationSim, tmp_path: Path) -> None:
    for site in sim.sites:
        sim.contribute(site)
    sim.receive()
    lessons = [Lesson(site.domain, "hi", "ho") for site in sim.sites.values()]
    candidate = sim.coordinator_home / "candidate"
    compose(sim.admitted(), lessons, sim.base, recipe("lora-mixer", SETTINGS), 0, candidate)
    assert read_json(candidate / "composition.json")["changed"]
    with pytest.raises(ConfigError) as error:
        sim.release()
    assert error.value.code == "CANDIDATE_CHANGED"
