"""One mixture for everything: weights found by search, and merges into a single LoRA.

`search` looks for one weight per expert, without gradients, on a handful of lessons (LoRAHub, arXiv 2307.13269). There
the weighted A's and B's are added up separately, which multiplies every expert's A with every other's B; here the
products B·A are, exactly. `merge` edits the products and factors the result again: TIES (arXiv 2306.01708) keeps the
largest changes whose sign the majority shares, DARE (arXiv 2311.03099) drops changes at random and rescales the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedcompose.adapter import MAX_RANK, Adapter, AdapterConfig, tensor_name
from fedcompose.errors import MissingError
from fedcompose.model.composed import stored
from fedcompose.model.experts import Expert
from fedcompose.tensors import StoredTensor
from fedcompose_coordinator.training import OnStep, mean_loss
from fedcompose_coordinator.work import Work

EVALUATIONS, FEW, BOUND, SPARSITY = 40, 5, 1.5, 0.05  # LoRAHub's: trials, lessons per domain, |weight|, its price
DENSITY = {"ties": 0.2, "dare": 0.5}  # share of the changes that is kept


def search(work: Work, on_step: OnStep | None) -> list[dict[str, Any]]:
    """Give the static router the weights that make a few lessons of every domain likeliest; return the trials.

    Raises: MissingError: `PACKAGE_MISSING` without nevergrad.
    """
    ng = _nevergrad()
    few = [row for domain in range(len(work.domains)) for row in work.rows_of(domain)[:FEW]]
    weights = work.model.router.scorer.weights[0]
    space = ng.p.Array(init=[0.0] * len(weights)).set_bounds(-BOUND, BOUND)
    space.random_state.seed(work.seed)
    optimizer = ng.optimizers.NGOpt(parametrization=space, budget=EVALUATIONS)
    log = []
    for trial in range(EVALUATIONS):
        asked = optimizer.ask()
        weights.data.copy_(torch.as_tensor(asked.value))
        loss = mean_loss(work, few) + SPARSITY * float(weights.abs().mean())
        optimizer.tell(asked, loss)
        log.append({"step": trial + 1, "loss": loss, "weights": weights.tolist()})
        if on_step:
            on_step(trial + 1, EVALUATIONS, f"loss {loss:.3f}")
    weights.data.copy_(torch.as_tensor(optimizer.provide_recommendation().value))
    return log


@torch.no_grad()
def merge(experts: Sequence[Expert], how: str, seed: int) -> Adapter:
    """One LoRA for all experts, by the functions that PEFT merges with; float32."""
    names = sorted({name for expert in experts for name in expert.updates})
    ranks = [sum(len(expert.updates[name].a) for expert in experts if name in expert.updates) for name in names]
    rank = min(max(ranks), MAX_RANK)
    tensors: dict[str, StoredTensor] = {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name in names:
            merged = _merged([expert.updates[name].delta() for expert in experts if name in expert.updates], how)
            tensors[tensor_name(name, "A")], tensors[tensor_name(name, "B")] = map(stored, factor(merged, rank))
    return Adapter(AdapterConfig(r=rank, lora_alpha=rank, target_modules=tuple(names)), tensors)


def factor(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank), their product the nearest of that rank; rows of zeros where there are fewer."""
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    a, b = delta.new_zeros(rank, delta.shape[1]), delta.new_zeros(delta.shape[0], rank)
    a[:kept], b[:, :kept] = root[:, None] * v[:kept], u[:, :kept] * root
    return a, b


def _merged(deltas: list[Tensor], how: str) -> Tensor:
    from peft.utils.merge_utils import dare_linear, ties

    if how == "ties":
        merged: Tensor = ties(deltas, torch.ones(len(deltas)), DENSITY[how])
    else:
        merged = dare_linear(deltas, torch.full((len(deltas),), 1 / len(deltas)), DENSITY[how])
    return merged


def _nevergrad() -> Any:
    try:
        import nevergrad
    except ImportError as error:
        raise MissingError(
            "PACKAGE_MISSING", "this method searches with nevergrad, which is not installed",
            fix="pip install 'fedcompose-coordinator[lorahub]'",
        ) from error  # fmt: skip
    return nevergrad
