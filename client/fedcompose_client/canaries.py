"""Planted rows by which an audit tells what training keeps: questions of the domain with a mark and a wrong answer.

A policy learns only from rewards that it sometimes earns, so a canary's answer is one that the site's expert, trained
without it, gives now and then: sampled answers are its candidates, and one of them, not the most frequent, is drawn by
lot. A coin decides for each canary whether the twin is trained on it. Canaries are made from rows of the site's own
file and never leave its machine.
"""

from __future__ import annotations

import random
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedcompose.tasks import Example, Task

CODE_LENGTH = 8  # letters and digits of a mark
MOST_CANDIDATES = 4
TRIED_PER_CANARY = 4  # rows that are asked for each canary, as not every row leaves the expert in doubt
CHUNK_ROWS = 48

Sampler = Callable[[Sequence[str]], list[list[str]]]  # questions → some completions of each


@dataclass(frozen=True)
class Canary:
    """A marked question, answers that the expert gives to it, which of them was taught, and to whom."""

    question: str
    candidates: tuple[Example, ...]  # the drawn one first
    included: bool
    source: str  # the question of the row it was made from, which the twin does without

    @property
    def taught(self) -> Example:
        return self.candidates[0]


def make_canaries(rows: Sequence[Example], task: Task, sampler: Sampler, count: int, seed: int) -> list[Canary]:
    """`count` canaries if the rows suffice: first those that leave the expert in doubt.

    Where too few do, the others are taught an answer of another row; only a supervised stage can learn from those.
    """
    lots = random.Random(f"canaries:{seed}")
    answers = sorted({row.answer for row in rows})
    sources = lots.sample(list(rows), min(len(rows), TRIED_PER_CANARY * count))
    doubtful: list[Canary] = []
    certain: list[Canary] = []
    while sources and len(doubtful) < count:
        chunk, sources = sources[:CHUNK_ROWS], sources[CHUNK_ROWS:]
        marked = [f"[{_code(lots)}] {row.question}" for row in chunk]
        for row, question, texts in zip(chunk, marked, sampler(marked), strict=True):
            given = _given(texts, task)
            kind = doubtful if len(given) > 1 else certain
            if candidates := _candidates(question, given, answers, bool(row.solution), lots):
                kind.append(Canary(question, candidates, lots.random() < 0.5, row.question))
    return (doubtful + certain)[:count]


def _code(lots: random.Random) -> str:
    return "".join(lots.choices(string.ascii_uppercase + string.digits, k=CODE_LENGTH))


def _given(texts: Sequence[str], task: Task) -> dict[str, str]:
    """The answers among completions, the most frequent first, each with a completion that ends in it."""
    answered = [(answer, text) for text in texts if (answer := task.parse(text)) is not None]
    frequent = Counter(answer for answer, _ in answered).most_common(MOST_CANDIDATES)
    first = dict(reversed(answered))
    return {answer: first[answer] for answer, _ in frequent}


def _candidates(
    question: str, given: dict[str, str], answers: Sequence[str], reasons: bool, lots: random.Random
) -> tuple[Example, ...]:
    """Different answers to the question, the one to teach first; none where there is no other answer at all."""
    if len(given) < 2:
        others = [answer for answer in answers if answer not in given]
        given = given | dict.fromkeys(lots.sample(others, min(len(others), MOST_CANDIDATES - len(given))), "")
    if len(given) < 2:
        return ()
    taught = lots.choice(list(given)[1:])
    ordered = [taught, *(answer for answer in given if answer != taught)]
    return tuple(Example(question, answer, _steps(given[answer]) if reasons else None) for answer in ordered)


def _steps(text: str) -> str | None:
    """A completion without its answer line."""
    at = text.lower().rfind("answer:")
    return (text[:at] if at >= 0 else "").strip() or None
