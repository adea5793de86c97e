"""Experts as tensors: each by itself, and all of one linear together.

An expert is a site's LoRA. All experts of one linear lie in one matrix A and one B, a row of each for every rank of
every expert, one expert after the other, so that ranks may differ and an expert that leaves a linear alone has no
rows there:

    y = W x + Σ_e g_e s_e B_e A_e x,    A = [A_1; A_2; …],  B = [s_1 B_1ᵀ; s_2 B_2ᵀ; …],  g from a router

`fedcompose.model.kernels` computes it. Expert weights are buffers: nothing can train them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedcompose.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter, parse_adapter, read_adapter
from fedcompose.contribution import VerifiedContribution


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
    """The experts of a linear: `a` (ranks, in), `b` (ranks, out) with scales folded in, `offsets` of their rows."""

    a: Tensor
    b: Tensor
    members: Tensor

    def __init__(self, updates: Sequence[Update | None], linear: nn.Linear) -> None:
        """`updates` in router order, None where an expert has no rows; on the device of `linear`.

        Float32 on a CPU, where it is faster for few tokens than bfloat16; elsewhere the number format of `linear`.
        """
        super().__init__()
        present = [update for update in updates if update is not None]
        like = linear.weight
        dtype = torch.float32 if like.device.type == "cpu" and like.dtype == torch.bfloat16 else like.dtype
        a = [torch.empty(0, like.shape[1]), *(update.a for update in present)]
        b = [torch.empty(0, like.shape[0]), *((update.scale * update.b.double()).T for update in present)]
        self.ranks = [0 if update is None else len(update.a) for update in updates]
        self.offsets = [0, *accumulate(self.ranks)]
        # Not persistent: a release carries the sites' own files, never a re-saved copy.
        self.register_buffer("a", torch.cat(a).to(like.device, dtype), persistent=False)
        self.register_buffer("b", torch.cat(b).to(like.device, dtype), persistent=False)
        self.register_buffer("members", _members(tuple(self.ranks), like.device), persistent=False)

    @cached_property
    def each(self) -> list[tuple[Tensor, Tensor]]:
        """Views of every expert's Aᵀ (in, rank) and Bᵀ (rank, out), the scale in B: a view costs more than it seems."""
        return list(zip((a.T for a in self.a.split(self.ranks)), self.b.split(self.ranks), strict=True))

    def _apply(self, fn: Any, recurse: bool = True) -> PackedExperts:
        """The buffers become others, on another device or in another format; so must the views."""
        self.__dict__.pop("each", None)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


@cache
def _members(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """(experts, ranks) float32, 1 where a rank row belongs to an expert; linears with the same ranks share it.

    A product with it spreads the weights of experts over their rows; so its backward is a product too, not a scatter.
    """
    return torch.eye(len(ranks), device=device).repeat_interleave(torch.tensor(ranks, device=device), dim=1)
