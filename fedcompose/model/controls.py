"""Routers that learn nothing: what every learned router has to beat, and ways to say who speaks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcompose.model.router import NO_EXPERT, OneExpert, RoutingDecision


class FixedRouter(nn.Module):
    """Always the same expert, as if it had been loaded alone."""

    def __init__(self, expert: int, experts: int) -> None:
        super().__init__()
        self.expert, self.experts = expert, experts

    def forward(self, hidden_states: Tensor, point: int) -> RoutingDecision:
        return OneExpert(torch.full(hidden_states.shape[:-1], self.expert, device=hidden_states.device), self.experts)


class SequenceRouter(nn.Module):
    """One given expert per row of the batch: an oracle that knows the domains, or a classifier of prompts.

    Rows are those of the forward call, so a batch whose rows leave or move needs another router.
    """

    def __init__(self, choice: Sequence[int], experts: int) -> None:
        super().__init__()
        self.choice, self.experts = tuple(choice), experts

    def forward(self, hidden_states: Tensor, point: int) -> RoutingDecision:
        rows, *rest, _ = hidden_states.shape
        if rows != len(self.choice):
            raise ValueError(f"{len(self.choice)} experts were named for a batch of {rows} rows")
        choice = torch.tensor(self.choice, device=hidden_states.device).view(rows, *(1 for _ in rest))
        return OneExpert(choice.expand(rows, *rest), self.experts)


class PinnedRouter(nn.Module):
    """Another router, overruled where somebody has said who speaks, token by token and place by place.

    What is pinned holds for the next forward call and no other, until `unpin`: an expert's number for each token at
    each point, or `NO_EXPERT` where the router decides. A call of which nothing was said fails, so that nobody's wish
    is lost, or done to somebody else's tokens.
    """

    def __init__(self, router: nn.Module, experts: int) -> None:
        super().__init__()
        self.router, self.experts = router, experts
        self._pins: Tensor | None = None
        self._kinds: list[Literal["free", "pinned", "mixed"]] = []

    def pin(self, wishes: Sequence[Sequence[int]], tokens: Sequence[int] | None = None) -> None:
        """Each row's wish at each point, and how many tokens of it come; without `tokens` one wish for all."""
        pins = torch.tensor([list(wish) for wish in wishes]).T
        said = (pins != NO_EXPERT).tolist()
        self._kinds = ["pinned" if all(each) else "mixed" if any(each) else "free" for each in said]
        self._pins = pins if tokens is None else pins.repeat_interleave(torch.tensor(tokens), dim=1)

    def unpin(self) -> None:
        self._pins = None

    def forward(self, hidden_states: Tensor, point: int) -> RoutingDecision:
        if self._pins is None:
            raise RuntimeError("a forward call of which nobody said whose tokens it holds")
        kind = self._kinds[point]
        pins, shape = self._pins[point].to(hidden_states.device), hidden_states.shape[:-1]
        pins = pins.expand(shape) if len(pins) == 1 else pins.view(shape)
        if kind == "pinned":
            return OneExpert(pins, self.experts)
        decision: RoutingDecision = self.router(hidden_states, point)
        return decision if kind == "free" else _overruled(decision, pins)


def _overruled(decision: RoutingDecision, pins: Tensor) -> RoutingDecision:
    """`decision`, but one expert at weight 1 where `pins` names one."""
    said = pins != NO_EXPERT
    choice = torch.where(said, pins, decision.choice)
    if decision.hard:
        return OneExpert(choice, decision.experts)
    pinned = functional.one_hot(pins.clamp(min=0), decision.experts).to(decision.weights.dtype)
    return RoutingDecision(torch.where(said[..., None], pinned, decision.weights), choice)


class MaskedScorer(nn.Module):
    """Scores by which no router ever chooses the experts in the given rows; for those that choose by the best score."""

    def __init__(self, scorer: nn.Module, rows: Sequence[int]) -> None:
        super().__init__()
        self.scorer, self.rows = scorer, list(rows)

    def forward(self, hidden_states: Tensor, point: int) -> Tensor:
        scores: Tensor = self.scorer(hidden_states, point)
        scores = scores.clamp(min=torch.finfo(scores.dtype).min)  # who has no vector here still beats who is masked
        scores[..., self.rows] = -torch.inf
        return scores


class RandomRouter(nn.Module):
    """A uniformly random expert per token and place; a seed repeats over the same calls."""

    def __init__(self, experts: int, seed: int = 0) -> None:
        super().__init__()
        self.experts = experts
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, hidden_states: Tensor, point: int) -> RoutingDecision:
        choice = torch.randint(self.experts, hidden_states.shape[:-1], generator=self.generator)
        return OneExpert(choice.to(hidden_states.device), self.experts)


class StaticRouter(nn.Module):
    """The given weights for every token: a weighted sum of the products B·A."""

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.weights = tuple(weights)

    def forward(self, hidden_states: Tensor, point: int) -> RoutingDecision:
        shape = hidden_states.shape[:-1]
        weights = torch.tensor(self.weights, device=hidden_states.device).expand(*shape, -1)
        return RoutingDecision(weights, torch.full(shape, NO_EXPERT, device=hidden_states.device))


class UniformRouter(StaticRouter):
    """Every expert at weight 1/experts, the uniform merge."""

    def __init__(self, experts: int) -> None:
        super().__init__([1 / experts] * experts)


class NoExpertRouter(StaticRouter):
    """Every expert at weight 0: what is left is the base."""

    def __init__(self, experts: int) -> None:
        super().__init__([0.0] * experts)
