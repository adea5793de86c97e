"""The router of a composition: made from its settings, kept in one small file, read back strictly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save as dump_safetensors
from torch import Tensor, nn

from fedcompose.composition import MAX_ROUTER_BYTES
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.files import read_limited, write_atomic
from fedcompose.model.estimators import (
    Estimator,
    Gumbel,
    Sampled,
    Soft,
    TopK,
    constant_weight,
    hard,
    hard_selected,
    identity,
)
from fedcompose.model.router import Point, RoutingDecision
from fedcompose.model.scorers import COMPARE, LinearScorer, StaticScorer, VectorScorer
from fedcompose.routing import RouterConfig
from fedcompose.tensors import parse_safetensors


class Router(nn.Module):
    """Scores and what is made of them."""

    def __init__(self, scorer: nn.Module, estimator: Estimator = hard) -> None:
        super().__init__()
        self.scorer = scorer
        self.estimator = estimator

    def forward(self, hidden_states: Tensor, point: int) -> RoutingDecision:
        """(..., width) of what a point reads → a decision over (..., experts)."""
        return self.estimator(self.scorer(hidden_states, point))


class PromptRouter(nn.Module):
    """Chooses one expert for a whole prompt, from the mean embedding of its tokens.

    It says which; `FixedRouter` or `SequenceRouter` then let that expert speak. By itself it decides nothing, because
    while a model writes it no longer sees the prompt.
    """

    def __init__(self, scorer: nn.Module) -> None:
        super().__init__()
        self.scorer = scorer

    def choose(self, embedded: Tensor, mask: Tensor) -> list[int]:
        """The expert of every row; embedded (rows, width, hidden), mask (rows, width) 1 where a token is real."""
        real = mask[..., None].float()
        mean = (embedded.float() * real).sum(1) / real.sum(1)
        choice: list[int] = self.scorer(mean, 0).argmax(-1).tolist()
        return choice

    def forward(self, hidden_states: Tensor, point: int) -> RoutingDecision:
        raise RuntimeError("this router reads whole prompts: ask choose(), then use a FixedRouter or SequenceRouter")


def make_router(config: RouterConfig, points: Sequence[Point], experts: int, seed: int = 0) -> Router | PromptRouter:
    """A router as it is before training, for `experts` experts that are asked about at `points`.

    Raises: ConfigError: `ROUTER_DEAD` when sampling would always take every expert,
                `ROUTER_WIDTHS` when one scorer should serve points that read different widths.
    """
    if config.estimator == "sampled" and config.top_k is not None and config.top_k >= experts:
        raise ConfigError(
            "ROUTER_DEAD", "this router could never learn", got=f"it always samples all {experts} experts",
            fix="a smaller top_k",
        )  # fmt: skip
    return _build(config, points, experts, seed)


def _build(config: RouterConfig, points: Sequence[Point], experts: int, seed: int = 0) -> Router | PromptRouter:
    widths = [point.width for point in points]
    if config.sharing == "model":
        if len(set(widths)) > 1:
            raise ConfigError(
                "ROUTER_WIDTHS", "one scorer cannot read inputs of different widths",
                expected='sharing = "module"', got=f"widths {sorted(set(widths))}",
            )  # fmt: skip
        widths = widths[:1]
    scorer = _scorer(config, widths, experts, seed)
    return PromptRouter(scorer) if config.granularity == "prompt" else Router(scorer, _estimator(config))


def save_router(path: Path, router: Router | PromptRouter) -> None:
    """The scorer's tensors, float32, a row per expert in the order of the composition's experts."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in router.scorer.state_dict().items()}
    write_atomic(path, dump_safetensors(tensors, metadata={"format": "pt"}))


def load_router(path: Path, config: RouterConfig, points: Sequence[Point], experts: int) -> Router | PromptRouter:
    """Raises: RefusedError: as `parse_router`."""
    return parse_router(read_limited(path, MAX_ROUTER_BYTES), config, points, experts)


def parse_router(data: bytes, config: RouterConfig, points: Sequence[Point], experts: int) -> Router | PromptRouter:
    """The frozen router in a file that must hold exactly what its settings imply.

    Raises: RefusedError: `ROUTER_INVALID` for missing, further or wrongly shaped tensors, or values not finite.
            ConfigError: `ROUTER_WIDTHS`.
    """
    router = _build(config, points, experts)
    expected = {name: ("F32", tuple(tensor.shape)) for name, tensor in router.scorer.state_dict().items()}
    stored = parse_safetensors(data)
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()}
    if found != expected:
        raise RefusedError("ROUTER_INVALID", "the router does not fit", expected=str(expected)[:200])
    tensors = {name: torch.tensor(tensor.float32()) for name, tensor in stored.items()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise RefusedError("ROUTER_INVALID", "the router holds a number that is not finite")
    router.scorer.load_state_dict(tensors)
    return router.requires_grad_(False)


def _scorer(config: RouterConfig, widths: Sequence[int], experts: int, seed: int) -> nn.Module:
    if config.scorer == "linear":
        return LinearScorer(widths, experts, seed, config.bias)
    if config.scorer == "static":
        return StaticScorer(experts)
    return VectorScorer(widths, experts, COMPARE[config.scorer])


def _estimator(config: RouterConfig) -> Estimator:
    k = config.top_k or 0
    made: dict[str, Estimator] = {
        "hard": hard,
        "hard_selected": hard_selected,
        "gumbel": Gumbel(),
        "soft": Soft(config.top_k, config.normalise),
        "top_k": TopK(k, config.normalise),
        "sampled": Sampled(k, constant_weight(config.scale, max(1, k))),
        "identity": identity,
    }
    return made[config.estimator]
