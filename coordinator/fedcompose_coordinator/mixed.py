"""Prompts that mix domains: two questions of different domains at once; right only when both answers are.

A router that chooses one expert for a whole prompt must give one of the two to a stranger; a router that chooses for
each token need not. The two questions are held-out questions of their domains. Their answers are read by a parser of
its own, in the order in which they stand: a domain's task would take the last one for the only one. Experts that were
only ever asked one question answer one; `mixed_lessons` joins what they taught, so that a composition can learn more.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import Any

from fedcompose.tasks import AnswerLine, Example, Task
from fedcompose_coordinator.lessons import Lesson
from fedcompose_coordinator.questions import MIXED, Domain, Marks, Prompt

INSTRUCTION = "Answer both, each on a line that ends with 'Answer: X'."
_MARK = re.compile(r"\banswer\s*(?P<number>[12]?)\W{0,3}:", re.IGNORECASE)


def mixed_lessons(lessons: Sequence[Lesson], count: int, seed: int) -> list[Lesson]:
    """`count` lessons, each made of two of different domains; of those that end in one answer line."""
    rng, by_domain = random.Random(seed), defaultdict(list)
    for lesson in lessons:
        if len(_MARK.findall(lesson.completion)) == 1 and "\n" in lesson.prompt:
            by_domain[lesson.domain].append(lesson)
    orders = list(permutations(sorted(by_domain), 2))
    found = []
    for number in range(count if orders else 0):
        one, other = (rng.choice(by_domain[domain]) for domain in orders[number % len(orders)])
        questions = (each.prompt.rpartition("\n")[0] for each in (one, other))
        found.append(Lesson(MIXED, mixed_prompt(*questions), f"{one.completion}\n{other.completion}"))
    return found


@dataclass(frozen=True)
class MixedQuestions:
    """`count` prompts over all ordered pairs of the domains, equally many of each as far as that goes.

    Only domains whose answers are lines take part.
    """

    domains: tuple[Domain, ...]
    count: int
    name: str = MIXED

    @cached_property
    def pairs(self) -> list[tuple[Domain, Example, Domain, Example]]:
        """Pair number i takes the questions number i // pairs of its domains, the second one's from the end."""
        fit = [domain for domain in self.domains if isinstance(domain.task, AnswerLine)]
        examples = {domain.name: domain.examples for domain in fit}
        orders = list(permutations(fit, 2))
        found = []
        for number in range(self.count if orders else 0):
            first, second = orders[number % len(orders)]
            row = number // len(orders)
            one, other = examples[first.name], examples[second.name]
            found.append((first, one[row % len(one)], second, other[-1 - row % len(other)]))
        return found

    def identity(self) -> Mapping[str, Any]:
        return {"mixed": [dict(domain.identity()) for domain in self.domains], "count": self.count}

    def prompts(self) -> list[Prompt]:
        return [Prompt(mixed_prompt(one.question, other.question), first.site) for first, one, _, other in self.pairs]

    def mark(self, completions: Sequence[str]) -> Marks:
        """Also `first` and `second`, each question by itself."""
        marks: Marks = {"correct": [], "answered": [], "first": [], "second": []}
        for completion, (first, one, second, other) in zip(completions, self.pairs, strict=True):
            parts = split_answers(completion)
            right = [_is_right(first.task, parts[0], one), _is_right(second.task, parts[1], other)]
            marks["first"].append(int(right[0]))
            marks["second"].append(int(right[1]))
            marks["correct"].append(int(all(right)))
            marks["answered"].append(int(None not in parts))
        return marks


def mixed_prompt(first: str, second: str) -> str:
    return f"1. {first}\n2. {second}\n{INSTRUCTION}"


def split_answers(completion: str) -> tuple[str | None, str | None]:
    """The text that answers each question, up to and including its own `Answer:` line; None where there is none.

    A mark with a number (`Answer 2:`) says itself which it is; without numbers the first mark belongs to the first
    question and the last one, if there is another, to the second.
    """
    marks = list(_MARK.finditer(completion))
    ends = [mark.start() for mark in marks[1:]] + [len(completion)]
    parts = [_line(completion[mark.end() : end]) for mark, end in zip(marks, ends, strict=False)]
    numbered = {mark["number"]: part for mark, part in zip(marks, parts, strict=True) if mark["number"]}
    if numbered:
        return numbered.get("1"), numbered.get("2")
    return (parts[0] if parts else None), (parts[-1] if len(parts) > 1 else None)


def _line(said: str) -> str:
    """What a task reads as one whole answer: a mark without a number, and the rest of its line."""
    return "Answer: " + "".join(said.splitlines()[:1]).strip()


def _is_right(task: Task, part: str | None, example: Example) -> bool:
    return part is not None and task.is_correct(part, example.answer)
