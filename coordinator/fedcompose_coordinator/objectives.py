"""What a router can be taught besides the next token: every loss of the papers, and one of our own, as a function.

`p` are a router's probabilities, (points, tokens, experts) float32: a point is one place where it decides, a block
or a linear, and `tokens` are real ones, padding left out. Every loss is a mean over points and tokens, so that its
weight means the same for a large batch and a small one.

    balance       no expert is chosen far more often than another          Switch Transformer; arXiv 2606.31413
    entropy       each token's choice clear, or open, or clear and balanced  LoRA-Mixer's RSL (arXiv 2507.00029)
    consistency   all points agree about a token, or about a sequence       arXiv 2606.31413, its code
    preserve      trained experts stay near what the sites shipped          LoRA-Mixer
    guidance      a lesson's own domain's expert speaks                     ours
    rloo          better selections become likelier                         ReMix (arXiv 2603.10160)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

Entropy = Literal["sharpen", "explore", "inform"]


def balance_loss(p: Tensor, top_k: int) -> Tensor:
    """K Σ_i p̄_i f_i, f_i the share of choices that fell on expert i; 1 when all are chosen alike, K when one is.

    Only p̄ has a gradient: it lowers the probability of experts that are chosen often. The mean must be over tokens of
    every domain, or it drives each domain away from its own expert.
    """
    experts = p.shape[-1]
    chosen = functional.one_hot(p.topk(min(top_k, experts), dim=-1).indices, experts).sum(-2)
    share = chosen.to(p).mean(-2) / min(top_k, experts)
    return (experts * p.mean(-2) * share).sum(-1).mean()


def entropy_loss(p: Tensor, form: Entropy) -> Tensor:
    """In nats. "sharpen": E[H(p)], each token's choice becomes clear. "explore": −E[H(p)], it stays open.
    "inform": E[H(p)] − H(E[p]), clear for each token and balanced over all, minus the mutual information.

    The RSL of LoRA-Mixer is `balance_loss` and one of the first two: its formula says explore, its prose and its
    numbers say sharpen, so we have no default sign.
    """
    if form not in get_args(Entropy):
        raise ValueError(f"no such form of the entropy loss: {form}")
    each = entropy(p).mean()
    if form == "inform":
        return each - entropy(p.mean(-2)).mean()
    return each if form == "sharpen" else -each


def entropy(p: Tensor) -> Tensor:
    """(..., experts) → (...), nats."""
    return -(p * _log(p)).sum(-1)


def consistency_loss(p: Tensor, sequence: Tensor | None = None) -> Tensor:
    """Gini impurity 1 − Σ_i p̄_i² of the mean over points, of each token, or of each sequence if `sequence` (tokens,)
    says to which one a token belongs; 0 when all points agree on one expert."""
    mean = p.mean(0)
    if sequence is not None:
        _, rows, counts = sequence.unique(return_inverse=True, return_counts=True)
        mean = mean.new_zeros(len(counts), p.shape[-1]).index_add(0, rows, mean) / counts[:, None]
    return (1 - mean.square().sum(-1)).mean()


def guidance_loss(p: Tensor, own: Tensor) -> Tensor:
    """−log of the probability that one of a token's own experts speaks; `own` (tokens, experts) is 1 for these.

    A token without own experts is guided nowhere.
    """
    guided = own.any(-1)
    spoken = (p * own).sum(-1)[:, guided]
    return -_log(spoken).sum() / max(1, spoken.numel())


def preserve_loss(trained: Sequence[Tensor], shipped: Sequence[Tensor]) -> Tensor:
    """Σ ‖θ − θ⁰‖² over an expert's tensors."""
    return torch.stack([(now - then).square().sum() for now, then in zip(trained, shipped, strict=True)]).sum()


def _log(p: Tensor) -> Tensor:
    """Of a probability that may have become 0: there its gradient, too, is finite."""
    return p.clamp_min(torch.finfo(p.dtype).tiny).log()


def rloo_loss(losses: Tensor, log_probs: Tensor) -> Tensor:
    """Σ over rows of 1/(M−1) Σ_m (L_m − L̄) log Q_m; both (M, rows), of M independent selections for each row.

    Its gradient is an unbiased estimate of that of Σ E[L]: L̄ without L_m is a baseline that selection m cannot touch,
    and (L_m − L̄)/(M−1) is (L_m − the mean of the others)/M. A row's loss depends on its own selections alone, so rows
    are credited one by one.
    """
    if len(losses) < 2:
        raise ValueError("leave-one-out needs two selections or more")
    credit = (losses - losses.mean(0)).detach() / (len(losses) - 1)
    return (credit * log_probs).sum()
