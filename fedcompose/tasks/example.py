"""What a task is: a problem with a checkable answer, where it came from, and how a completion is scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"


@dataclass(frozen=True)
class Origin:
    """The address of a generated problem: anyone who has the generator can make it again."""

    name: str
    config: Mapping[str, JSON] = field(default_factory=dict, hash=False)
    seed: int = 0


@dataclass(frozen=True)
class Example:
    """One problem with a checkable answer."""

    question: str  # shown to the model, without chat template and without the task's instruction
    answer: str  # what the task checks against: for answer-line tasks, the canonical answer
    solution: str | None = None  # worked steps without the answer line
    origin: Origin | None = None  # set when a generator made it


class Task(Protocol):
    """How to ask, read and score. Everything is deterministic; nothing is kept between calls."""

    @property
    def name(self) -> str: ...

    def prompt(self, question: str) -> str:
        """The user turn: the question and one short sentence on how to end."""
        ...

    def canonical(self, answer: str) -> str | None:
        """The form in which an answer from a data file is kept; None where this task cannot check it."""
        ...

    def parse(self, completion: str) -> str | None:
        """The canonical answer that a completion gives, None where it gives none."""
        ...

    def is_correct(self, completion: str, answer: str) -> bool: ...

    def reward(self, completion: str, answer: str) -> float:
        """1.0 exactly when correct; at most 0.1 for a wrong answer in the right form; 0.0 otherwise."""
        ...

    def target(self, example: Example) -> str:
        """The completion that supervised training teaches, on one line where the task allows it."""
        ...
