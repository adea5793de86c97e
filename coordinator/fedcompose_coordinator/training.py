"""The training loop: router and attention LoRA learn from lessons; nothing else can.

Each step reads equally many lessons of every domain, in parts of like length, and adds to the loss of the next token
what the recipe wants of `objectives.py`. Router weights are float32 with a learning rate of their own, because in the
base's number format they would hardly move. What the loop deliberately has not: gradients of anything frozen, weight
decay, logits of the prompt. It is deterministic on one machine with one number of threads, and a run that was cut off
continues from its checkpoint to the same digests.

Source: Hard-Routed Mixtures of Reasoning LoRAs (arXiv 2606.31413), stage II.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from fedcompose.errors import ConfigError
from fedcompose.model.estimators import Gumbel
from fedcompose.model.router import RoutingDecision
from fedcompose_coordinator.checkpoint import resume, save_checkpoint
from fedcompose_coordinator.completion import Pass, Stream, completion_losses
from fedcompose_coordinator.lessons import Row, hold_back, length, micro_batches, plan_batches, targets
from fedcompose_coordinator.methods import ComposeSettings
from fedcompose_coordinator.objectives import balance_loss, consistency_loss, entropy, entropy_loss, guidance_loss
from fedcompose_coordinator.remix import sampled_losses
from fedcompose_coordinator.work import Work

HELD_BACK = 8  # one lesson of so many is only checked on, where training may stop early
COLD = 0.1  # share of the steps, at the end, at the last temperature

OnStep = Callable[[int, int, str], None]
Call = Mapping[int, RoutingDecision]


@dataclass
class Tally:
    """What one step did, as sums, so that parts add up.

    Routing is counted at every point, at the positions that write a completion.
    """

    loss: Tensor  # ()
    entropy: Tensor  # (), nats
    chosen: Tensor  # (domains, experts)

    @classmethod
    def empty(cls, domains: int, experts: int, device: torch.device) -> Tally:
        zero = torch.zeros((), device=device)
        return cls(zero, zero, torch.zeros(domains, experts, device=device))

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.loss + other.loss, self.entropy + other.entropy, self.chosen + other.chosen)


def train(
    work: Work, accelerator: Accelerator, checkpoint: Path, inputs: str, on_step: OnStep | None
) -> list[dict[str, Any]]:
    """Train in place and return the log, one line per step; `inputs` names the run that a checkpoint belongs to."""
    settings, learned = work.settings, work.learned
    trained = [*work.attention, *learned]
    groups = [(list(work.attention), settings.attention_lr), (learned, settings.router_lr)]
    optimizer = torch.optim.AdamW([{"params": some, "peak": rate} for some, rate in groups if some], weight_decay=0.0)
    start = [parameter.detach().clone() for parameter in learned]
    taught, held = hold_back(work.rows, HELD_BACK) if settings.patience else (work.rows, [])
    plan = plan_batches(taught, settings.batch, settings.steps, work.seed)
    log = resume(checkpoint, inputs, trained, optimizer)

    while len(log) < settings.steps and not out_of_patience(log, settings.patience):
        step, began = len(log), time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, settings)
        cool(work, step)
        parts = micro_batches(plan[step], together=compares_domains(settings))
        tally = Tally.empty(len(work.domains), len(work.experts), accelerator.device)
        optimizer.zero_grad(set_to_none=False)
        for index in range(accelerator.process_index, len(parts), accelerator.num_processes):
            torch.manual_seed(work.seed + 1_000_003 * step + 1_009 * index)  # the noise of estimators that have some
            tally += learn(work, accelerator, parts[index], plan[step], rising(step, settings))
        _sum_over_processes(accelerator, trained, tally)
        norm = nn.utils.clip_grad_norm_(trained, settings.clip)
        _check_finite(tally.loss, norm, step)
        optimizer.step()

        log.append(_line(work, step, tally, norm, _moved(learned, start) if learned else None))
        checks = (step + 1) % settings.checkpoint_every == 0
        if held and checks:
            log[-1]["held_loss"] = mean_loss(work, held)
        log[-1]["seconds"] = round(time.perf_counter() - began, 3)
        if checks and accelerator.is_main_process:
            save_checkpoint(checkpoint, inputs, trained, optimizer, log)
        if on_step:
            on_step(step + 1, settings.steps, _note(log[-1]))
    return log


def learn(work: Work, accelerator: Accelerator, part: Sequence[Row], step: Sequence[Row], besides: float) -> Tally:
    """Add up the gradients of one part of a step; `besides` is the weight of the router's own losses."""
    batch = work.read(part)
    written, drawn, call = completion_loss(work, batch)
    loss = (written + drawn) / targets(step)
    taught = besides * router_loss(work, batch, part, call) * length(part) / length(step)
    accelerator.backward(loss + taught)
    empty = Tally.empty(len(work.domains), len(work.experts), accelerator.device)
    return _tally(written.detach() / targets(step), batch, part, call, empty.chosen)


def completion_loss(work: Work, batch: Pass) -> tuple[Tensor, Tensor | float, Call]:
    """Of one pass: Σ −log p of completion tokens; what to add for the gradient of sampled routers; the decisions."""
    if work.recipe.made == "sampled":
        return sampled_losses(work, batch)
    with work.recording() as record:
        written = completion_losses(work.model, batch).sum()
    return written, 0.0, record.calls[0] if record.calls else {}


def router_loss(work: Work, batch: Pass, rows: Sequence[Row], call: Call) -> Tensor | float:
    """What else the router is taught, weighted, a mean over points and real tokens of the pass, prompts included."""
    total: Tensor | float = 0.0
    own = _owned(work, rows)
    for stream, p, _ in by_stream(batch, call):
        row = stream.real.nonzero()[:, 0]
        total = total + len(p) / len(call) * taught_besides(work, p[:, stream.real], own.to(p)[row], row)
    return total


def taught_besides(work: Work, p: Tensor, own: Tensor, sequence: Tensor) -> Tensor:
    """p (points, tokens, experts), own (tokens, experts), sequence (tokens,); see `objectives`."""
    settings, loss = work.settings, p.new_zeros(())
    if settings.guidance:
        loss = loss + settings.guidance * guidance_loss(p, own)
    if settings.balance:
        loss = loss + settings.balance * balance_loss(p, work.recipe.top_k)
    if settings.entropy:
        loss = loss + settings.entropy * entropy_loss(p, settings.entropy_form)
    if settings.consistency:
        over = sequence if settings.consistency_over == "sequence" else None
        loss = loss + settings.consistency * consistency_loss(p, over)
    return loss


def compares_domains(settings: ComposeSettings) -> bool:
    """Whether a loss looks at the tokens of a pass together, so that each pass must hold every domain."""
    return bool(settings.balance or (settings.entropy and settings.entropy_form == "inform"))


def by_stream(batch: Pass, call: Call) -> Iterator[tuple[Stream, Tensor, Tensor]]:
    """Probabilities (points, rows, width, experts) and choices (points, rows, width) of what reads each stream."""
    for stream in batch.streams:
        here = [each for each in call.values() if each.choice.shape == stream.real.shape]
        probabilities = [each.probabilities for each in here if each.probabilities is not None]
        if probabilities:
            yield stream, torch.stack(probabilities), torch.stack([each.choice for each in here])


def schedule(step: int, settings: ComposeSettings) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine that ends near zero."""
    warm = math.ceil(settings.warm_up * settings.steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, settings.steps - warm)))


def rising(step: int, settings: ComposeSettings) -> float:
    """Share of the weights of the router's own losses, which may rise from 0."""
    return min(1.0, (step + 1) / max(1.0, settings.losses_warm_up * settings.steps))


def temperature(step: int, settings: ComposeSettings) -> float:
    """Falls exponentially from start to end; the last tenth of the steps is held there."""
    done = min(1.0, step / max(1.0, (1 - COLD) * settings.steps - 1))
    return float(settings.temperature_start * (settings.temperature_end / settings.temperature_start) ** done)


def cool(work: Work, step: int) -> None:
    """Lower the temperature of a Gumbel estimator; others have none."""
    estimator = work.model.router.estimator if work.experts else None
    if isinstance(estimator, Gumbel):
        estimator.tau = temperature(step, work.settings)


@torch.no_grad()
def mean_loss(work: Work, rows: Sequence[Row]) -> float:
    """Mean −log p of a completion token."""
    parts = micro_batches(rows)
    total = sum(float(completion_losses(work.model, work.read(part)).sum()) for part in parts)
    return total / targets(rows)


def out_of_patience(log: Sequence[Mapping[str, Any]], patience: int | None) -> bool:
    """Whether the last `patience` checks all missed the best one before them."""
    checks = [line["held_loss"] for line in log if "held_loss" in line]
    if patience is None or len(checks) <= patience:
        return False
    return bool(min(checks[-patience:]) >= min(checks[:-patience]))


def _owned(work: Work, rows: Sequence[Row]) -> Tensor:
    """(rows, experts), 1 for the experts of a row's domain."""
    own = torch.zeros(len(rows), len(work.experts))
    for index, row in enumerate(rows):
        own[index, list(work.owners[row.domain])] = 1
    return own


def _tally(written: Tensor, batch: Pass, rows: Sequence[Row], call: Call, like: Tensor) -> Tally:
    """Sums over one pass; `like` has the shape and place of `Tally.chosen`."""
    tally = Tally(written, torch.zeros_like(written), torch.zeros_like(like))
    domains = torch.tensor([row.domain for row in rows], device=like.device)
    for stream, p, choice in by_stream(batch, call):
        tally.entropy += (entropy(p.detach()) * stream.writes).sum()
        chosen = functional.one_hot(choice, p.shape[-1]) * stream.writes[..., None]
        tally.chosen.index_add_(0, domains, chosen.sum((0, 2)).to(like))
    return tally


def _sum_over_processes(accelerator: Accelerator, trained: Sequence[nn.Parameter], tally: Tally) -> None:
    """Make every process see the whole step; what is trained is small, so gradients are simply added up."""
    if accelerator.num_processes == 1:
        return
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad = accelerator.reduce(parameter.grad, reduction="sum")
    for name, value in vars(tally).items():
        setattr(tally, name, accelerator.reduce(value, reduction="sum"))


def _check_finite(loss: Tensor, norm: Tensor, step: int) -> None:
    """Raises: ConfigError: `COMPOSE_DIVERGED`, before a number that is none gets into the weights."""
    if not (loss + norm).isfinite():
        raise ConfigError(
            "COMPOSE_DIVERGED",
            f"in step {step + 1} the loss or its gradient is not a number",
            got=f"loss {float(loss)}, norm of the gradient {float(norm)}",
            fix="smaller learning rates: router_lr, attention_lr",
        )


def _moved(learned: Sequence[Tensor], start: Sequence[Tensor]) -> float:
    """How far the router is from where it began, in units of its length then."""
    way = torch.stack([(now.detach() - then).norm() for now, then in zip(learned, start, strict=True)]).norm()
    return float(way / torch.stack([then.norm() for then in start]).norm())


def _line(work: Work, step: int, tally: Tally, norm: Tensor, moved: float | None) -> dict[str, Any]:
    """One line of training.jsonl; `own_share` of a domain is what its own experts were given of it."""
    line: dict[str, Any] = {"step": step + 1, "loss": float(tally.loss), "gradient_norm": float(norm)}
    decisions = float(tally.chosen.sum())
    if decisions:
        share = (tally.chosen / tally.chosen.sum(1, keepdim=True)).tolist()
        owners = zip(work.domains, work.owners, share, strict=True)
        own = {domain: sum(given[expert] for expert in experts) for domain, experts, given in owners if experts}
        line |= {
            "entropy": float(tally.entropy) / decisions,
            "share": dict(zip(work.domains, share, strict=True)),
            "own_share": own,
            "routing_accuracy": sum(own.values()) / len(own) if own else None,
            "router_moved": moved,
        }
    return line


def _note(line: Mapping[str, Any]) -> str:
    accuracy = line.get("routing_accuracy")
    return f"loss {line['loss']:.3f}" + (f"  routing {accuracy:.0%}" if accuracy is not None else "")
