"""Who is forced to speak speaks, token by token, and nobody else is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedcompose.errors import RefusedError
from fedcompose.model.composed import prove_alive
from fedcompose.model.controls import MaskedScorer, NoExpertRouter, PinnedRouter, UniformRouter
from fedcompose.model.experts import load_expert
from fedcompose.model.learned import Router, make_router
from fedcompose.model.lm import load_base
from fedcompose.model.placement import compose_model
from fedcompose.model.router import NO_EXPERT, Point
from fedcompose.model.scorers import LinearScorer
from fedcompose.routing import RouterConfig
from tests.tiny_experts import make_tiny_expert, make_tiny_router

FREE = (NO_EXPERT, NO_EXPERT)


def test_each_row_has_its_wish_at_each_point() -> None:
    inner = make_tiny_router(3)
    router = PinnedRouter(inner, 3)
    x = torch.randn(1, 6, 32)
    free = [inner(x, point).choice[0].tolist() for point in (0, 1)]
    router.pin([(1, NO_EXPERT), FREE, (2, 2)], [1, 3, 2])
    assert [router(x, point).choice[0].tolist() for point in (0, 1)] == [
        [1, *free[0][1:4], 2, 2],
        [*free[1][:4], 2, 2],
    ]


def test_a_call_of_which_nothing_was_said_fails() -> None:
    router = PinnedRouter(make_tiny_router(2), 2)
    with pytest.raises(RuntimeError):
        router(torch.randn(1, 1, 32), 0)
    router.pin([FREE])
    router(torch.randn(1, 1, 32), 0)
    router.unpin()
    with pytest.raises(RuntimeError):
        router(torch.randn(1, 1, 32), 0)


def test_wishes_for_another_number_of_tokens_fail() -> None:
    router = PinnedRouter(make_tiny_router(2), 2)
    router.pin([FREE, (1, 1)], [2, 2])
    with pytest.raises(RuntimeError):
        router(torch.randn(1, 5, 32), 0)


def test_weights_of_a_soft_router_are_overruled_where_pinned_and_only_there() -> None:
    router = PinnedRouter(UniformRouter(2), 2)
    router.pin([(1, 1), FREE], [1, 1])
    decision = router(torch.randn(1, 2, 32), 0)
    assert decision.weights[0].tolist() == [[0, 1], [0.5, 0.5]]
    assert decision.choice[0].tolist() == [1, NO_EXPERT]


def test_a_masked_expert_is_never_the_best() -> None:
    scorer = LinearScorer((32,), 3)
    x = torch.randn(1, 200, 32)
    assert set(Router(scorer)(x, 0).choice[0].tolist()) == {0, 1, 2}
    assert set(Router(MaskedScorer(scorer, [1]))(x, 0).choice[0].tolist()) == {0, 2}


def test_a_masked_expert_is_not_the_best_where_the_others_have_no_vector() -> None:
    config, x = RouterConfig(scorer="arrow", sharing="layer"), torch.randn(1, 9, 32)
    scorer = make_router(config, [Point("mlp", 32)], 3).scorer
    scorer.weights[0].data[0] = 1.0
    assert set(Router(scorer)(x, 0).choice[0].tolist()) == {0}
    assert 0 not in Router(MaskedScorer(scorer, [0]))(x, 0).choice[0].tolist()


def test_a_dead_expert_is_found(tiny_base: Path, tmp_path: Path) -> None:
    """One whose B is zero, as PEFT makes it, beside one that speaks; and one that breaks the model."""
    alive = load_expert(make_tiny_expert(tiny_base, tmp_path / "alive", seed=1))
    dead = load_expert(make_tiny_expert(tiny_base, tmp_path / "dead", strength=0.0))
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = load_base(tiny_base, dtype)
        compose_model(model, [alive, dead], NoExpertRouter(2))
        with pytest.raises(RefusedError) as caught:
            prove_alive(model, tokenizer, ["alive", "dead"])
        assert (caught.value.code, caught.value.got) == ("EXPERT_DEAD", "dead")
        model, tokenizer = load_base(tiny_base, dtype)
        compose_model(model, [alive, alive], NoExpertRouter(2))
        prove_alive(model, tokenizer, ["alive", "twin"])
        next(iter(model.modules())).get_submodule("model.layers.0.mlp").block.up_proj.experts.a[0] = torch.nan
        with pytest.raises(RefusedError) as caught:
            prove_alive(model, tokenizer, ["broken", "alive"])
        assert caught.value.got == "broken"
