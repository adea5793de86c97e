"""Beside step 2, for composing without traces: learn when this site's expert should speak, on the site's own rows.

Input: `runs/<domain>/expert/` and the rows that it was trained on. Output: `runs/<domain>/gates-<digest>.safetensors`,
named after the expert, so that gates of an earlier expert are never taken for those of this one. `contribute` signs
them with the expert. They are learned without differential privacy: where the expert has it they are refused.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from fedcompose.adapter import WEIGHTS_FILE
from fedcompose.bases import base_shapes, resolve_base
from fedcompose.errors import ConfigError
from fedcompose.files import read_json, write_atomic
from fedcompose.gates import write_gates
from fedcompose.model.experts import load_expert
from fedcompose.model.gates import GatedExpert
from fedcompose.model.lm import completion_ids, load_base, prompt_ids
from fedcompose.model.placement import compose_model, decision_points
from fedcompose.tasks import get_task
from fedcompose_client.config import Domain, SiteConfig
from fedcompose_client.contribute import gates_name
from fedcompose_client.own_rows import own_rows

STEPS, BATCH, LR = 100, 4, 1e-3  # as the coordinator learns gates from traces, `phatgoose`

OnStep = Callable[[int, int, str], None]


def learn_gates(site: Path, config: SiteConfig, domain_name: str, on_step: OnStep, steps: int = STEPS) -> Path:
    """Learn the gates of the domain's expert and write them.

    Raises: ConfigError: `EXPERT_MISSING`, `GATES_NOT_PRIVATE`, and those of reading.
    """
    domain, run = config.domain(domain_name), site / "runs" / domain_name
    _check_expert(run, domain_name)
    base = resolve_base(config.base)
    model: Any
    model, tokenizer = load_base(base.path)
    expert = load_expert(run / "expert", base_shapes(base))
    points = decision_points(model, [expert], "linear")
    gates = GatedExpert(points, 0, 1)
    compose_model(model, [expert], gates, "linear")
    _train(model, gates, _lessons(site, domain, tokenizer), domain.training.seed, steps, on_step)
    made = {point.name: vector.detach().cpu().numpy() for point, vector in zip(points, gates.vectors, strict=True)}
    path = run / gates_name(run)
    write_atomic(path, write_gates(made))
    return path


def _check_expert(run: Path, domain: str) -> None:
    """There is an expert, and it makes no promise that gates would break."""
    if not (run / "expert" / WEIGHTS_FILE).is_file():
        raise ConfigError(
            "EXPERT_MISSING", f"{run} holds no finished expert", fix=f"fedcompose client train --domain {domain}"
        )
    if (run / "result.json").is_file() and read_json(run / "result.json").get("dp"):
        raise ConfigError(
            "GATES_NOT_PRIVATE", "the expert has differential privacy, and gates learned from the same rows would not",
            fix="contribute the expert alone: the coordinator can sample it",
        )  # fmt: skip


def _lessons(site: Path, domain: Domain, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of every row that the expert was trained on, as token ids."""
    task = get_task(domain.task)
    rows = own_rows(site, domain, None).splits.train  # experts with privacy were refused
    return [
        (prompt_ids(tokenizer, task.prompt(row.question)), completion_ids(tokenizer, task.target(row))) for row in rows
    ]


def _train(
    model: Any, gates: GatedExpert, lessons: list[tuple[list[int], list[int]]], seed: int, steps: int, on_step: OnStep
) -> None:
    rng, optimizer = random.Random(seed), torch.optim.AdamW(gates.parameters(), lr=LR, weight_decay=0.0)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        batch = rng.sample(lessons, min(BATCH, len(lessons)))
        total = 0.0
        for prompt, completion in batch:
            loss = _loss(model, prompt, completion) / len(batch)
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        on_step(step, steps, f"loss {total:.3f}")


def _loss(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Mean −log p of the completion's tokens."""
    ids = torch.tensor([[*prompt, *completion]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return functional.cross_entropy(logits, ids[0, len(prompt) :])
