from __future__ import annotations

import sys

import pytest
import torch

from fedcompose.adapter import canonical_config, parse_adapter
from fedcompose.bases import Base, base_shapes
from fedcompose.contribution import VerifiedContribution
from fedcompose.errors import MissingError
from fedcompose.model.experts import Expert, Update, make_expert, read_expert
from fedcompose.tensors import canonical_safetensors
from fedcompose_coordinator import static
from fedcompose_coordinator.lessons import Lesson
from fedcompose_coordinator.methods import recipe
from fedcompose_coordinator.training import mean_loss
from fedcompose_coordinator.work import prepare

NAME = "model.layers.0.mlp.up_proj"


def _expert(delta: list[list[float]]) -> Expert:
    """B·A equal to `delta`, by a B that is the identity."""
    a = torch.tensor(delta)
    return Expert("x", {NAME: Update(a, torch.eye(len(a)), 1.0)})


def test_factors_multiply_to_what_was_factored_and_pad_with_zeros() -> None:
    delta = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)) @ torch.randn(2, 9)
    for rank in (2, 8):
        a, b = static.factor(delta, rank)
        assert a.shape == (rank, 9) and b.shape == (6, rank)
        torch.testing.assert_close(b @ a, delta, atol=1e-5, rtol=0)


def test_ties_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half is kept: (5, −3) and (−4, −2); the sign of 5 − 4 wins the first column, so that 5 stays alone."""
    monkeypatch.setitem(static.DENSITY, "ties", 0.5)
    experts = [_expert([[5.0, 1.0], [-3.0, 0.5]]), _expert([[-4.0, 1.0], [-2.0, 0.5]])]

    merged = make_expert("merged", static.merge(experts, "ties", 0)).updates[NAME]

    torch.testing.assert_close(merged.delta(), torch.tensor([[5.0, 0.0], [-2.5, 0.0]]), atol=1e-5, rtol=0)


def test_dare_keeps_the_mean_on_average_and_repeats_with_its_seed() -> None:
    experts = [_expert([[4.0] * 8] * 8), _expert([[2.0] * 8] * 8)]
    drawn = [make_expert("m", static.merge(experts, "dare", seed)).updates[NAME].delta() for seed in range(60)]

    assert abs(float(torch.stack(drawn).mean()) - 3.0) < 0.1
    again = make_expert("m", static.merge(experts, "dare", 0)).updates[NAME].delta()
    assert torch.equal(drawn[0], again) and not torch.equal(drawn[0], drawn[1])


def test_a_merge_is_an_adapter_that_fits_its_base(contributions: list[VerifiedContribution], base: Base) -> None:
    shapes = base_shapes(base)
    merged = static.merge([read_expert(each, shapes) for each in contributions], "ties", 0)

    parsed = parse_adapter(canonical_config(merged), canonical_safetensors(merged.tensors), shapes)
    assert parsed.config.r == 8 and parsed.modules() == merged.modules()  # the sum of two ranks of 4


def test_the_search_finds_a_mixture_that_likes_the_lessons_better(
    contributions: list[VerifiedContribution], lessons: list[Lesson], base: Base
) -> None:
    pytest.importorskip("nevergrad")
    only_alpha = [each for each in lessons if each.domain == "alpha"]
    work = prepare(contributions[:1], only_alpha, base, recipe("lorahub"), 0, "cpu")
    work.model.router.scorer.weights[0].data.zero_()
    without = mean_loss(work, work.rows)

    log = static.search(work, None)

    assert len(log) == static.EVALUATIONS and log[0]["weights"] == [0.0]
    assert float(work.model.router.scorer.weights[0]) > 0.3 and mean_loss(work, work.rows) < without


def test_says_how_to_get_the_search(
    contributions: list[VerifiedContribution], lessons: list[Lesson], base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    work = prepare(contributions, lessons, base, recipe("lorahub"), 0, "cpu")
    with pytest.raises(MissingError) as error:
        static.search(work, None)
    assert error.value.code == "PACKAGE_MISSING" and "lorahub" in str(error.value.fix)
