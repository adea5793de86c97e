"""What somebody with an adapter can find out about canaries: four scores, greedy answers, and how exposed a secret is.

Every score compares the audited adapter with a reference that was trained alike, without the canaries; a higher one
says "trained on it". None of them is a proof; how often they are right is measured on canaries whose coin is known.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from statistics import fmean, median
from typing import Any

from fedcompose.model.lm import completion_ids, merged, prompt_ids
from fedcompose.model.sampling import sample
from fedcompose.tasks import Task
from fedcompose_client.canaries import Canary
from fedcompose_client.config import Training
from fedcompose_client.packed import Tree, log_probabilities

SAMPLES = 8  # of each canary
COMPARED_TOKENS = 128  # of each sample, for how alike samples are
SAMPLING_SEED = 71  # any fixed number

OnDone = Callable[[int], None]


@dataclass(frozen=True)
class Reading:
    """What one adapter says to one canary."""

    candidates: tuple[float, ...]  # log-likelihood of each candidate answer, the taught one first
    reward: float  # mean over samples
    repeated: bool  # whether the greedy answer is the taught one
    samples: tuple[tuple[int, ...], ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read(
    model: Any, tokenizer: Any, task: Task, canaries: Sequence[Canary], settings: Training, done: OnDone
) -> list[Reading]:
    """Ask the active adapter about every canary."""
    prompts = [prompt_ids(tokenizer, task.prompt(canary.question)) for canary in canaries]
    longest = settings.max_new_tokens
    with merged(model):
        groups = sample(
            model, tokenizer, prompts, count=SAMPLES, temperature=settings.temperature, max_new_tokens=longest,
            seed=SAMPLING_SEED, on_done=done,
        )  # fmt: skip
        greedy = sample(model, tokenizer, prompts, max_new_tokens=longest)
    trees = [
        Tree(
            tuple(prompt),
            tuple((tuple(completion_ids(tokenizer, task.target(each))), 1.0) for each in canary.candidates),
        )
        for prompt, canary in zip(prompts, canaries, strict=True)
    ]
    likely = log_probabilities(model, trees, tokenizer.pad_token_id)
    return [
        Reading(
            candidates=tuple(logs),
            reward=fmean(task.reward(one.text, canary.taught.answer) if one.finished else 0.0 for one in group),
            repeated=task.is_correct(best.text, canary.taught.answer),
            samples=tuple(one.tokens for one in group),
        )
        for canary, logs, group, (best,) in zip(canaries, likely, groups, greedy, strict=True)
    ]


def drift(
    model: Any, tokenizer: Any, task: Task, canaries: Sequence[Canary], readings: Sequence[Reading]
) -> list[float]:
    """The mean log-likelihood that the active adapter gives to samples, whoever wrote them."""
    trees = [
        Tree(tuple(prompt_ids(tokenizer, task.prompt(canary.question))), tuple((one, 1.0) for one in reading.samples))
        for canary, reading in zip(canaries, readings, strict=True)
    ]
    return [fmean(logs) for logs in log_probabilities(model, trees, tokenizer.pad_token_id)]


def scores(found: Sequence[Reading], reference: Sequence[Reading], drifts: Sequence[float]) -> dict[str, list[float]]:
    """The four attacks, one score for each canary.

    likelihood   how much more likely the taught answer became than the canary's other candidates
    reward       how much more often a sample gives the taught answer
    drift        how far the samples went from the reference
    nearest      how much more alike the samples became
    """
    pairs = list(zip(found, reference, strict=True))
    return {
        "likelihood": [_contrast(_gains(ours, theirs)) for ours, theirs in pairs],
        "reward": [ours.reward - theirs.reward for ours, theirs in pairs],
        "drift": list(drifts),
        "nearest": [alike(ours.samples) - alike(theirs.samples) for ours, theirs in pairs],
    }


def exposures(found: Sequence[Reading], reference: Sequence[Reading]) -> list[float]:
    """Bits by which the taught answer stands out among its candidates: log2(candidates) - log2(rank)."""
    bits = []
    for ours, theirs in zip(found, reference, strict=True):
        gains = _gains(ours, theirs)
        bits.append(math.log2(len(gains)) - math.log2(1 + sum(gain > gains[0] for gain in gains[1:])))
    return bits


def summary(bits: Sequence[float]) -> dict[str, float]:
    return {"max": max(bits, default=0.0), "median": median(bits) if bits else 0.0}


def alike(samples: Sequence[Sequence[int]]) -> float:
    """How alike the most similar other sample is, from 0 to 1, on average."""
    nearest = [0.0] * len(samples)
    for (i, first), (j, second) in itertools.combinations(enumerate(samples), 2):
        ratio = SequenceMatcher(None, first[:COMPARED_TOKENS], second[:COMPARED_TOKENS], autojunk=False).ratio()
        nearest[i], nearest[j] = max(nearest[i], ratio), max(nearest[j], ratio)
    return fmean(nearest)


def _gains(ours: Reading, theirs: Reading) -> list[float]:
    return [after - before for after, before in zip(ours.candidates, theirs.candidates, strict=True)]


def _contrast(gains: Sequence[float]) -> float:
    return gains[0] - fmean(gains[1:])
