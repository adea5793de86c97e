"""How far one expert reaches: what an answer has to do with experts that were never asked, and with other prompts.

For a few prompts, each with its right answer behind it, the candidate says which experts it asked anywhere. An expert
that it never asked is taken out, and every logit must be the same, bit for bit. And the next token after every
position must not depend on the prompts that are read beside it: in a batch products are rounded otherwise, so there
tokens are compared and not bits.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fedcompose.composition import COMPOSITION_FILE
from fedcompose.files import read_json
from fedcompose.model.lm import completion_ids, pad_right, prompt_ids
from fedcompose_coordinator.bench import ModelBench, router_config
from fedcompose_coordinator.grid import Method
from fedcompose_coordinator.membership import mask
from fedcompose_coordinator.questions import Domain

PER_DOMAIN = 4  # prompts: enough to see a mistake, and no time to speak of


@dataclass(frozen=True)
class Reading:
    """One sequence read alone: its logits (tokens, vocabulary) and the experts that had any weight anywhere."""

    ids: Sequence[int]
    logits: Tensor
    asked: frozenset[int]


def blast_radius(method: Method, bench: ModelBench, domains: Sequence[Domain]) -> dict[str, int] | None:
    """What was found, as counts; None for a candidate whose router does not decide token by token.

    `never_asked` counts pairs of a sequence and an expert without a part in it, `same_without` those of them whose
    logits stay the same when the expert is gone; `same_tokens` of `tokens` follow alike, alone and in a batch.
    """
    composition = read_json(method.candidate / COMPOSITION_FILE) if method.candidate else {}
    config = router_config(method.candidate)
    if not composition.get("router") or config.granularity == "prompt" or config.scorer == "static":
        return None
    model = bench.become(method)
    readings = [read_alone(model, ids) for ids in sequences(bench.tokenizer, domains)]
    never, same = 0, 0
    for index, site in enumerate(bench.experts):
        spared = [reading for reading in readings if index not in reading.asked]
        never += len(spared)
        same += same_without(site, spared, method, bench) if spared else 0
    return {
        "sequences": len(readings),
        "never_asked": never,
        "same_without": same,
        "tokens": sum(len(reading.ids) for reading in readings),
        "same_tokens": same_together(model, readings, bench.tokenizer.pad_token_id),
    }


def sequences(tokenizer: Any, domains: Sequence[Domain]) -> list[list[int]]:
    """The first prompts of every domain, each with its right answer."""
    return [
        prompt_ids(tokenizer, domain.task.prompt(example.question))
        + completion_ids(tokenizer, domain.task.target(example))
        for domain in domains
        for example in domain.examples[:PER_DOMAIN]
    ]


@torch.no_grad()
def read_alone(model: Any, ids: Sequence[int]) -> Reading:
    with model.routing.recording() as record:
        logits = model(input_ids=torch.tensor([list(ids)], device=model.device)).logits[0]
    weights = [decision.weights.flatten(0, -2) for call in record.calls for decision in call.values()]
    asked = torch.stack([(each != 0).any(0) for each in weights]).any(0)
    return Reading(ids, logits, frozenset(asked.nonzero().flatten().tolist()))


def same_without(site: str, spared: Sequence[Reading], method: Method, bench: ModelBench) -> int:
    """How many of the sequences keep every bit of their logits in a composition that never held the site's expert."""
    if method.candidate is None:
        raise ValueError("only a candidate can do without one of its experts")
    with TemporaryDirectory() as name:
        smaller = Path(name) / "candidate"
        shutil.copytree(method.candidate, smaller)
        mask(smaller, site)
        rest = {other: folder for other, folder in bench.experts.items() if other != site}
        model = ModelBench(rest, bench.base).become(replace(method, candidate=smaller))
        return sum(torch.equal(read_alone(model, reading.ids).logits, reading.logits) for reading in spared)


@torch.no_grad()
def same_together(model: Any, readings: Sequence[Reading], pad_id: int) -> int:
    """How many next tokens are the same when all sequences are read in one batch."""
    ids = pad_right([reading.ids for reading in readings], pad_id).to(model.device)
    real = pad_right([[1] * len(reading.ids) for reading in readings], 0).to(model.device)
    following = model(input_ids=ids, attention_mask=real).logits.argmax(-1)
    return sum(
        int((row[: len(reading.ids)] == reading.logits.argmax(-1)).sum())
        for row, reading in zip(following, readings, strict=True)
    )
