"""One expert behind gates that learn when to open (PHATGOOSE, arXiv 2402.05859); base and expert stay as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcompose.model.router import Point, RoutingDecision


class GatedExpert(nn.Module):
    """A router that lets one expert speak at weight σ(v·x), v a vector for every point."""

    def __init__(self, points: Sequence[Point], expert: int, experts: int) -> None:
        super().__init__()
        self.expert, self.experts = expert, experts
        self.vectors = nn.ParameterList(nn.Parameter(torch.zeros(point.width)) for point in points)

    def forward(self, hidden_states: Tensor, point: int) -> RoutingDecision:
        opened = torch.sigmoid(hidden_states.float() @ self.vectors[point])
        weights = functional.one_hot(torch.tensor(self.expert), self.experts).to(opened) * opened[..., None]
        return RoutingDecision(weights, torch.full(opened.shape, self.expert, device=opened.device))
