"""Estimators: scores (..., experts) → a decision. Where a gradient is wanted they say which one the scores get.

Scores are being learned where gradients are enabled and the scores require one; elsewhere a decision is what use
is made of the router: deterministic, without probabilities. Noise comes from torch's own generator, so a caller
who seeds it repeats a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fedcompose.model.router import OneExpert, RoutingDecision

Estimator = Callable[[Tensor], RoutingDecision]


def hard(scores: Tensor) -> RoutingDecision:
    """One expert per token at weight exactly 1; ties go to the lower index.

    Learning, the weights carry the dense straight-through estimator, onehot(argmax) forward and softmax
    backward, so that dL/dscore_i = Σ_e p_e (δ_ei − p_i) dL/dw_e over *all* experts e.
    Source: arXiv 2606.31413, Y = sg(onehot(j) − P) + P.
    """
    choice = scores.argmax(-1)  # documented to return the first of equal maxima
    if not _learning(scores):
        return OneExpert(choice, scores.shape[-1])
    onehot = functional.one_hot(choice, scores.shape[-1]).to(scores.dtype)
    probabilities = scores.softmax(-1)
    return RoutingDecision(_straight_through(onehot, probabilities), choice, probabilities, hard=True)


def hard_selected(scores: Tensor) -> RoutingDecision:
    """As `hard`, but only the chosen expert j is asked: dL/dscore_i = p_j (δ_ij − p_i) dL/dw_j.

    This is what the reference code of arXiv 2606.31413 does, in contrast to its text. It costs less, and can only
    push the chosen expert up or down.
    """
    decision = hard(scores)
    if decision.probabilities is None:
        return decision
    onehot = decision.weights.detach()
    weights = onehot * decision.weights
    return RoutingDecision(weights, decision.choice, decision.probabilities, hard=True, selected=True)


class Gumbel:
    """One expert per token, while learning drawn from softmax(scores) and not simply its maximum.

    Backward is the softmax of the same noisy scores at temperature `tau`, which the training loop may lower.
    """

    def __init__(self, tau: float = 1.0) -> None:
        self.tau = tau

    def __call__(self, scores: Tensor) -> RoutingDecision:
        if not _learning(scores):
            return hard(scores)
        noisy = scores + _gumbel_noise(scores)
        choice = noisy.argmax(-1)
        onehot = functional.one_hot(choice, scores.shape[-1]).to(scores.dtype)
        weights = _straight_through(onehot, (noisy / self.tau).softmax(-1))
        return RoutingDecision(weights, choice, scores.softmax(-1), hard=True)


class Soft:
    """Every expert at its probability; in use, where `k` is given, only the k most probable."""

    def __init__(self, k: int | None = None, normalise: bool = False) -> None:
        self.k, self.normalise = k, normalise

    def __call__(self, scores: Tensor) -> RoutingDecision:
        probabilities = scores.softmax(-1)
        if _learning(scores):
            return RoutingDecision(probabilities, scores.argmax(-1), probabilities)
        weights = probabilities if self.k is None else _keep(probabilities, scores, self.k, self.normalise)
        return RoutingDecision(weights, scores.argmax(-1))


class TopK:
    """The k most probable experts at their probabilities, which sum to 1 again when `normalise`."""

    def __init__(self, k: int, normalise: bool = False) -> None:
        self.k, self.normalise = k, normalise

    def __call__(self, scores: Tensor) -> RoutingDecision:
        probabilities = scores.softmax(-1)
        weights = _keep(probabilities, scores, self.k, self.normalise)
        return RoutingDecision(weights, scores.argmax(-1), probabilities if _learning(scores) else None)


class Sampled:
    """k experts at one constant weight: while learning drawn without replacement, in use the k best.

    The weights have no gradient. `log_prob` has: the log-probability of the draw in its order (Plackett–Luce),
    Σ_j score_{i_j} − log Σ_{e not drawn before} exp score_e, for a loss that rewards good draws.
    Source: ReMix, with its constant weight ω in place of a learned one.
    """

    def __init__(self, k: int, weight: float) -> None:
        self.k, self.weight = k, weight

    def __call__(self, scores: Tensor) -> RoutingDecision:
        learning = _learning(scores)
        ranked = scores.detach() + _gumbel_noise(scores) if learning else scores
        drawn = ranked.topk(min(self.k, scores.shape[-1]), dim=-1).indices
        weights = torch.zeros_like(ranked).scatter(-1, drawn, self.weight)
        if not learning:
            return RoutingDecision(weights, scores.argmax(-1))
        return RoutingDecision(weights, drawn[..., 0], scores.softmax(-1), plackett_luce(scores, drawn))


def identity(scores: Tensor) -> RoutingDecision:
    """The scores are the weights."""
    return RoutingDecision(scores, scores.argmax(-1))


def plackett_luce(scores: Tensor, drawn: Tensor) -> Tensor:
    """Log-probability of drawing experts `drawn` (..., k) in this order, without replacement; (...)."""
    remaining, total = scores, scores.new_zeros(scores.shape[:-1])
    for index in drawn.unbind(-1):
        index = index[..., None]
        total = total + remaining.log_softmax(-1).gather(-1, index)[..., 0]
        remaining = remaining.scatter(-1, index, -torch.inf)
    return total


def constant_weight(scale: str, k: int) -> float:
    """ω of `k` experts that share the work: 1, 1/k (LoRA's scaling) or 1/√k (rsLoRA's)."""
    return {"unit": 1.0, "1/k": 1 / k, "1/sqrt(k)": 1 / math.sqrt(k)}[scale]


def _learning(scores: Tensor) -> bool:
    return torch.is_grad_enabled() and scores.requires_grad


def _straight_through(forward: Tensor, backward: Tensor) -> Tensor:
    # The difference is exactly 0; summed in another order a weight could come out as 1 − 6e-8.
    return forward + (backward - backward.detach())


def _gumbel_noise(like: Tensor) -> Tensor:
    return -torch.empty_like(like, requires_grad=False).exponential_().log()


def _keep(probabilities: Tensor, scores: Tensor, k: int, normalise: bool) -> Tensor:
    """The k largest of `probabilities`, the others 0."""
    best, index = scores.topk(min(k, scores.shape[-1]), dim=-1)
    kept = best.softmax(-1) if normalise else probabilities.gather(-1, index)
    return torch.zeros_like(probabilities).scatter(-1, index, kept)
