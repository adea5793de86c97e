"""A composition's router: made from its settings, saved, and read back strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedcompose.errors import ConfigError, RefusedError
from fedcompose.model.learned import PromptRouter, load_router, make_router, save_router
from fedcompose.model.router import Point
from fedcompose.routing import RouterConfig

POINTS = (Point("a", 8), Point("b", 8))
MIXED = (Point("a", 8), Point("b", 12))
PER_LINEAR: dict[str, Any] = {"decides": "linear", "sharing": "module"}
LEARNED = [
    RouterConfig(),
    RouterConfig(estimator="hard_selected"),
    RouterConfig(estimator="gumbel", sharing="layer"),
    RouterConfig(estimator="soft"),
    RouterConfig(estimator="soft", top_k=2, normalise=True),
    RouterConfig(estimator="top_k", top_k=1),
    RouterConfig(estimator="top_k", top_k=2),
    RouterConfig(estimator="top_k", top_k=2, normalise=True, bias=True),
    RouterConfig(estimator="sampled", top_k=2, scale="1/k", **PER_LINEAR),
]


def _learn(router: torch.nn.Module, width: int = 8, point: int = 0) -> Any:
    """A decision and the loss of a random upstream gradient, or the log-probability of a draw."""
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(1))
    decision = router(x, point)
    upstream = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    loss = (decision.weights * upstream).sum() if decision.log_prob is None else decision.log_prob.sum()
    loss.backward()
    return decision


@pytest.mark.parametrize("config", LEARNED, ids=lambda config: f"{config.estimator}-{config.top_k}-{config.normalise}")
def test_every_router_that_is_not_refused_learns_from_its_decisions(config: RouterConfig) -> None:
    router = make_router(config, POINTS, 3, seed=1)
    decision = _learn(router)

    weight = router.scorer.weights[0]
    assert weight.grad is not None and weight.grad.abs().max() > 1e-4
    assert decision.probabilities is not None and decision.probabilities.requires_grad


def test_negative_control_what_is_refused_as_dead_has_no_gradient() -> None:
    router = make_router(RouterConfig(estimator="top_k", top_k=1), POINTS, 3)
    router.estimator.normalise = True  # what RouterConfig refuses
    _learn(router)
    assert router.scorer.weights[0].grad.abs().max() == 0


def test_sampling_every_expert_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        make_router(RouterConfig(estimator="sampled", top_k=3), POINTS, 3)
    assert error.value.code == "ROUTER_DEAD"


def test_one_scorer_for_two_widths_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        make_router(RouterConfig(decides="linear"), MIXED, 3)
    assert error.value.code == "ROUTER_WIDTHS"
    assert len(make_router(RouterConfig(**PER_LINEAR), MIXED, 3).scorer.weights) == 2


@pytest.mark.parametrize(
    "config",
    [
        RouterConfig(),
        RouterConfig(bias=True, sharing="layer"),
        RouterConfig(scorer="arrow", estimator="top_k", top_k=2, **PER_LINEAR),
        RouterConfig(scorer="static", estimator="identity"),
        RouterConfig(granularity="prompt", bias=True),
    ],
    ids=lambda config: f"{config.scorer}-{config.granularity}",
)
def test_saved_and_read_again_it_scores_the_same(config: RouterConfig, tmp_path: Path) -> None:
    router = make_router(config, POINTS, 3, seed=4)
    for parameter in router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    save_router(tmp_path / "router", router)

    again = load_router(tmp_path / "router", config, POINTS, 3)

    x = torch.randn(4, 8)
    assert torch.equal(again.scorer(x, 1), router.scorer(x, 1))
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_refuses_a_router_of_another_shape_or_with_a_hole(tmp_path: Path) -> None:
    router = make_router(RouterConfig(), POINTS, 2)
    save_router(tmp_path / "good", router)
    router.scorer.weights[0].data[0, 0] = float("nan")
    save_router(tmp_path / "nan", router)
    (tmp_path / "junk").write_bytes(b"junk")

    load_router(tmp_path / "good", RouterConfig(), POINTS, 2)
    for name, config, experts, code in (
        ("good", RouterConfig(), 3, "ROUTER_INVALID"),
        ("good", RouterConfig(bias=True), 2, "ROUTER_INVALID"),
        ("good", RouterConfig(sharing="layer"), 2, "ROUTER_INVALID"),
        ("nan", RouterConfig(), 2, "ROUTER_INVALID"),
        ("junk", RouterConfig(), 2, "SAFETENSORS_INVALID"),
    ):
        with pytest.raises(RefusedError) as refusal:
            load_router(tmp_path / name, config, POINTS, experts)
        assert refusal.value.code == code


def test_a_seed_repeats_a_router_and_another_seed_does_not() -> None:
    first, again, other = (make_router(RouterConfig(), POINTS, 3, seed).scorer.weights[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_prompt_router_reads_the_mean_of_real_tokens_and_never_decides_by_itself() -> None:
    router = make_router(RouterConfig(granularity="prompt"), POINTS, 3)
    assert isinstance(router, PromptRouter)
    router.scorer.weights[0].data = torch.eye(3, 8)
    embedded = torch.zeros(2, 3, 8)
    embedded[0, 0, 1] = embedded[1, 0, 2] = 1
    embedded[0, 2, 2] = 9  # padding

    assert router.choose(embedded, torch.tensor([[1, 1, 0], [1, 1, 1]])) == [1, 2]
    with pytest.raises(RuntimeError, match="choose"):
        router(embedded, 0)
