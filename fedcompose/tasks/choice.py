"""Multiple choice: options are rendered `A) … B) …` behind the question and the answer is a letter."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedcompose.tasks.answer_line import AnswerLine

LETTERS = "ABCDEFGHIJ"
_WHOLE = re.compile(r"\(?([A-Ja-j])[).:]?(?:\s.*)?")
_MARKED = re.compile(r"(?<![\w(])\(?([A-J])[).:](?=\s|$|[,;])")
_ALONE = re.compile(r"(?<![\w'])(?:[B-HJ]|[AI](?![ '][a-z]))(?![\w'])")


def render_choices(question: str, choices: Sequence[str]) -> str:
    """The question with its options, on one line: `Which is largest? A) 3 B) 7`."""
    options = " ".join(f"{letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return f"{question} {options}"


def read_letter(text: str) -> str | None:
    match = _WHOLE.fullmatch(text)
    return match[1].upper() if match else None


def find_letters(text: str) -> list[str]:
    """Letters written as options (`B)`, `(B)`, `B.`); where there are none, capitals that stand alone."""
    marked = [match[1] for match in _MARKED.finditer(text)]
    return marked or [match[0] for match in _ALONE.finditer(text)]


choice = AnswerLine("choice", "End with 'Answer: X'.", read_letter, find_letters)
