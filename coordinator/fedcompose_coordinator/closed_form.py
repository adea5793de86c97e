"""Routers without training: computed from the experts themselves, or from one reading of the lessons by the base.

    arrow      of each expert and linear, the input direction that its B·A amplifies most; needs no lessons
    centroid   of each domain and point, the mean of what the base's tokens look like there
    ridge      at each point, the linear classifier of domains with the least squared error
    prompt     the same over whole prompts, by their mean embedding
    phatgoose  of each expert and linear, a gate that opens for its own lessons; learned by the expert alone, here or,
               for `phatgoose-sites`, by its site

What is read are the hidden states of the base without experts, so what one site contributes does not depend on the
others: adding or removing a site takes one reading. All of a domain's experts are alike to centroid, ridge and prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcompose.errors import ConfigError
from fedcompose.model.controls import NoExpertRouter
from fedcompose.model.experts import Update
from fedcompose.model.gates import GatedExpert
from fedcompose.model.learned import PromptRouter
from fedcompose.model.router import Point, RoutingDecision
from fedcompose_coordinator.completion import Stream, completion_losses
from fedcompose_coordinator.lessons import micro_batches, plan_batches, targets
from fedcompose_coordinator.training import OnStep
from fedcompose_coordinator.work import Work

RIDGE = 1e-3  # added to the diagonal, as a share of its mean


def fit(work: Work, on_step: OnStep | None) -> list[dict[str, Any]]:
    """Compute the router's weights; only gates have steps to log."""
    router = work.recipe.router
    if router is None:
        raise ValueError("nothing to fit")
    if router.scorer == "arrow":
        _set_vectors(work, arrow_vectors(work))
    elif router.scorer == "centroid":
        _set_vectors(work, _by_expert(work, [moments.means for moments in read_moments(work, products=False)]))
    elif router.scorer == "phatgoose" and not work.recipe.needs_lessons:
        _set_vectors(work, shipped_gates(work))
    elif router.scorer == "phatgoose":
        return learn_gates(work, on_step)
    elif isinstance(work.model.router, PromptRouter):
        _set_classifiers(work, [prompt_moments(work)])
    else:
        _set_classifiers(work, read_moments(work))
    return []


# --- from the experts alone -----------------------------------------------------------------------


def arrow_vectors(work: Work) -> list[Tensor]:
    """(experts, width) for each point, which is a linear; zeros where an expert has no part.

    Raises: ConfigError: `ROUTER_INVALID` where blocks decide: they have no B·A of their own.
    """
    points = work.model.routing.points
    if work.recipe.router and work.recipe.router.decides != "linear":
        raise ConfigError("ROUTER_INVALID", "Arrow compares with a linear's own experts", expected='decides = "linear"')
    return [
        torch.stack([direction(each.updates[point.name]) if point.name in each.updates else torch.zeros(point.width)
                     for each in work.experts])
        for point in points
    ]  # fmt: skip


def direction(update: Update) -> Tensor:
    """The unit input that B·A makes longest, (in,): its first right singular vector, its largest entry positive.

    With B = QR it is that of the small R·A, so the product itself is never formed.
    """
    small = torch.linalg.qr(update.b.double()).R @ update.a.double()
    first = torch.linalg.svd(small, full_matrices=False).Vh[0]
    vector: Tensor = (first * first[first.abs().argmax()].sign()).float()
    return vector


# --- from what the base makes of the lessons ------------------------------------------------------


@dataclass
class Moments:
    """Of what one place reads: `means` (domains, width), and `gram` (width, width), the mean of x·xᵀ over the tokens
    of a domain, averaged over domains. The last entry of x is 1."""

    means: Tensor
    gram: Tensor


class Reader(nn.Module):
    """A router that lets nobody speak and sums up what it is shown of the real tokens of `streams`."""

    def __init__(self, points: Sequence[Point], experts: int, products: bool) -> None:
        super().__init__()
        self.silent, self.products = NoExpertRouter(experts), products
        self.streams: tuple[Stream, ...] = ()
        self.sums = [torch.zeros(point.width + 1, dtype=torch.float64) for point in points]
        self.grams = [torch.zeros(point.width + 1, point.width + 1, dtype=torch.float64) for point in points]

    def forward(self, hidden_states: Tensor, point: int) -> RoutingDecision:
        real = next(stream.real for stream in self.streams if stream.real.shape == hidden_states.shape[:2])
        x = with_one(hidden_states[real])
        self.sums[point] += x.sum(0)
        if self.products:
            self.grams[point] += x.T @ x
        decision: RoutingDecision = self.silent(hidden_states, point)
        return decision


def read_moments(work: Work, products: bool = True) -> list[Moments]:
    """The moments of every point, from one reading of all lessons; without `products` the means alone."""
    readers = [_read(work, domain, products) for domain in range(len(work.domains))]
    found = []
    for point in range(len(work.model.routing.points)):
        counted = [(reader.sums[point][-1], reader) for reader in readers]
        means = torch.stack([reader.sums[point] / count for count, reader in counted])
        grams = torch.stack([reader.grams[point] / count for count, reader in counted])
        found.append(Moments(means, grams.mean(0)))
    return found


@torch.no_grad()
def _read(work: Work, domain: int, products: bool) -> Reader:
    """What the base makes of one domain's lessons."""
    reader = Reader(work.model.routing.points, len(work.experts), products)
    with work.model.routing.using(reader):
        for part in micro_batches(work.rows_of(domain)):
            batch = work.read(part)
            reader.streams = batch.streams
            completion_losses(work.model, batch)
    return reader


@torch.no_grad()
def prompt_moments(work: Work) -> Moments:
    """The moments of the mean embedding of each lesson's prompt."""
    embedding = work.model.get_input_embeddings()
    means, grams = [], []
    for domain in range(len(work.domains)):
        prompts = [torch.tensor(row.ids[: row.prompt]) for row in work.rows_of(domain)]
        x = with_one(torch.stack([embedding(ids.to(embedding.weight.device)).float().mean(0) for ids in prompts]))
        means.append(x.mean(0))
        grams.append(x.T @ x / len(x))
    return Moments(torch.stack(means), torch.stack(grams).mean(0))


def ridge(moments: Moments, owners: Sequence[Sequence[int]], experts: int) -> Tensor:
    """(experts, width + 1), the last column the bias: the least-squares classifier of "this token is of my domain".

    Every domain counts the same, however many tokens it has.
    """
    target = moments.means.new_zeros(experts, len(owners))
    for domain, rows in enumerate(owners):
        target[list(rows), domain] = 1 / len(owners)
    penalty = RIDGE * moments.gram.diagonal().mean() * torch.eye(len(moments.gram), dtype=torch.float64)
    solved: Tensor = torch.linalg.solve(moments.gram + penalty, (target @ moments.means).T)
    return solved.T


def with_one(x: Tensor) -> Tensor:
    """(tokens, width) → (tokens, width + 1) float64 on the CPU."""
    return functional.pad(x.double().cpu(), (0, 1), value=1.0)


# --- gates (PHATGOOSE) ----------------------------------------------------------------------------


def shipped_gates(work: Work) -> list[Tensor]:
    """(experts, width) for each point, from what the sites signed; zeros where an expert has no part.

    Raises: ConfigError: `GATES_MISSING` when a site shipped none.
    """
    missing = [expert.name for expert, gates in zip(work.experts, work.gates, strict=True) if gates is None]
    if missing:
        raise ConfigError(
            "GATES_MISSING", f"these sites shipped no gates: {', '.join(missing)}",
            fix="at the site: fedcompose client gates, then contribute; or compose by phatgoose, which learns its own",
        )  # fmt: skip
    return [
        torch.stack([
            torch.tensor(gates[point.name]) if gates and point.name in gates else torch.zeros(point.width)
            for gates in work.gates
        ])
        for point in work.model.routing.points
    ]  # fmt: skip


def learn_gates(work: Work, on_step: OnStep | None) -> list[dict[str, Any]]:
    """Each expert's gates, learned on its own domain's lessons with nobody else about; then set as vectors.

    In the paper a site trains them on its own data. Here lessons stand for that, so that no site ships anything more.
    """
    learned: list[GatedExpert] = []
    log: list[dict[str, Any]] = []
    total = work.settings.steps * len(work.experts)
    for expert in range(len(work.experts)):
        gates = GatedExpert(work.model.routing.points, expert, len(work.experts)).to(work.model.device)
        for loss in _open_gates(work, gates):
            log.append({"step": len(log) + 1, "expert": work.experts[expert].name, "loss": loss})
            if on_step:
                on_step(len(log), total, f"loss {loss:.3f}")
        learned.append(gates)
    places = range(len(work.model.routing.points))
    _set_vectors(work, [torch.stack([gates.vectors[place].detach() for gates in learned]) for place in places])
    return log


def _open_gates(work: Work, gates: GatedExpert) -> Iterator[float]:
    """Train the gates of one expert; the loss of every step."""
    settings = work.settings
    rows = [row for row in work.rows if gates.expert in work.owners[row.domain]]
    optimizer = torch.optim.AdamW(gates.parameters(), lr=settings.router_lr, weight_decay=0.0)
    for batch in plan_batches(rows, settings.batch, settings.steps, work.seed):
        optimizer.zero_grad()
        loss = 0.0
        with work.model.routing.using(gates):
            for part in micro_batches(batch):
                each = completion_losses(work.model, work.read(part)).sum() / targets(batch)
                each.backward()
                loss += float(each.detach())
        optimizer.step()
        yield loss


# --- into the router ------------------------------------------------------------------------------


def _by_expert(work: Work, means: Sequence[Tensor]) -> list[Tensor]:
    """(domains, width + 1) → (experts, width) for each point."""
    domain_of = [next(d for d, rows in enumerate(work.owners) if e in rows) for e in range(len(work.experts))]
    return [each[domain_of, :-1].float() for each in means]


def _set_vectors(work: Work, vectors: Sequence[Tensor]) -> None:
    for weight, value in zip(work.model.router.scorer.weights, vectors, strict=True):
        weight.data.copy_(value)


def _set_classifiers(work: Work, moments: Sequence[Moments]) -> None:
    """One for each point, or, where all share one, that of the mean over points."""
    scorer = work.model.router.scorer
    if len(scorer.weights) == 1:
        means, grams = (torch.stack(parts).mean(0) for parts in zip(*((m.means, m.gram) for m in moments), strict=True))
        moments = [Moments(means, grams)]
    for index, each in enumerate(moments):
        solved = ridge(each, work.owners, len(work.experts)).float()
        scorer.weights[index].data.copy_(solved[:, :-1])
        scorer.biases[index].data.copy_(solved[:, -1])
