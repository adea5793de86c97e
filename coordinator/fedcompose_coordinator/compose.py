"""Compose: train the router and the attention LoRA; every expert stays as it was shipped, bit for bit.

Input: verified adapter contributions and lessons. Output: a candidate folder {composition.json,
router.safetensors, attention/, training.jsonl}, which appears whole or not at all.

The loop is plain next-token training on completions. What it deliberately has not: an auxiliary loss, a
router in the base's number format (it would hardly move), gradients of anything frozen, weight decay, logits
of the prompt. It is deterministic on one machine with one number of threads, and a run that was cut off
continues from its checkpoint to the same digests.

Source: Hard-Routed Mixtures of Reasoning LoRAs (arXiv 2606.31413), stage II.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as dump_safetensors
from torch import Tensor, nn
from torch.nn import functional

from fedcompose.bases import Base, base_shapes
from fedcompose.contribution import VerifiedContribution
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.files import (
    dir_hash,
    dump_json,
    new_folder,
    sha256_hex,
    write_atomic,
    write_json,
)
from fedcompose.model.composed import (
    ATTENTION_FOLDER,
    ROUTER_FILE,
    add_attention,
    compose_model,
    hidden_size,
    routed_modules,
    save_attention,
    save_router,
)
from fedcompose.model.experts import TARGETS, read_expert
from fedcompose.model.lm import load_base, pad_right
from fedcompose.model.router import Router, RoutingRecord
from fedcompose_coordinator.lessons import Lesson, Row, encode, micro_batches, plan_batches

SCHEMA = "fedcompose/composition/v1"
METHOD = "hard_top1_ste"
ROUTER = {"type": "linear", "granularity": "token", "shared": True, "input": "mlp", "top_k": 1}
LAST_STEPS = 10  # over which the routing accuracy of a composition is averaged
IGNORED = -100  # cross entropy's own mark for positions that teach nothing

OnStep = Callable[[int, int, str], None]


class ComposeSettings(BaseModel):
    """How to compose. The measured settings, the demo's, are in docs/log.md."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(60, ge=1)
    batch: int = Field(12, ge=1)  # lessons per step, the same number from every domain
    router_lr: float = Field(1e-2, gt=0)
    attention_lr: float = Field(2e-3, gt=0)
    attention_rank: int = Field(16, ge=1, le=512)
    attention_alpha: int = Field(32, ge=1)
    warm_up: float = Field(0.05, ge=0, lt=1)  # share of the steps
    clip: float = Field(1.0, gt=0)  # largest norm of a step's gradient
    checkpoint_every: int = Field(10, ge=1)  # steps


@dataclass
class Tally:
    """What one step did, as sums, so that parts add up.

    Routing is counted in every layer, at the positions that write a completion.
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


def compose(
    contributions: Sequence[VerifiedContribution],
    lessons: Sequence[Lesson],
    base: Base,
    settings: ComposeSettings,
    seed: int,
    out: Path,
    *,
    experts: bool = True,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Train router and attention LoRA on `lessons`, write the candidate to `out`, return its composition.

    The router's rows are the adapters among the contributions, in order. Without `experts` the same loop on
    the same lessons trains an attention LoRA alone: the control that says what the experts were good for.

    Raises: ConfigError: `COMPOSE_NO_EXPERTS`, `COMPOSE_NO_LESSONS`.
            RefusedError: as `compose_model`; `FILE_CHANGED`, `EXPERT_CHANGED` when an expert is not, or no
                longer, what was admitted.
    """
    used = [each for each in contributions if experts and each.kind == "adapter"]
    if experts and not used:
        raise ConfigError("COMPOSE_NO_EXPERTS", "no expert was admitted", fix="receive a contribution first")
    accelerator = Accelerator(mixed_precision="no")
    model: Any
    model, tokenizer = load_base(base.path)
    model.to(accelerator.device)
    attention = add_attention(model, settings.attention_rank, settings.attention_alpha, seed)
    router = Router(hidden_size(model), max(1, len(used)), seed)
    shapes = base_shapes(base)
    compose_model(model, [read_expert(each, shapes) for each in used], router)
    start_weight = router.weight.detach().clone()
    before = experts_digest(model)

    domains = sorted({lesson.domain for lesson in lessons} | {each.domain for each in used})
    rows = encode(tokenizer, lessons, domains)
    plan = plan_batches(rows, settings.batch, settings.steps, seed)
    owners = [[index for index, each in enumerate(used) if each.domain == domain] for domain in domains]
    trained = [*attention, *([router.weight] if used else [])]
    optimizer = torch.optim.AdamW(
        [{"params": attention, "peak": settings.attention_lr}]
        + ([{"params": [router.weight], "peak": settings.router_lr}] if used else []),
        weight_decay=0.0,
    )
    inputs = _inputs_digest(used, lessons, base, settings=settings.model_dump(), seed=seed, dtype=str(model.dtype))
    checkpoint = out.with_name(out.name + ".checkpoint.safetensors")
    log = resume(checkpoint, inputs, trained, optimizer)

    for step in range(len(log), settings.steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, settings)
        parts = micro_batches(plan[step])
        target_tokens = sum(len(row.ids) - row.prompt for row in plan[step])
        tally = Tally.empty(len(domains), len(used), accelerator.device)
        optimizer.zero_grad(set_to_none=False)
        for part in parts[accelerator.process_index :: accelerator.num_processes]:
            with model.routing.recording() as record:
                loss = completion_loss(model, part, tokenizer.pad_token_id) / target_tokens
            accelerator.backward(loss)
            tally += _tally(loss.detach(), part, record, tally.chosen)
        _sum_over_processes(accelerator, trained, tally)
        norm = nn.utils.clip_grad_norm_(trained, settings.clip)
        optimizer.step()

        moved = float((router.weight.detach() - start_weight).norm() / start_weight.norm())
        log.append(
            _line(step, tally, norm, moved, domains, owners) | {"seconds": round(time.perf_counter() - began, 3)}
        )
        if accelerator.is_main_process and (step + 1) % settings.checkpoint_every == 0:
            save_checkpoint(checkpoint, inputs, trained, optimizer, log)
        if on_step:
            on_step(step + 1, settings.steps, _note(log[-1]))

    if experts_digest(model) != before:
        raise RefusedError("EXPERT_CHANGED", "an expert changed in memory while composing")
    for each in used:
        read_expert(each, shapes)  # the files, too, are still those that were admitted
    counts = Counter(domains[row.domain] for row in rows)
    training = _training(settings, seed, log) | {
        "lessons": dict(counts),
        "lessons_too_long": len(lessons) - len(rows),
    }
    composition = _composition(used, base, settings, training)
    if accelerator.is_main_process:
        with new_folder(out) as folder:
            if used:
                save_router(folder / ROUTER_FILE, router)
            save_attention(folder / ATTENTION_FOLDER, model)
            write_atomic(folder / "training.jsonl", b"".join(_json_line(line) for line in log))
            write_json(folder / "composition.json", composition)
        checkpoint.unlink(missing_ok=True)
    return composition


def completion_loss(model: Any, rows: Sequence[Row], pad_id: int) -> Tensor:
    """Σ −log p of every completion token given what stands before it, scalar float32.

    Only positions that predict a completion token meet the vocabulary matrix, the largest of a small model.
    """
    device = next(model.parameters()).device
    ids = pad_right([row.ids for row in rows], pad_id).to(device)
    mask = pad_right([[1] * len(row.ids) for row in rows], 0).to(device)
    learned = [[IGNORED] * row.prompt + list(row.ids[row.prompt :]) for row in rows]
    labels = pad_right(learned, IGNORED).to(device)[:, 1:]
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
    logits = model.get_output_embeddings()(hidden[labels != IGNORED]).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    return functional.cross_entropy(logits, labels[labels != IGNORED], reduction="sum")


def schedule(step: int, settings: ComposeSettings) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine that ends near zero."""
    warm = math.ceil(settings.warm_up * settings.steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, settings.steps - warm)))


def experts_digest(model: Any) -> str:
    """SHA-256 over every expert weight in memory, by name."""
    digests = {
        f"{name}.{key}": sha256_hex(buffer.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        for name, routed in routed_modules(model)
        for key, buffer in routed.experts.named_buffers()
    }
    return dir_hash(digests)


def save_checkpoint(
    path: Path,
    inputs: str,
    trained: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    log: Sequence[Any],
) -> None:
    """Weights, optimizer state and log in one file, replaced in one step."""
    tensors: dict[str, Tensor] = {}
    for index, parameter in enumerate(trained):
        state = optimizer.state[parameter]
        parts = {
            "weight": parameter.detach(),
            **{key: state[key] for key in ("exp_avg", "exp_avg_sq", "step")},
        }
        tensors |= {f"{index}.{key}": value.cpu().contiguous() for key, value in parts.items()}
    metadata = {"inputs": inputs, "log": json.dumps(list(log))}
    write_atomic(path, dump_safetensors(tensors, metadata=metadata))


def resume(
    path: Path, inputs: str, trained: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
) -> list[dict[str, Any]]:
    """The log of the steps already done, their state restored; empty without a checkpoint of this run."""
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError):
        return []
    if metadata.get("inputs") != inputs:
        return []
    for index, parameter in enumerate(trained):
        parameter.data.copy_(tensors[f"{index}.weight"])
        optimizer.state[parameter] = {
            "step": tensors[f"{index}.step"],
            **{key: tensors[f"{index}.{key}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")},
        }
    log: list[dict[str, Any]] = json.loads(metadata["log"])
    return log


def _tally(loss: Tensor, rows: Sequence[Row], record: RoutingRecord, like: Tensor) -> Tally:
    """Sums over the rows of one forward pass; `like` has the shape and place of `Tally.chosen`."""
    if not record.choices:
        return Tally(loss, torch.zeros_like(loss), torch.zeros_like(like))
    p = record.probabilities[0]  # (layers, rows, width, experts)
    column = torch.arange(p.shape[2], device=like.device)
    first, last = (
        torch.tensor(ends, device=like.device)[:, None]
        for ends in ([row.prompt - 1 for row in rows], [len(row.ids) - 1 for row in rows])
    )
    writes = (column >= first) & (column < last)  # (rows, width)
    entropy = (torch.special.entr(p).sum(-1) * writes).sum()
    chosen = functional.one_hot(record.choices[0], p.shape[-1]) * writes[..., None]
    domains = torch.tensor([row.domain for row in rows], device=like.device)
    return Tally(loss, entropy, torch.zeros_like(like).index_add_(0, domains, chosen.sum((0, 2)).to(like)))


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


def _line(
    step: int,
    tally: Tally,
    norm: Tensor,
    moved: float,
    domains: Sequence[str],
    owners: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """One line of training.jsonl; `own_share` of a domain is what its own experts were given of it."""
    line: dict[str, Any] = {
        "step": step + 1, "loss": float(tally.loss), "gradient_norm": float(norm),
    }  # fmt: skip
    decisions = float(tally.chosen.sum())
    if decisions:
        share = (tally.chosen / tally.chosen.sum(1, keepdim=True)).tolist()
        own = {domain: sum(share[d][e] for e in owners[d]) for d, domain in enumerate(domains) if owners[d]}
        line |= {
            "entropy": float(tally.entropy) / decisions,
            "share": dict(zip(domains, share, strict=True)),
            "own_share": own,
            "routing_accuracy": sum(own.values()) / len(own) if own else None,
            "router_moved": moved,
        }
    return line


def _note(line: Mapping[str, Any]) -> str:
    accuracy = line.get("routing_accuracy")
    return f"loss {line['loss']:.3f}" + (f"  routing {accuracy:.0%}" if accuracy is not None else "")


def _training(settings: ComposeSettings, seed: int, log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    accuracies = [line["routing_accuracy"] for line in log[-LAST_STEPS:] if line.get("routing_accuracy")]
    return {
        **settings.model_dump(),
        "seed": seed,
        "first_loss": log[0]["loss"],
        "last_loss": log[-1]["loss"],
        "routing_accuracy": sum(accuracies) / len(accuracies) if accuracies else None,
        "router_moved": log[-1].get("router_moved"),
    }


def _composition(
    used: Sequence[VerifiedContribution], base: Base, settings: ComposeSettings, training: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of composition.json."""
    return {
        "schema": SCHEMA,
        "method": METHOD if used else "attention_only",
        "base": {"name": base.name, "dirHash": base.digest},
        "router": ROUTER if used else None,
        "experts": [{"site": each.site, "domain": each.domain, "dirHash": each.dir_hash} for each in used],
        "targets": list(TARGETS),
        "attention": {"r": settings.attention_rank, "alpha": settings.attention_alpha},
        "training": training,
    }


def _inputs_digest(used: Sequence[VerifiedContribution], lessons: Sequence[Lesson], base: Base, **settings: Any) -> str:
    """Names a run: two runs with the same digest end in the same files."""
    inputs = {
        "base": base.digest,
        "experts": [[each.dir_hash, each.domain] for each in used],
        "lessons": sha256_hex(b"".join(_json_line(asdict(lesson)) for lesson in lessons)),
        **settings,
    }
    return sha256_hex(dump_json(inputs))


def _json_line(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, allow_nan=False).encode() + b"\n"
