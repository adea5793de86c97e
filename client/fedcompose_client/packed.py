"""The packed engine: exact policy gradients for one on-policy update, with the repeated work left out.

A prompt and all its completions are one row with a tree-shaped attention mask: the prompt is computed once and every
completion sees the prompt and itself. Identical completions are merged by adding their advantages, and groups whose
samples all earned the same reward, which have no gradient, are not computed at all. Since each batch is used for one
update by the policy that sampled it, the importance ratio is 1: no clipping, no stored log-probabilities, no reference
model. The result is the gradient of TRL's `dr_grpo` loss with unscaled rewards (a test holds the two together).

Supervised warm-up is the same computation: one completion of weight 1 per prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

MAX_BATCH_TOKENS = 1536  # tokens of one forward and backward pass, padding included; bounds memory


@dataclass(frozen=True)
class Tree:
    """One prompt and its weighted completions (token ids)."""

    prompt: tuple[int, ...]
    branches: tuple[tuple[tuple[int, ...], float], ...]

    def __len__(self) -> int:
        return len(self.prompt) + sum(len(tokens) for tokens, _ in self.branches)


def advantage_tree(
    prompt: Sequence[int], completions: Sequence[tuple[int, ...]], rewards: Sequence[float]
) -> Tree | None:
    """A group's completions weighted by reward minus the group's mean; None when that is zero everywhere.

    The advantage is not divided by the group's standard deviation (Dr. GRPO, arXiv 2503.20783): on small models the
    division was seen to destroy the policy.
    """
    mean = sum(rewards) / len(rewards)
    merged: dict[tuple[int, ...], float] = {}
    for tokens, reward in zip(completions, rewards, strict=True):
        merged[tokens] = merged.get(tokens, 0.0) + reward - mean
    branches = tuple((tokens, weight) for tokens, weight in merged.items() if abs(weight) > 1e-9)
    return Tree(tuple(prompt), branches) if branches else None


def backward(model: Any, trees: Sequence[Tree], normaliser: float, pad_id: int, temperature: float = 1.0) -> float:
    """Add the gradient of −Σ weight·log p(completion | prompt) / `normaliser`; returns that loss.

    p is the model at `temperature`, which must be the one that the completions were sampled at.

    Source: Dr. GRPO (arXiv 2503.20783) with the on-policy ratio 1.
    """
    total = 0.0
    for batch in _batches(trees):
        loss = _loss(model, batch, pad_id, temperature) / normaliser
        loss.backward()
        total += loss.item()
    return total


def log_probabilities(model: Any, trees: Sequence[Tree], pad_id: int) -> list[list[float]]:
    """log p(completion | prompt) of every completion of every tree; weights do not count."""
    found: dict[int, list[float]] = {}
    with torch.no_grad():
        for batch in _batches(trees):
            costs = iter(_costs(model, batch, pad_id, 1.0).tolist())
            for tree in batch:
                found[id(tree)] = [-sum(itertools.islice(costs, len(tokens))) for tokens, _ in tree.branches]
    return [found[id(tree)] for tree in trees]


def _loss(model: Any, trees: Sequence[Tree], pad_id: int, temperature: float) -> torch.Tensor:
    """Scalar: −Σ weight·log p over every completion token of every tree."""
    weights = [weight for tree in trees for tokens, weight in tree.branches for _ in tokens]
    costs = _costs(model, trees, pad_id, temperature)
    return (costs * torch.tensor(weights, device=costs.device)).sum()


def _costs(model: Any, trees: Sequence[Tree], pad_id: int, temperature: float) -> torch.Tensor:
    """(completion tokens of all trees, in order): −log p of each."""
    device = next(model.parameters()).device
    width = max(map(len, trees))
    first = min(len(tree.prompt) for tree in trees) - 1
    ids = torch.full((len(trees), width), pad_id)
    positions = torch.zeros(len(trees), width, dtype=torch.long)
    mask = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)
    where: list[tuple[int, int]] = []  # (row, position that predicts)
    targets: list[int] = []
    for row, tree in enumerate(trees):
        start = len(tree.prompt)
        ids[row, :start] = torch.tensor(tree.prompt)
        positions[row, :start] = torch.arange(start)
        mask[row, :start, :start] = torch.ones(start, start, dtype=torch.bool).tril()
        for tokens, _ in tree.branches:
            end = start + len(tokens)
            ids[row, start:end] = torch.tensor(tokens)
            positions[row, start:end] = torch.arange(len(tree.prompt), len(tree.prompt) + len(tokens))
            mask[row, start:end, : len(tree.prompt)] = True
            mask[row, start:end, start:end] = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
            where += [(row, position - first) for position in (len(tree.prompt) - 1, *range(start, end - 1))]
            targets += tokens
            start = end
    logits = model(
        input_ids=ids.to(device),
        attention_mask=mask[:, None].to(device),
        position_ids=positions.to(device),
        use_cache=False,
        logits_to_keep=torch.arange(first, width, device=device),  # a tensor: a slice would be copied per row
    ).logits
    rows, columns = torch.tensor(where, device=device).T
    scores = logits[rows, columns].float()
    if temperature != 1:
        scores = scores / temperature
    return torch.nn.functional.cross_entropy(scores, torch.tensor(targets, device=device), reduction="none")


def _batches(trees: Sequence[Tree]) -> Iterator[list[Tree]]:
    """Trees of like length together, at most `MAX_BATCH_TOKENS` with padding."""
    batch: list[Tree] = []
    for tree in sorted(trees, key=len):
        if batch and len(tree) * (len(batch) + 1) > MAX_BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch
