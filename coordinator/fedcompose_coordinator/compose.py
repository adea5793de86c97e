"""Step 8, compose: make a router over the admitted experts; every expert stays as it was shipped, bit for bit.

Input: verified contributions, lessons, and a recipe from the table in `methods.py`. Output: a candidate folder, which
appears whole or not at all: composition.json, router.safetensors, perhaps attention/ and training.jsonl; merges have
merged/ instead of a router. The same inputs on the same kind of machine with as many threads give the same bytes in
all but training.jsonl, which holds seconds.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from fedcompose.adapter import write_adapter
from fedcompose.bases import Base, base_shapes
from fedcompose.composition import ATTENTION_FOLDER, ROUTER_FILE
from fedcompose.contribution import VerifiedContribution
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.files import dir_hash, dump_json, new_folder, sha256_hex, write_atomic, write_json
from fedcompose.model.composed import save_attention
from fedcompose.model.experts import Expert, read_expert
from fedcompose.model.learned import save_router
from fedcompose.model.placement import routed_modules
from fedcompose_coordinator import closed_form, static, training
from fedcompose_coordinator.lessons import Lesson
from fedcompose_coordinator.membership import CHANGED_FOLDER
from fedcompose_coordinator.methods import Recipe
from fedcompose_coordinator.refine import as_adapter
from fedcompose_coordinator.training import OnStep
from fedcompose_coordinator.work import Work, prepare

SCHEMA = "fedcompose/composition/v1"
ATTENTION_ONLY = "attention_only"  # the method of the control without experts
MERGED_FOLDER = "merged"
TRAINING_FILE = "training.jsonl"
LAST_STEPS = 10  # over which the routing accuracy of a composition is averaged


def compose(
    contributions: Sequence[VerifiedContribution],
    lessons: Sequence[Lesson],
    base: Base,
    recipe: Recipe,
    seed: int,
    out: Path,
    *,
    experts: bool = True,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Follow the recipe, write the candidate to `out`, return its composition.

    The router's rows are the adapters among the contributions, in order. Without `experts` the same loop on
    the same lessons trains an attention LoRA alone: the control that says what the experts were good for.

    Raises: ConfigError: `COMPOSE_NO_EXPERTS`, `COMPOSE_NO_LESSONS`, `COMPOSE_NOTHING_TO_TRAIN`; as `make_router`.
            RefusedError: as `compose_model`; `FILE_CHANGED`, `EXPERT_CHANGED` when an expert is not, or no
                longer, what was admitted.
    """
    used = [each for each in contributions if experts and each.kind == "adapter"]
    if experts and not used:
        raise ConfigError("COMPOSE_NO_EXPERTS", "no expert was admitted", fix="receive a contribution first")
    if not experts and not recipe.attention_rank:
        raise ConfigError("COMPOSE_NOTHING_TO_TRAIN", "without experts and attention LoRA nothing is left to train")
    if recipe.made == "merged":
        return _merge(used, base, recipe, seed, out)
    accelerator = Accelerator(mixed_precision="no")
    with repeatable():
        work = prepare(used, lessons, base, recipe, seed, accelerator.device)
        before = experts_digest(work.model)
        log = _make(work, accelerator, out, inputs_digest(work, used, lessons, base), on_step)
    if experts_digest(work.model) != before:
        raise RefusedError("EXPERT_CHANGED", "an expert changed in memory while composing")
    for each in used:
        read_expert(each, base_shapes(base))  # the files, too, are still those that were admitted
    composition = _composition(used, work.experts, base, recipe, _training(work, log, len(lessons)))
    if accelerator.is_main_process:
        with new_folder(out) as folder:
            _write(work, folder)
            write_atomic(folder / TRAINING_FILE, b"".join(_json_line(line) for line in log))
            write_json(folder / "composition.json", composition)
        _checkpoint(out).unlink(missing_ok=True)
    return composition


@contextmanager
def repeatable() -> Iterator[None]:
    """Deterministic kernels where a device has them, and nobody else's random numbers."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def experts_digest(model: Any) -> str:
    """SHA-256 over every expert weight in memory, by name."""
    digests = {
        f"{name}.{key}": sha256_hex(buffer.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        for name, routed in routed_modules(model)
        for key, buffer in routed.experts.named_buffers()
    }
    return dir_hash(digests)


def inputs_digest(work: Work, used: Sequence[VerifiedContribution], lessons: Sequence[Lesson], base: Base) -> str:
    """Names a run: two runs with the same digest end in the same files."""
    inputs = {
        "base": base.digest,
        "experts": [[each.dir_hash, each.domain] for each in used],
        "lessons": sha256_hex(b"".join(_json_line(asdict(lesson)) for lesson in lessons)),
        "router": _router_of(work.recipe),
        "settings": work.settings.model_dump(),
        "seed": work.seed,
        "dtype": str(work.model.dtype),
    }
    return sha256_hex(dump_json(inputs))


def _make(work: Work, accelerator: Accelerator, out: Path, inputs: str, on_step: OnStep | None) -> list[dict[str, Any]]:
    if work.recipe.made in ("trained", "sampled") or not work.experts:
        return training.train(work, accelerator, _checkpoint(out), inputs, on_step)
    if work.recipe.made == "closed form":
        return closed_form.fit(work, on_step)
    return static.search(work, on_step) if work.recipe.needs_lessons else []


def _merge(used: Sequence[VerifiedContribution], base: Base, recipe: Recipe, seed: int, out: Path) -> dict[str, Any]:
    """A candidate without a router: one LoRA stands for all experts."""
    shapes = base_shapes(base)
    experts = [read_expert(each, shapes) for each in used]
    adapter = static.merge(experts, recipe.name, seed)
    composition = _composition(used, experts, base, recipe, {"seed": seed})
    with new_folder(out) as folder:
        (folder / MERGED_FOLDER).mkdir()
        write_adapter(folder / MERGED_FOLDER, adapter)
        write_json(folder / "composition.json", composition)
    return composition


def _write(work: Work, folder: Path) -> None:
    if work.experts:
        save_router(folder / ROUTER_FILE, work.model.router)
    if work.attention:
        save_attention(folder / ATTENTION_FOLDER, work.model)
    if work.settings.expert_steps:
        for expert in work.experts:
            (folder / CHANGED_FOLDER / expert.name).mkdir(parents=True)
            write_adapter(folder / CHANGED_FOLDER / expert.name, as_adapter(expert))


def _checkpoint(out: Path) -> Path:
    return out.with_name(out.name + ".checkpoint.safetensors")


def _composition(
    used: Sequence[VerifiedContribution],
    experts: Sequence[Expert],
    base: Base,
    recipe: Recipe,
    training: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of composition.json."""
    rank = recipe.attention_rank
    changed = {"changed": True} if used and recipe.settings.expert_steps else {}
    return {
        **changed,
        "schema": SCHEMA,
        "method": recipe.name if used else ATTENTION_ONLY,
        "base": {"name": base.name, "dirHash": base.digest},
        "router": _router_of(recipe) if used else None,
        "experts": [{"site": each.site, "domain": each.domain, "dirHash": each.dir_hash} for each in used],
        "targets": sorted({name.rpartition(".")[2] for expert in experts for name in expert.updates}),
        "attention": {"r": rank, "alpha": 2 * rank} if rank else None,
        "training": training,
    }


def _router_of(recipe: Recipe) -> dict[str, Any] | None:
    return recipe.router.model_dump() if recipe.router else None


def _training(work: Work, log: Sequence[Mapping[str, Any]], lessons: int) -> dict[str, Any]:
    """How the router came about, for people; settings only where they were used."""
    counts = Counter(work.domains[row.domain] for row in work.rows)
    known: dict[str, Any] = {"seed": work.seed, "dtype": str(work.model.dtype).removeprefix("torch.")}
    if work.recipe.needs_lessons:
        known |= {"lessons": dict(counts), "lessons_left_out": lessons - len(work.rows)}
    if not log or work.recipe.made == "static":
        return known
    accuracies = [line["routing_accuracy"] for line in log[-LAST_STEPS:] if line.get("routing_accuracy") is not None]
    summary = {
        "steps_done": len(log),
        "first_loss": log[0]["loss"],
        "last_loss": log[-1]["loss"],
        "routing_accuracy": sum(accuracies) / len(accuracies) if accuracies else None,
        "router_moved": log[-1].get("router_moved"),
    }
    return known | work.settings.model_dump() | summary


def _json_line(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, allow_nan=False).encode() + b"\n"
