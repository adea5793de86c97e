"""Routers: who decides, for every token and layer, which expert speaks.

A `RoutedBlock` stands where the model had a block (an MLP), asks the router about the block's input and runs
that block under the decision; the linears inside read it from the `RoutingContext` they share. Nothing is
patched at run time, so caching, padding and `generate` work as they did.

Source: Hard-Routed Mixtures of Reasoning LoRAs (arXiv 2606.31413): one linear router shared by all layers,
hard top-1, unit scale, dense straight-through gradient. The others are controls that it has to beat.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ROUTER_INIT_STD = 0.02
NO_EXPERT = -1  # the choice of a router that does not choose


@dataclass(frozen=True)
class RoutingDecision:
    """What a router said about one block's input.

    `weights` (..., experts) float32 scale the experts; `choice` (...) int64 is the one expert that speaks, or
    `NO_EXPERT`; `probabilities` (..., experts) float32 exist only where a router is being trained.
    """

    weights: Tensor
    choice: Tensor
    probabilities: Tensor | None = None


@dataclass
class RoutingRecord:
    """Choices of each forward call, (layers, batch, seq) int64; probabilities where a router is trained."""

    choices: list[Tensor] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)


def hard_top1(logits: Tensor) -> RoutingDecision:
    """One expert per token at weight exactly 1; ties go to the lower index.

    Where a gradient is wanted, the weights carry the dense straight-through estimator, onehot(argmax) forward
    and softmax backward, so that dL/dlogit_i = Σ_e p_e (δ_ei − p_i) dL/dw_e over *all* experts e.
    Source: arXiv 2606.31413, Y = sg(onehot(j) − P) + P.
    """
    choice = logits.argmax(-1)  # documented to return the first of equal maxima
    weights = functional.one_hot(choice, logits.shape[-1]).to(logits.dtype)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return RoutingDecision(weights, choice)
    probabilities = logits.softmax(-1)
    # The difference is exactly 0; summed in another order the weight could come out as 1 − 6e-8.
    return RoutingDecision(weights + (probabilities - probabilities.detach()), choice, probabilities)


class Router(nn.Module):
    """One float32 linear from the block's input to expert scores, without bias, shared by all layers."""

    def __init__(self, hidden: int, experts: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(experts, hidden, generator=generator) * ROUTER_INIT_STD
        self.weight = nn.Parameter(weight)

    def forward(self, hidden_states: Tensor) -> RoutingDecision:
        """(..., hidden) → a decision over (..., experts)."""
        return hard_top1(functional.linear(hidden_states.float(), self.weight))


class FixedRouter(nn.Module):
    """Control: always the same expert, as if it had been loaded alone."""

    def __init__(self, expert: int, experts: int) -> None:
        super().__init__()
        self.expert, self.experts = expert, experts

    def forward(self, hidden_states: Tensor) -> RoutingDecision:
        return _one_hot(torch.full(hidden_states.shape[:-1], self.expert, device=hidden_states.device), self.experts)


class RandomRouter(nn.Module):
    """Control: a uniformly random expert per token and layer; a seed repeats over the same calls."""

    def __init__(self, experts: int, seed: int = 0) -> None:
        super().__init__()
        self.experts = experts
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, hidden_states: Tensor) -> RoutingDecision:
        choice = torch.randint(self.experts, hidden_states.shape[:-1], generator=self.generator)
        return _one_hot(choice.to(hidden_states.device), self.experts)


class UniformRouter(nn.Module):
    """Control: every expert at weight 1/experts, the uniform merge of the products B·A."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden_states: Tensor) -> RoutingDecision:
        shape = hidden_states.shape[:-1]
        weights = hidden_states.new_full((*shape, self.experts), 1 / self.experts, dtype=torch.float32)
        return RoutingDecision(weights, torch.full(shape, NO_EXPERT, device=hidden_states.device))


class RoutingContext:
    """Where the routed parts of a model meet: its router, the decision in force, a record while one is kept.

    Not a module, so that the router is registered once, on the model, and not once per layer.
    """

    def __init__(self, router: nn.Module) -> None:
        self.router = router
        self.layers = 0  # blocks that ask this context, in the order in which they run
        self._decision: RoutingDecision | None = None
        self._record: RoutingRecord | None = None
        self._pending: list[RoutingDecision] = []

    @property
    def decision(self) -> RoutingDecision:
        """The decision of the block that is running."""
        if self._decision is None:
            raise RuntimeError("a routed linear ran outside its routed block")
        return self._decision

    @contextmanager
    def decided(self, decision: RoutingDecision) -> Iterator[None]:
        """The linears called inside follow `decision`."""
        self._decision = decision
        try:
            yield
        finally:
            self._decision = None

    @contextmanager
    def recording(self) -> Iterator[RoutingRecord]:
        """Keep what is decided in every forward call inside the block."""
        previous, self._record, self._pending = self._record, RoutingRecord(), []
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

    def decide(self, layer: int, hidden_states: Tensor) -> RoutingDecision:
        """Ask the router about the input of block number `layer`."""
        decision: RoutingDecision = self.router(hidden_states)
        if self._record is not None:
            self._note(self._record, layer, decision)
        return decision

    def _note(self, record: RoutingRecord, layer: int, decision: RoutingDecision) -> None:
        self._pending = [*self._pending, decision] if layer else [decision]
        if layer < self.layers - 1:
            return
        record.choices.append(torch.stack([each.choice for each in self._pending]))
        if decision.probabilities is not None:
            known = [each.probabilities.detach() for each in self._pending if each.probabilities is not None]
            record.probabilities.append(torch.stack(known))


class RoutedBlock(nn.Module):
    """A frozen block of the base that runs under the router's decision about its input."""

    def __init__(self, block: nn.Module, layer: int, context: RoutingContext) -> None:
        super().__init__()
        self.block = block
        self.layer = layer
        self.context = context

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        with self.context.decided(self.context.decide(self.layer, hidden_states)):
            return self.block(hidden_states, *args, **kwargs)


def _one_hot(choice: Tensor, experts: int) -> RoutingDecision:
    return RoutingDecision(functional.one_hot(choice, experts).float(), choice)
