"""Routers that learn nothing: what every learned router has to beat, and ways to say who speaks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

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
