"""RLOO on a real model that is small enough to try every selection: two layers, three tokens, two experts, pick one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcompose.bases import Base
from fedcompose.contribution import VerifiedContribution
from fedcompose.model.estimators import plackett_luce
from fedcompose.model.router import RoutingDecision
from fedcompose_coordinator.completion import completion_losses
from fedcompose_coordinator.lessons import Lesson, Row
from fedcompose_coordinator.methods import recipe
from fedcompose_coordinator.remix import log_probability, sampled_losses
from fedcompose_coordinator.work import Work, prepare

LAYERS, TOKENS = 2, 3
COPIES, BATCHES = 64, 80


class Told(nn.Module):
    """Follows a script of choices, (layers, tokens), and sums up how likely the router found them."""

    def __init__(self, router: Any, script: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.router, self.script, self.log_q = router, torch.tensor(script), torch.zeros(())

    def forward(self, hidden_states: Tensor, point: int) -> RoutingDecision:
        choice = self.script[point][None]
        scores = self.router.scorer(hidden_states, point)
        self.log_q = self.log_q + plackett_luce(scores, choice[..., None]).sum()
        return RoutingDecision(functional.one_hot(choice, 2).float(), choice)


@pytest.fixture
def work(contributions: list[VerifiedContribution], lessons: list[Lesson], base: Base) -> Work:
    made = prepare(contributions, lessons, base, recipe("remix", {"selections": 3}, {"top_k": 1}), 0, "cpu")
    made.model.float()
    for weight in made.model.router.scorer.weights:
        weight.data *= 20  # so that chances are not all alike
    return made


def _row(work: Work) -> Row:
    return Row(0, tuple(work.rows[0].ids[-TOKENS:]), TOKENS - 1)


def _exact(work: Work) -> Tensor:
    """∇ Σ_J Q(J) L(J), over all 64 selections."""
    total: Any = 0.0
    for flat in itertools.product((0, 1), repeat=LAYERS * TOKENS):
        told = Told(work.model.router, [flat[:TOKENS], flat[TOKENS:]])
        with work.model.routing.using(told):
            loss = completion_losses(work.model, work.read([_row(work)])).sum()
        total = total + told.log_q.exp() * loss.detach()
    return torch.cat([each.flatten() for each in torch.autograd.grad(total, work.learned)])


def _estimates(work: Work) -> Tensor:
    """(batches, parameters), each the mean over many copies of the row."""
    batch = work.read([_row(work)] * COPIES)
    found = []
    for seed in range(BATCHES):
        torch.manual_seed(seed)
        _, reward, _ = sampled_losses(work, batch)
        found.append(torch.cat([each.flatten() for each in torch.autograd.grad(reward / COPIES, work.learned)]))
    return torch.stack(found)


def test_the_gradient_is_unbiased(work: Work) -> None:
    exact, estimates = _exact(work), _estimates(work)

    errors = estimates.std(0) / math.sqrt(BATCHES)
    matters = errors > 1e-3 * errors.max()
    z = ((estimates.mean(0) - exact) / errors)[matters]
    # The numbers of one gradient depend on one another: one direction is tested, and none may be far off.
    along = estimates @ exact
    z_along = float((along.mean() - exact @ exact) / (along.std() / math.sqrt(BATCHES)))
    assert abs(z_along) < 3.5 and float(z.abs().max()) < 5
    assert float(along.mean() / (along.std() / math.sqrt(BATCHES))) > 5  # it is not simply noise around zero


def test_the_log_probability_is_that_of_all_draws_and_of_no_padding(work: Work) -> None:
    rows = [_row(work), replace(_row(work), ids=work.rows[0].ids[-7:], prompt=5)]
    batch = work.read(rows)
    torch.manual_seed(0)
    with work.recording() as record:
        completion_losses(work.model, batch)

    found = log_probability(batch, record.calls[0])

    for index, row in enumerate(rows):
        by_hand = sum(float(d.log_prob[index, : len(row.ids)].detach().sum()) for d in record.calls[0].values())  # type: ignore[index]
        assert float(found[index]) == pytest.approx(by_hand, rel=1e-5)


def test_without_an_attention_lora_no_gradient_passes_through_the_model(work: Work) -> None:
    loss, reward, _ = sampled_losses(work, work.read([_row(work)]))
    assert not loss.requires_grad and reward.requires_grad
