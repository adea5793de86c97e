"""Routers that learn nothing do as they say."""

from __future__ import annotations

import pytest
import torch

from fedcompose.model.controls import (
    FixedRouter,
    NoExpertRouter,
    RandomRouter,
    SequenceRouter,
    StaticRouter,
    UniformRouter,
)
from fedcompose.model.router import NO_EXPERT

HIDDEN = torch.randn(2, 3, 8)


def test_a_random_router_is_uniform_and_repeats_with_its_seed() -> None:
    hidden = torch.zeros(1, 6000, 8)
    first, again, other = (RandomRouter(3, seed)(hidden, 0) for seed in (0, 0, 1))

    assert torch.equal(first.choice, again.choice) and not torch.equal(first.choice, other.choice)
    assert (first.weights.mean((0, 1)) - 1 / 3).abs().max() < 0.03


def test_one_expert_for_all_or_one_for_each_row() -> None:
    assert FixedRouter(1, 3)(HIDDEN, 0).weights.unique(dim=1).tolist() == [[[0, 1, 0]], [[0, 1, 0]]]
    assert SequenceRouter([2, 0], 3)(HIDDEN, 0).choice.tolist() == [[2] * 3, [0] * 3]
    with pytest.raises(ValueError, match="2 experts"):
        SequenceRouter([2, 0], 3)(HIDDEN[:1], 0)


def test_static_weights_are_given_to_every_token_and_choose_nobody() -> None:
    for router, weights in (
        (StaticRouter([0.5, -2.0]), [0.5, -2.0]),
        (UniformRouter(4), [0.25] * 4),
        (NoExpertRouter(2), [0, 0]),
    ):
        decision = router(HIDDEN, 0)
        assert decision.weights.flatten(0, 1).tolist() == [weights] * 6
        assert decision.choice.unique().tolist() == [NO_EXPERT] and not decision.hard
