from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedcompose.adapter import CONFIG_FILE, parse_config
from fedcompose.bases import Base
from fedcompose.contribution import VerifiedContribution
from fedcompose.errors import ConfigError
from fedcompose.gates import GATES_FILE, read_gates, write_gates
from fedcompose.intervals import paired_difference
from fedcompose.model.controls import NoExpertRouter
from fedcompose.model.experts import Update
from fedcompose.model.lm import prompt_ids
from fedcompose.model.router import Point, RoutingDecision
from fedcompose_coordinator import closed_form
from fedcompose_coordinator.closed_form import Moments, direction, fit, read_moments, ridge
from fedcompose_coordinator.lessons import Lesson, encode
from fedcompose_coordinator.methods import recipe
from fedcompose_coordinator.screening import by_routing
from fedcompose_coordinator.training import mean_loss
from fedcompose_coordinator.work import Work, prepare
from tests.coordinator.letters import admit


def _work(
    method: str, contributions: list[VerifiedContribution], lessons: list[Lesson], base: Base, **settings: object
) -> Work:
    return prepare(contributions, lessons, base, recipe(method, settings), 0, "cpu")


@torch.no_grad()
def _own_share(work: Work) -> float:
    """How many of the tokens of the lessons, prompts included, go to their own domain's expert."""
    right = total = 0
    for row in work.rows:
        with work.recording() as record:
            mean_loss(work, [row])
        (call,) = record.calls
        for decision in call.values():
            right += int((decision.choice == work.owners[row.domain][0]).sum())
            total += decision.choice.numel()
    return right / total


def test_arrow_points_where_the_product_amplifies_most() -> None:
    generator = torch.Generator().manual_seed(0)
    update = Update(torch.randn(4, 12, generator=generator), torch.randn(20, 4, generator=generator), 2.0)

    found = direction(update)

    first = torch.linalg.svd(update.b @ update.a).Vh[0]
    torch.testing.assert_close((found @ first).abs(), torch.tensor(1.0))
    assert found[found.abs().argmax()] > 0
    torch.testing.assert_close(found, direction(Update(-update.a, update.b, 1.0)))


def test_arrow_needs_nothing_but_the_experts(contributions: list[VerifiedContribution], base: Base) -> None:
    work = _work("arrow", contributions, [], base)
    assert fit(work, None) == [] and work.rows == []
    for point, weight in zip(work.model.routing.points, work.model.router.scorer.weights, strict=True):
        assert weight.shape == (2, point.width)
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(2))


def test_arrow_refuses_blocks(contributions: list[VerifiedContribution], base: Base) -> None:
    wanted = recipe("arrow", router={"decides": "block", "sharing": "layer"})
    with pytest.raises(ConfigError) as error:
        fit(prepare(contributions, [], base, wanted, 0, "cpu"), None)
    assert error.value.code == "ROUTER_INVALID"


def test_ridge_is_least_squares_with_every_domain_counted_alike() -> None:
    random = np.random.default_rng(0)
    tokens = [random.normal(size=(50, 6)), random.normal(loc=0.5, size=(200, 6))]
    with_one = [np.hstack([x, np.ones((len(x), 1))]) for x in tokens]
    means = torch.tensor(np.stack([x.mean(0) for x in with_one]))
    gram = torch.tensor(sum(x.T @ x / len(x) for x in with_one) / 2)

    found = ridge(Moments(means, gram), owners=[[1], [0]], experts=2)

    stacked = np.vstack([x / np.sqrt(len(x)) for x in with_one])
    target = np.concatenate([np.full(50, 0.0) / np.sqrt(50), np.full(200, 1.0) / np.sqrt(200)])
    by_hand = np.linalg.lstsq(stacked, target, rcond=None)[0]
    np.testing.assert_allclose(found[0].numpy(), by_hand, atol=0.02)
    torch.testing.assert_close(found.sum(0)[-1], torch.tensor(1.0).double(), atol=0.02, rtol=0)


@pytest.mark.parametrize(("method", "least"), [("ridge", 0.8), ("centroid", 0.6)])
def test_one_reading_of_the_lessons_tells_the_domains_apart(
    method: str, least: float, contributions: list[VerifiedContribution], lessons: list[Lesson], base: Base
) -> None:
    work = _work(method, contributions, lessons, base)
    before = _own_share(work) if method == "ridge" else 0.5
    fit(work, None)
    assert before < 0.8 and _own_share(work) > least


def test_a_prompt_is_sent_to_its_own_expert(
    contributions: list[VerifiedContribution], lessons: list[Lesson], base: Base
) -> None:
    work = _work("prompt", contributions, lessons, base)
    fit(work, None)
    for text, expert in (("aaaaaa", 0), ("bb", 1)):
        ids = torch.tensor([prompt_ids(work.tokenizer, text)])
        embedded = work.model.get_input_embeddings()(ids)
        assert work.model.router.choose(embedded, torch.ones_like(ids)) == [expert]


def test_what_one_site_adds_does_not_depend_on_the_others(
    contributions: list[VerifiedContribution], lessons: list[Lesson], base: Base
) -> None:
    both = read_moments(_work("centroid", contributions, lessons, base))
    alone = read_moments(
        _work("centroid", contributions[1:], [each for each in lessons if each.domain == "beta"], base)
    )
    for together, single in zip(both, alone, strict=True):
        torch.testing.assert_close(together.means[1:], single.means, rtol=0, atol=0)


def test_gates_open_for_their_own_lessons(
    contributions: list[VerifiedContribution], lessons: list[Lesson], base: Base
) -> None:
    work = _work("phatgoose", contributions, lessons, base, steps=12, router_lr=3e-2)
    log = fit(work, None)
    losses = [[line["loss"] for line in log if line["expert"] == each.site] for each in contributions]
    assert all(len(loss) == 12 and loss[-1] < loss[0] for loss in losses)
    assert all(weight.abs().sum() > 0 for weight in work.model.router.scorer.weights)
    assert {p.requires_grad for p in work.model.parameters()} == {False}


def test_padding_is_not_counted(
    contributions: list[VerifiedContribution], base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    lessons = [Lesson("alpha", "a", "A"), Lesson("alpha", "aaaaaaaa", "AAAAAAAA"), Lesson("beta", "b", "B")]
    padded = read_moments(_work("centroid", contributions, lessons, base))
    monkeypatch.setattr(closed_form, "micro_batches", lambda rows: [[row] for row in rows])
    alone = read_moments(_work("centroid", contributions, lessons, base))
    for one, other in zip(padded, alone, strict=True):
        torch.testing.assert_close(one.means, other.means, rtol=0.02, atol=0.02)
        torch.testing.assert_close(one.gram[-1, -1], torch.tensor(1.0).double())


class _Looking(nn.Module):
    """A router that lets nobody speak and adds up what it is shown, standardised as PHATGOOSE does."""

    def __init__(self, points: Sequence[Point]) -> None:
        super().__init__()
        self.sums = {number: torch.zeros(point.width) for number, point in enumerate(points)}
        self.silent = NoExpertRouter(2)

    def forward(self, hidden_states: torch.Tensor, point: int) -> RoutingDecision:
        x = hidden_states.float()
        self.sums[point] += functional.layer_norm(x, x.shape[-1:]).flatten(0, -2).sum(0)
        decision: RoutingDecision = self.silent(hidden_states, point)
        return decision


@torch.no_grad()
def _with_gates(
    contributions: list[VerifiedContribution], lessons: list[Lesson], base: Base, folder: Path, magnet: bool = False
) -> list[VerifiedContribution]:
    """The same experts with gates that open for what the base makes of their own letter and not of the other's.

    With `magnet`, the second one's open for both.
    """
    work = _work("phatgoose", contributions, lessons, base)
    looks = [_Looking(work.model.routing.points) for _ in contributions]
    for row in work.rows:
        with work.model.routing.using(looks[work.owners[row.domain][0]]):
            mean_loss(work, [row])
    made = []
    for number, each in enumerate(contributions):
        target = folder / each.domain
        shutil.copytree(each.path, target)
        sign = 1 if magnet and number == 1 else -1
        gates = {
            point.name: (looks[number].sums[place] + sign * looks[1 - number].sums[place]).numpy()
            for place, point in enumerate(work.model.routing.points)
        }
        (target / GATES_FILE).write_bytes(write_gates(gates))
        made.append(replace(admit(target, each.domain), site=each.site))
    return made


@torch.no_grad()
def _shares(work: Work, lessons: list[Lesson]) -> dict[str, list[list[float]]]:
    """Share of the tokens of each domain by expert, as an evaluation tells it."""
    shares = {}
    for domain in ("alpha", "beta"):
        rows = encode(work.tokenizer, [each for each in lessons if each.domain == domain], [domain])
        with work.recording() as record:
            for row in rows:
                mean_loss(work, [row])
        choices = torch.cat([decision.choice.flatten() for call in record.calls for decision in call.values()])
        shares[domain] = [(torch.bincount(choices, minlength=2) / len(choices)).tolist()]
    return shares


def test_gates_that_sites_shipped_are_taken_as_they_are(
    contributions: list[VerifiedContribution], lessons: list[Lesson], base: Base, tmp_path: Path
) -> None:
    shipped = _with_gates(contributions, lessons, base, tmp_path)
    work = _work("phatgoose-sites", shipped, [], base)
    assert fit(work, None) == [] and work.rows == []
    for point, weight in zip(work.model.routing.points, work.model.router.scorer.weights, strict=True):
        for row, each in enumerate(shipped):
            gates = read_gates(each.read(GATES_FILE), parse_config(each.read(CONFIG_FILE)), None)
            torch.testing.assert_close(weight[row], torch.tensor(gates[point.name]))
    with pytest.raises(ConfigError) as error:
        fit(_work("phatgoose-sites", [shipped[0], contributions[1]], [], base), None)
    assert error.value.code == "GATES_MISSING" and contributions[1].site in error.value.what


def test_a_planted_magnet_is_quarantined_and_honest_gates_are_not(
    contributions: list[VerifiedContribution], lessons: list[Lesson], base: Base, tmp_path: Path
) -> None:
    """Gates along what every prompt looks like win everybody's tokens, however short they are."""
    found = {}
    for name in ("honest", "magnet"):
        shipped = _with_gates(contributions, lessons, base, tmp_path / name, magnet=name == "magnet")
        work = _work("phatgoose-sites", shipped, [], base)
        fit(work, None)
        sites = [each.site for each in shipped]
        domains = [{"name": each.domain, "site": each.site} for each in shipped]
        wrong = paired_difference([0] * 20, [1] * 20).as_dict()  # the other expert writes the other letter
        lost = {"own_expert": {each.domain: wrong for each in shipped}}
        share = _shares(work, lessons)
        found[name] = by_routing(
            {"domains": domains, "routing": {"experts": sites, "share": share}, "difference": lost}
        )
    assert found["honest"] == []
    assert [(each.site, each.code, each.other) for each in found["magnet"]] == [
        (contributions[1].site, "MAGNET", "alpha")
    ]
