"""How a decision about experts reaches the linears that follow it.

A router is any module `(hidden_states (..., width), point) → RoutingDecision`. Points are the places of a model
that ask it, counted in the model's order: a `RoutedBlock` (an MLP, an attention, a Mamba mixer) that asks about
its input and runs under the answer, or, where each linear decides for itself, a `RoutedLinear`. All of a model's
points share one `RoutingContext`. Nothing is patched at run time, so caching, padding and `generate` work as
they did.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

NO_EXPERT = -1  # the choice of a router that does not choose


@dataclass(frozen=True)
class Point:
    """A place that decides: the block or linear, by its name in the base, and the width of what it reads."""

    name: str
    width: int


class Segments(NamedTuple):
    """Tokens grouped by expert: `parts` are (expert, start, stop) in `tokens`, which numbers tokens of the decision
    in this order; None where the order is that of the decision itself. `weights` (tokens, 1) unless all are 1."""

    parts: Sequence[tuple[int, int, int]]
    tokens: Tensor | None = None
    weights: Tensor | None = None


@dataclass(eq=False)
class RoutingDecision:
    """What a router said about one point's input.

    `weights` (..., experts) float32 scale the experts; `choice` (...) int64 is the strongest expert or `NO_EXPERT`.
    Where a router is being trained there are also `probabilities` (..., experts) and, of a draw, `log_prob` (...).
    `hard`: the weight is exactly 1 at `choice` and 0 elsewhere; `selected`: only that weight has a gradient.
    """

    weights: Tensor
    choice: Tensor
    probabilities: Tensor | None = None
    log_prob: Tensor | None = None
    hard: bool = False
    selected: bool = False

    @property
    def experts(self) -> int:
        return self.weights.shape[-1]

    @property
    def learned(self) -> bool:
        """Whether the weights have a gradient."""
        return self.weights.requires_grad

    @cached_property
    def segments(self) -> Segments:
        """Computed once, for all linears of a block."""
        if self.hard:
            choice = self.choice.reshape(-1)
            if len(choice) == 1:
                return Segments(((int(choice), 0, 1),))
            parts = _parts(torch.bincount(choice, minlength=self.experts).tolist())
            return Segments(parts, choice.argsort(stable=True) if len(parts) > 1 else None)
        weights = self.weights.detach().reshape(-1, self.experts).T
        experts, tokens = weights.nonzero(as_tuple=True)  # sorted by expert
        parts = _parts(torch.bincount(experts, minlength=self.experts).tolist())
        return Segments(parts, tokens, weights[experts, tokens][:, None])


class OneExpert(RoutingDecision):
    """One expert for each token, not to be learned from. Weights are written out only if somebody asks for them."""

    hard = True

    def __init__(self, choice: Tensor, among: int) -> None:
        self.choice = choice
        self.among = among

    @property
    def experts(self) -> int:
        return self.among

    @property
    def learned(self) -> bool:
        return False

    @cached_property
    def weights(self) -> Tensor:  # type: ignore[override] # read like the attribute that it stands for
        return functional.one_hot(self.choice, self.among).float()


@dataclass
class RoutingRecord:
    """What was decided in each forward call, by point. A call ends where a point decides for a second time."""

    calls: list[dict[int, RoutingDecision]] = field(default_factory=list)

    def add(self, point: int, decision: RoutingDecision) -> None:
        if not self.calls or point in self.calls[-1]:
            self.calls.append({})
        self.calls[-1][point] = decision

    @property
    def choices(self) -> list[Tensor]:
        """Of each call, (points, batch, seq) int64; for models whose points all read the same tokens."""
        return [_stacked([each.choice for each in call.values()]) for call in self.calls]

    @property
    def probabilities(self) -> list[Tensor]:
        """Of each call while training, (points, batch, seq, experts) float32 with their gradient."""
        known = [
            [each.probabilities for each in call.values() if each.probabilities is not None] for call in self.calls
        ]
        return [torch.stack(each) for each in known if each]


class RoutingContext:
    """Where the routed parts of a model meet: its router, the decision in force, a record while one is kept.

    Not a module, so that the router is registered once, on the model, and not once per point.
    """

    def __init__(self, router: nn.Module, points: Sequence[Point] = ()) -> None:
        self.router = router
        self.points = tuple(points)
        self._decision: RoutingDecision | None = None
        self._record: RoutingRecord | None = None

    @property
    def decision(self) -> RoutingDecision:
        """The decision of the block that is running."""
        if self._decision is None:
            raise RuntimeError("a routed linear ran outside its routed block")
        return self._decision

    @contextmanager
    def decided(self, decision: RoutingDecision) -> Iterator[None]:
        """The linears called inside follow `decision`."""
        previous, self._decision = self._decision, decision
        try:
            yield
        finally:
            self._decision = previous

    @contextmanager
    def recording(self) -> Iterator[RoutingRecord]:
        """Keep what is decided in every forward call inside the block."""
        previous, self._record = self._record, RoutingRecord()
        try:
            yield self._record
        finally:
            self._record = previous

    @contextmanager
    def using(self, router: nn.Module) -> Iterator[None]:
        """Let another router decide inside the block: a control, or one forced expert."""
        previous, self.router = self.router, router
        try:
            yield
        finally:
            self.router = previous

    def decide(self, point: int, hidden_states: Tensor) -> RoutingDecision:
        """Ask the router about the input of point number `point`."""
        decision: RoutingDecision = self.router(hidden_states, point)
        if self._record is not None:
            self._record.add(point, decision)
        return decision


class RoutedBlock(nn.Module):
    """A frozen block of the base that runs under the router's decision about its input."""

    def __init__(self, block: nn.Module, point: int, context: RoutingContext) -> None:
        super().__init__()
        self.block = block
        self.point = point
        self.context = context

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        with self.context.decided(self.context.decide(self.point, hidden_states)):
            return self.block(*args, **kwargs)


def _stacked(choices: Sequence[Tensor]) -> Tensor:
    """Together where the first is, for a model may lie on several devices."""
    return torch.stack([choice.to(choices[0].device) for choice in choices])


def _parts(counts: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """(expert, start, stop) of every expert that has tokens."""
    parts, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            parts.append((expert, start, start + count))
            start += count
    return tuple(parts)
