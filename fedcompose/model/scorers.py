"""Scorers: one number per expert for every token, (..., width) and the place that asks → (..., experts) float32.

What the numbers mean and which gradient they get is an estimator's business. All weights are named `weights.N`,
N counting the places that decide, or 0 alone where one serves them all; every one has a row per expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

INIT_STD = 0.02


class LinearScorer(nn.Module):
    """A float32 linear, one for all places or one for each, without bias unless asked for.

    `widths`: what each place reads; a single width makes a single linear, which every place shares.
    """

    def __init__(self, widths: Sequence[int], experts: int, seed: int = 0, bias: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(experts, width, generator=generator) * INIT_STD) for width in widths
        )
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(experts)) for _ in widths if bias)
        self.shared, self.bias = len(widths) == 1, bias

    def forward(self, hidden_states: Tensor, point: int) -> Tensor:
        at, here = 0 if self.shared else point, hidden_states.device
        bias = self.biases[at].to(here) if self.bias else None
        return functional.linear(hidden_states.float(), self.weights[at].to(here), bias)


class VectorScorer(nn.Module):
    """Fixed vectors, one per place and expert, compared with the token's hidden state; nothing is trained.

    An expert that has no part in a place has the zero vector there, and is never preferred: its score is −∞.
    """

    def __init__(self, widths: Sequence[int], experts: int, compare: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.compare = compare
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(experts, width), False) for width in widths)

    def forward(self, hidden_states: Tensor, point: int) -> Tensor:
        vectors = self.weights[point].to(hidden_states.device)
        scores = self.compare(hidden_states.float(), vectors)
        masked: Tensor = scores.masked_fill((vectors == 0).all(-1), -torch.inf)
        return masked


class StaticScorer(nn.Module):
    """The same number per expert for every token: a weighted ensemble. One row `weights.0` of (experts,)."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.full((experts,), 1 / experts), False)])

    def forward(self, hidden_states: Tensor, point: int) -> Tensor:
        weights: Tensor = self.weights[0].to(hidden_states.device)
        return weights.expand(*hidden_states.shape[:-1], -1)


def arrow(x: Tensor, vectors: Tensor) -> Tensor:
    """|x · v|, v the direction in which B·A amplifies most. Source: Arrow, arXiv 2405.11157."""
    return (x @ vectors.T).abs()


def centroid(x: Tensor, vectors: Tensor) -> Tensor:
    """Cosine of x with the mean hidden state of an expert's domain."""
    return functional.normalize(x, dim=-1) @ functional.normalize(vectors, dim=-1).T


def phatgoose(x: Tensor, vectors: Tensor) -> Tensor:
    """Dot product of both standardised, over √width. Source: PHATGOOSE, arXiv 2402.05859."""
    width = x.shape[-1:]
    scores: Tensor = functional.layer_norm(x, width) @ functional.layer_norm(vectors, width).T
    return scores / math.sqrt(width[0])


COMPARE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "arrow": arrow, "centroid": centroid, "phatgoose": phatgoose,
}  # fmt: skip
