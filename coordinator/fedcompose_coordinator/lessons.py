"""Lessons: what the router and the attention LoRA learn from, and the order in which they see it.

A lesson is one verified turn of a known domain. Lessons come from the sites' traces: a prompt that a
declared generator made is made again here, an answer is checked again here, and a prompt of the test split is
left out, because the candidate will be measured on those.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fedcompose.contribution import VerifiedContribution
from fedcompose.errors import ConfigError
from fedcompose.model.lm import completion_ids, prompt_ids
from fedcompose.rederive import rederive
from fedcompose.tasks import get_task, split_of
from fedcompose.traces import Trace

MAX_LESSON_TOKENS = 2048  # longer lessons are left out and counted; bounds memory
MAX_BATCH_TOKENS = 1536  # of one forward and backward pass, padding included; bounds memory
MAX_SPREAD = 1.5  # longest by shortest row of a pass; on two cores padding costs more than a second pass


@dataclass(frozen=True)
class Lesson:
    """The user's text and the completion to learn."""

    domain: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Row:
    """A lesson as token ids; the first `prompt` of them are given, the others are learned."""

    domain: int
    ids: tuple[int, ...]
    prompt: int


def lessons_of(contributions: Iterable[VerifiedContribution]) -> list[Lesson]:
    """What the trace contributions among `contributions` teach; traces that do not verify teach nothing.

    Raises: RefusedError: `FILE_CHANGED`. MissingError: `PACKAGE_MISSING`, for a generator of reasoning-gym.
    """
    sets = ((each.domain, each.traces()) for each in contributions if each.kind == "traces")
    found = (lesson_of(trace, domain) for domain, traces in sets for trace in traces)
    return [lesson for lesson in found if lesson]


def lesson_of(trace: Trace, domain: str) -> Lesson | None:
    """The lesson in a trace; None when its answer is wrong, or its prompt is unknown here or of the test split."""
    example = rederive(trace)
    if example is None or (example.origin is not None and split_of(example.question) == "test"):
        return None
    return Lesson(domain, get_task(trace.task).prompt(example.question), trace.completion)


def encode(tokenizer: Any, lessons: Iterable[Lesson], domains: Sequence[str]) -> list[Row]:
    """Token ids of every lesson that is short enough; `Row.domain` is an index into `domains`.

    Raises: ConfigError: `COMPOSE_NO_LESSONS` when a domain, or everything, is left without any.
    """
    rows = []
    for lesson in lessons:
        prompt = prompt_ids(tokenizer, lesson.prompt)
        completion = completion_ids(tokenizer, lesson.completion)
        if len(prompt) + len(completion) <= MAX_LESSON_TOKENS:
            rows.append(Row(domains.index(lesson.domain), (*prompt, *completion), len(prompt)))
    missing = set(range(len(domains))) - {row.domain for row in rows}
    if missing or not rows:
        raise ConfigError(
            "COMPOSE_NO_LESSONS",
            "there is nothing to train the router on",
            expected=f"lessons of at most {MAX_LESSON_TOKENS} tokens in every domain",
            got="none in " + (", ".join(domains[index] for index in sorted(missing)) or "any domain"),
            fix="receive the sites' traces, or let the coordinator sample the experts",
        )
    return rows


def plan_batches(rows: Sequence[Row], batch: int, steps: int, seed: int) -> list[list[Row]]:
    """The rows of every step: equally many of each domain, all of a domain before any of it comes again."""
    rng = random.Random(seed)
    domains = sorted({row.domain for row in rows})
    share = max(1, batch // len(domains))
    streams = [_endless([row for row in rows if row.domain == domain], rng) for domain in domains]
    return [[next(stream) for stream in streams for _ in range(share)] for _ in range(steps)]


def targets(rows: Iterable[Row]) -> int:
    """How many tokens of these rows are learned."""
    return sum(len(row.ids) - row.prompt for row in rows)


def length(rows: Iterable[Row]) -> int:
    """How many tokens these rows have, prompts included."""
    return sum(len(row.ids) for row in rows)


def within_budget(rows: Sequence[Row], tokens: int | None) -> list[Row]:
    """The first rows of each domain that have at most `tokens` together; all without a budget."""
    spent: dict[int, int] = {}
    kept = []
    for row in rows:
        spent[row.domain] = spent.get(row.domain, 0) + len(row.ids)
        if tokens is None or spent[row.domain] <= tokens:
            kept.append(row)
    return kept


def hold_back(rows: Sequence[Row], every: int) -> tuple[list[Row], list[Row]]:
    """(rows to learn from, rows to check on): of each domain, every so-manieth is held back."""
    seen: Counter[int] = Counter()
    taught: list[Row] = []
    held: list[Row] = []
    for row in rows:
        seen[row.domain] += 1
        (taught if seen[row.domain] % every else held).append(row)
    return taught, held


def micro_batches(rows: Sequence[Row], together: bool = False, max_tokens: int = MAX_BATCH_TOKENS) -> list[list[Row]]:
    """Rows of like length together: little padding, and with it at most `max_tokens` in a part.

    `together`: every part holds equally many rows of each domain, for losses that compare domains within a part.
    """
    units = [[row] for row in sorted(rows, key=lambda row: len(row.ids))]
    if together:
        domains = {row.domain: [one for (one,) in units if one.domain == row.domain] for row in rows}
        units = [list(unit) for unit in zip(*domains.values(), strict=True)]
    parts: list[list[Row]] = []
    shortest = 0
    for unit in units:
        longest = max(len(row.ids) for row in unit)
        part = parts[-1] if parts else []
        if part and longest <= MAX_SPREAD * shortest and longest * (len(part) + len(unit)) <= max_tokens:
            part.extend(unit)
        else:
            parts.append(unit)
            shortest = longest
    return parts


def _endless(rows: list[Row], rng: random.Random) -> Iterator[Row]:
    while True:
        yield from rng.sample(rows, len(rows))
