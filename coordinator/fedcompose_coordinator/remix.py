"""ReMix: learn whom to pick by picking, without a gradient through the picks.

Every row is read `selections` times, each time under experts drawn anew for every token and point at one constant
weight. A draw whose completion was likelier than that of the row's other draws becomes likelier itself. Nothing is
differentiated but the probability of the draws, so without an attention LoRA no gradient passes through the model.

Source: ReMix (arXiv 2603.10160). There the LoRAs are trained too, at a constant weight of 2/(k·rank) or
2/√(k·rank) in place of alpha/rank; ours are frozen and keep their own scale, times 1/k or 1/√k.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedcompose.model.router import RoutingDecision
from fedcompose_coordinator.completion import Pass, completion_losses
from fedcompose_coordinator.objectives import rloo_loss
from fedcompose_coordinator.work import Work


def sampled_losses(work: Work, batch: Pass) -> tuple[Tensor, Tensor, Mapping[int, RoutingDecision]]:
    """(Σ of the rows' mean losses, what to add for the gradient of the router, the decisions of the last draw)."""
    losses, log_probs = [], []
    for _ in range(work.settings.selections):
        with work.model.routing.recording() as record:
            losses.append(completion_losses(work.model, batch))
        log_probs.append(log_probability(batch, record.calls[0]))
    drawn = torch.stack(losses)
    return drawn.mean(0).sum(), rloo_loss(drawn, torch.stack(log_probs)), record.calls[0]


def log_probability(batch: Pass, call: Mapping[int, RoutingDecision]) -> Tensor:
    """log Q of all that was drawn in a pass, over points and real tokens, for each row; (rows,)."""
    total = torch.zeros(len(batch.labels), device=batch.labels.device)
    for stream in batch.streams:
        for decision in call.values():
            if decision.log_prob is not None and decision.log_prob.shape == stream.real.shape:
                total = total + (decision.log_prob * stream.real).sum(-1)
    return total
