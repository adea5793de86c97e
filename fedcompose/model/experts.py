"""Frozen experts inside a linear layer, in rank space.

An expert is a site's LoRA. All experts of one linear are stacked into a tall A and a wide B, and a router's
weights act on the few rank rows between them, so experts of any ranks cost two thin matrix products:

    y = W x + B_all ((A_all x) · g[owner]),    B_all = [s_1 B_1 | s_2 B_2 | …],  owner: rank row → expert

It equals W x + Σ_e g_e s_e B_e A_e x for any weights g. An expert that leaves a linear alone has no rows
there. Expert weights are buffers: nothing can train them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcompose.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter, parse_adapter, read_adapter
from fedcompose.contribution import VerifiedContribution
from fedcompose.model.router import RoutingContext

TARGETS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Update:
    """One expert's change to one linear, `scale · b @ a`; a (rank, in), b (out, rank)."""

    a: Tensor
    b: Tensor
    scale: float

    def delta(self) -> Tensor:
        """(out, in) float32."""
        return self.scale * (self.b.float() @ self.a.float())


@dataclass(frozen=True)
class Expert:
    """A site's frozen LoRA: its updates by the name of the linear in the base."""

    name: str
    updates: Mapping[str, Update]


def load_expert(folder: Path, base_shapes: Mapping[str, tuple[int, int]] | None = None) -> Expert:
    """The expert in a PEFT folder, named after the folder.

    Raises: RefusedError: as `fedcompose.adapter.parse_adapter`.
    """
    return make_expert(folder.name, read_adapter(folder, base_shapes))


def read_expert(contribution: VerifiedContribution, base_shapes: Mapping[str, tuple[int, int]]) -> Expert:
    """The expert in an admitted contribution, from the very bytes that were verified.

    Raises: RefusedError: `FILE_CHANGED`.
    """
    config, weights = (contribution.read(name) for name in (CONFIG_FILE, WEIGHTS_FILE))
    return make_expert(contribution.site, parse_adapter(config, weights, base_shapes))


def make_expert(name: str, adapter: Adapter) -> Expert:
    """A checked adapter as tensors, float32 whatever it was stored in."""
    updates = {}
    for module in adapter.modules():
        a, b = (torch.tensor(stored.float32()) for stored in adapter.pair(module))
        updates[module] = Update(a, b, adapter.config.scale(module))
    return Expert(name, updates)


class PackedExperts(nn.Module):
    """The experts of a linear: `a` (ranks, in), `b` (out, ranks) with scales folded in, `owner` (ranks,)."""

    a: Tensor
    b: Tensor
    owner: Tensor
    members: Tensor

    def __init__(self, updates: Sequence[Update | None], like: Tensor) -> None:
        """`updates` in router order, None where an expert has no rows; number format and device of `like`."""
        super().__init__()
        present = [(index, update) for index, update in enumerate(updates) if update is not None]
        a = torch.cat([update.a for _, update in present])
        b = torch.cat([update.scale * update.b.double() for _, update in present], dim=1)  # rounded once, below
        owner = torch.cat([torch.full((len(update.a),), index) for index, update in present])
        # Not persistent: a release carries the sites' own files, never a re-saved copy.
        self.register_buffer("a", a.to(like), persistent=False)
        self.register_buffer("b", b.to(like), persistent=False)
        self.register_buffer("owner", owner.to(like.device), persistent=False)
        # g[owner] as a product with 0/1 columns: exact, and its backward is a product too, not a scatter.
        members = functional.one_hot(owner, len(updates)).T.contiguous()
        self.register_buffer("members", members.to(like), persistent=False)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x (..., in), weights (..., experts) → the weighted updates of x, (..., out)."""
        gates = weights.to(x.dtype) @ self.members
        return functional.linear(functional.linear(x, self.a) * gates, self.b)


class RoutedLinear(nn.Module):
    """A frozen linear with its experts, weighted by the decision in force."""

    def __init__(self, linear: nn.Linear, updates: Sequence[Update | None], context: RoutingContext) -> None:
        super().__init__()
        self.linear = linear
        self.experts = PackedExperts(updates, like=linear.weight)
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) + self.experts(x, self.context.decision.weights)
        return y
