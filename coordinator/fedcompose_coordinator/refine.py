"""Train copies of the experts on their own domains' lessons; what comes of it is no site's expert any more.

LoRA-Mixer (arXiv 2507.00029) trains experts and router jointly: in its hard phase the domain's label decides who
speaks, so that each expert sees its own domain alone, and in its soft phase the router learns. In a federation the
hard phase is what the sites did, on data that we do not have; experts stay as they were signed, and only the soft
phase is left. Who wants the hard phase as well, on the lessons, asks for `expert_steps`. A candidate made so says
`changed`, carries the copies in changed/, can be measured, and is never released.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcompose.adapter import Adapter, AdapterConfig, tensor_name
from fedcompose.model.composed import stored
from fedcompose.model.experts import Expert, Update
from fedcompose_coordinator.completion import completion_losses, make_pass
from fedcompose_coordinator.lessons import Row, micro_batches, plan_batches, targets
from fedcompose_coordinator.methods import ComposeSettings
from fedcompose_coordinator.objectives import preserve_loss


class LearningLinear(nn.Module):
    """A frozen linear with one LoRA that learns, in float32."""

    def __init__(self, linear: nn.Linear, update: Update) -> None:
        super().__init__()
        self.linear, self.scale = linear, update.scale
        device = linear.weight.device
        self.a, self.b = (nn.Parameter(part.float().to(device, copy=True)) for part in (update.a, update.b))

    def forward(self, x: Tensor) -> Tensor:
        added = functional.linear(functional.linear(x.float(), self.a), self.b) * self.scale
        y: Tensor = self.linear(x) + added.to(x.dtype)
        return y


def refine(
    model: Any,
    experts: Sequence[Expert],
    rows: Sequence[Sequence[Row]],
    pad_id: int,
    settings: ComposeSettings,
    seed: int,
) -> list[Expert]:
    """Copies of the experts, each trained on its own rows inside the plain base."""
    own = zip(experts, rows, strict=True)
    return [_train_on(model, expert, some, pad_id, settings, seed) for expert, some in own]


def _train_on(
    model: Any, expert: Expert, rows: Sequence[Row], pad_id: int, settings: ComposeSettings, seed: int
) -> Expert:
    """A copy of `expert` that learned from `rows`, held near what was shipped by `preserve`."""
    with _learning(model, expert.updates) as linears:
        trained = [part for linear in linears.values() for part in (linear.a, linear.b)]
        shipped = [part.detach().clone() for part in trained]
        optimizer = torch.optim.AdamW(trained, lr=settings.expert_lr, weight_decay=0.0)
        for batch in plan_batches(rows, settings.batch, settings.expert_steps, seed):
            optimizer.zero_grad()
            for part in micro_batches(batch):
                (completion_losses(model, make_pass(model, part, pad_id)).sum() / targets(batch)).backward()
            (settings.preserve * preserve_loss(trained, shipped)).backward()
            nn.utils.clip_grad_norm_(trained, settings.clip)
            optimizer.step()
        updates = {
            name: Update(linear.a.detach().cpu(), linear.b.detach().cpu(), linear.scale)
            for name, linear in linears.items()
        }
    return Expert(expert.name, updates)


def as_adapter(expert: Expert) -> Adapter:
    """An expert as files hold it; ranks and alphas are stated module by module."""
    tensors, ranks, alphas = {}, {}, {}
    for name, update in expert.updates.items():
        tensors[tensor_name(name, "A")], tensors[tensor_name(name, "B")] = stored(update.a), stored(update.b)
        ranks[name], alphas[name] = len(update.a), update.scale * len(update.a)
    first = next(iter(ranks))
    config = AdapterConfig(
        r=ranks[first], lora_alpha=alphas[first], target_modules=tuple(ranks), rank_pattern=ranks, alpha_pattern=alphas
    )
    return Adapter(config, tensors)


@contextmanager
def _learning(model: Any, updates: Mapping[str, Update]) -> Iterator[dict[str, LearningLinear]]:
    """The model with these updates in it, ready to learn; without them again afterwards."""
    plain = {name: model.get_submodule(name) for name in updates}
    linears = {name: LearningLinear(plain[name], update) for name, update in updates.items()}
    for name, linear in linears.items():
        model.set_submodule(name, linear)
    try:
        yield linears
    finally:
        for name, linear in plain.items():
            model.set_submodule(name, linear)
