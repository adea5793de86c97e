"""What methods are asked: sets of held-out prompts that know how to mark their answers.

Input: a declared domain, or several for prompts that mix them (`mixed.py`). Output of a set: 0/1 vectors, one entry
per prompt in a fixed order, so that two methods can be compared prompt by prompt. Sites train on the other part of
the generators' fixed split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Protocol

from fedcompose.tasks import Example, Task, generator_task, get_task, held_out

MIXED = "two domains"  # the set, and the lessons, of prompts with two questions; no domain can be called so


@dataclass(frozen=True)
class Prompt:
    """The user's text, and the site whose expert learned such questions; only the oracle is told the site."""

    text: str
    site: str = ""


Marks = dict[str, list[int]]  # "correct", "answered" and what else a set marks → one 0 or 1 per prompt


class Questions(Protocol):
    """A set of prompts; equal identities mean equal prompts and marks."""

    @property
    def name(self) -> str: ...

    def identity(self) -> Mapping[str, Any]: ...

    def prompts(self) -> list[Prompt]: ...

    def mark(self, completions: Sequence[str]) -> Marks: ...


@dataclass(frozen=True)
class Domain:
    """A field of questions: the generator that asks them and the site whose expert learned them."""

    name: str
    site: str
    generator: str
    config: Mapping[str, Any]
    count: int = 200

    @property
    def task(self) -> Task:
        return get_task(generator_task(self.generator))

    @cached_property
    def examples(self) -> list[Example]:
        return held_out(self.generator, self.config, self.count)

    def identity(self) -> Mapping[str, Any]:
        return {"domain": asdict(self)}

    def prompts(self) -> list[Prompt]:
        return [Prompt(self.task.prompt(example.question), self.site) for example in self.examples]

    def mark(self, completions: Sequence[str]) -> Marks:
        task = self.task
        pairs = list(zip(completions, self.examples, strict=True))
        return {
            "correct": [int(task.is_correct(completion, example.answer)) for completion, example in pairs],
            "answered": [int(task.parse(completion) is not None) for completion, _ in pairs],
        }

    def majority(self) -> float:
        """How often one would be right who always gave the commonest answer."""
        answers = Counter(example.answer for example in self.examples)
        return answers.most_common(1)[0][1] / answers.total()

    def describe(self) -> dict[str, Any]:
        """For `evaluation.json`."""
        return {
            "name": self.name, "site": self.site, "generator": self.generator, "config": dict(self.config),
            "task": self.task.name,
        }  # fmt: skip
