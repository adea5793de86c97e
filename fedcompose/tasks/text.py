"""Yes or no, and short exact text."""

from __future__ import annotations

import re
import unicodedata

from fedcompose.tasks.answer_line import AnswerLine, bare

MAX_ANSWER_CHARS = 500
_YES_NO = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_WORD = re.compile(r"\b(?:yes|no|true|false)\b", re.IGNORECASE)
_LEAD = re.compile(r".*(?:\bis\b|\bare\b|[:=])\s", re.IGNORECASE)


def read_yes_no(text: str) -> str | None:
    return _YES_NO.get(text.strip(",! ").lower())


def find_yes_no(text: str) -> list[str]:
    return [_YES_NO[match[0].lower()] for match in _WORD.finditer(text)]


def read_text(text: str) -> str | None:
    text = unicodedata.normalize("NFC", text)
    return text if 0 < len(text) <= MAX_ANSWER_CHARS else None


def find_text(text: str) -> list[str]:
    """The last line, without what leads up to the answer: `The time is 10:35.` gives `10:35`."""
    lines = [line for line in text.splitlines() if line.strip()]
    last = bare(_LEAD.sub("", lines[-1])) if lines else ""
    return [last] if read_text(last) else []


def same_text(left: str, right: str) -> bool:
    return left.casefold() == right.casefold()


yes_no = AnswerLine("yes_no", "End with 'Answer: yes' or 'Answer: no'.", read_yes_no, find_yes_no)
exact = AnswerLine("exact", "End with 'Answer: X'.", read_text, find_text, same_text)
