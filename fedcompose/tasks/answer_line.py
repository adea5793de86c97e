"""Tasks whose completion ends in a line `Answer: X`.

The last `Answer:` wins. A completion without one is read leniently, so that a base model that was never
taught the format is scored on what it says and not on how it says it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from fedcompose.tasks.example import Example

FORM_REWARD = 0.1  # for a well-formed wrong answer: enough to learn the form, too little to live on
MAX_COMPLETION_CHARS = 20_000  # longer completions are read from their end only
_MARK = re.compile(r"\banswer\W{0,3}:[*_\s]*", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\{(.*)\}")


@dataclass(frozen=True)
class AnswerLine:
    """A task as a value: its sentence and the three functions that differ between such tasks."""

    name: str
    instruction: str
    read: Callable[[str], str | None]  # a whole answer → canonical, or None
    find: Callable[[str], list[str]]  # free text → the canonical answers in it, in order
    same: Callable[[str, str], bool] = operator.eq  # canonical × canonical

    def prompt(self, question: str) -> str:
        return f"{question}\n{self.instruction}"

    def canonical(self, answer: str) -> str | None:
        return self.read(bare(answer))

    def parse(self, completion: str) -> str | None:
        stated = stated_answer(completion)
        if stated is None:
            return next(reversed(self.find(completion[-MAX_COMPLETION_CHARS:])), None)
        return self.read(stated) or next(iter(self.find(stated.rpartition("=")[2])), None)

    def is_correct(self, completion: str, answer: str) -> bool:
        parsed = self.parse(completion)
        return parsed is not None and self.same(parsed, answer)

    def reward(self, completion: str, answer: str) -> float:
        if self.is_correct(completion, answer):
            return 1.0
        stated = stated_answer(completion)
        return FORM_REWARD if stated is not None and self.read(stated) is not None else 0.0

    def target(self, example: Example) -> str:
        steps = " ".join((example.solution or "").split())
        return f"{steps} Answer: {example.answer}".lstrip()


def stated_answer(completion: str) -> str | None:
    """What follows the last `Answer:`, to the end of its line; None where there is no such mark."""
    marks = list(_MARK.finditer(completion[-MAX_COMPLETION_CHARS:]))
    if not marks:
        return None
    rest = completion[-MAX_COMPLETION_CHARS:][marks[-1].end() :]
    return bare(rest.splitlines()[0] if rest else "")


def bare(text: str) -> str:
    """An answer without what models and files put around it: markdown, quotes, a box, a full stop."""
    text = _BOXED.sub(r"\1", " ".join(text.split()))
    return text.strip("*_`\"' ").removesuffix(".").strip("*_`\"' ")
