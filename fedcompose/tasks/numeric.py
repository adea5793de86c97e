"""Numbers: 1,000 = 1000 = 1000.0 = $1000, 6/8 = 3/4 = 0.75, and LaTeX through math-verify.

Almost every completion of a training run holds a plain number, so those are compared as exact fractions
within microseconds; only other forms reach math-verify. It is called without its timeouts, which rest on
signals and so fail outside the main thread; instead only short expressions of bounded size are handed to
it.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from fedcompose.tasks.answer_line import AnswerLine

MAX_NUMBER_CHARS = 40
MAX_LATEX_CHARS = 60
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_PLAIN = re.compile(rf"[$€£]?(?P<sign>[-+−]?)[$€£]?(?P<number>{_DIGITS})(?:\s*/\s*(?P<below>\d+))?\s*(?P<percent>%?)")
_IN_TEXT = re.compile(rf"(?<![\w.])(?:[-−](?=[$€£]?[\d.]))?[$€£]?(?:{_DIGITS})(?:/\d+)?%?")
# What math-verify may see: one closed form, or two with + or - between them. A grammar and not an alphabet, because
# its LaTeX reader takes exponential time on nested brackets and never ends on some malformed input.
_NUMBER = r"\d{1,12}(?:\.\d{1,12})?"
_ROOT = rf"(?:\\sqrt(?:\{{{_NUMBER}\}}|\d)|sqrt\({_NUMBER}\)|\\pi)"
_PART = rf"(?:(?:{_NUMBER})?{_ROOT}|{_NUMBER})"
_TERM = (
    rf"(?:(?:{_NUMBER}\s*(?:\\times|\\cdot|\*)\s*)?{_NUMBER}\^(?:\{{-?\d{{1,2}}\}}|\d)"
    rf"|\\[dt]?frac(?:\{{-?{_PART}\}}\{{{_PART}\}}|\d\d)"
    rf"|(?:{_NUMBER}\s*(?:\\cdot|\*)?\s*)?{_ROOT}(?:/{_NUMBER})?|{_NUMBER})"
)
_CLOSED_FORM = re.compile(rf"-?\s*{_TERM}(?P<second>\s*[-+]\s*{_TERM})?")
_IRRATIONAL = re.compile(r"sqrt|pi")
_FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")


def read_number(text: str) -> str | None:
    """A whole answer as canonical text: `12`, `0.5`, a reduced `a/b`, `50%`, or short LaTeX as it is."""
    text = _FRACTION.sub(r"\1/\2", text.strip("$ "))
    return _plain(text) or (text if _is_closed_form(text) else None)


def find_numbers(text: str) -> list[str]:
    numbers = (_plain(match[0]) for match in _IN_TEXT.finditer(text))
    return [number for number in numbers if number is not None]


def same_number(left: str, right: str) -> bool:
    """Whether two canonical numbers are equal; `50%` equals both `50` and `0.5`."""
    if left == right:
        return True
    a, b = _values(left), _values(right)
    if a and b:
        return not a.isdisjoint(b)
    return _equivalent(right, left)


def _plain(text: str) -> str | None:
    """The canonical text of an ordinary number, None for anything else."""
    match = _PLAIN.fullmatch(text.strip()) if len(text) <= MAX_NUMBER_CHARS else None
    if match is None or (match["below"] and int(match["below"]) == 0):
        return None
    number = match["number"].replace(",", "")
    if match["below"]:
        written = str(Fraction(number) / int(match["below"]))
    else:
        whole, _, decimals = number.partition(".")
        written = f"{int(whole or 0)}.{decimals}".rstrip("0").rstrip(".") if decimals else str(int(whole))
    sign = "-" if match["sign"] in ("-", "−") and written != "0" else ""
    return f"{sign}{written}{match['percent']}"


def _values(canonical: str) -> set[Fraction]:
    number = canonical.removesuffix("%")
    try:
        value = Fraction(number)
    except ValueError:
        return set()
    return {value} if number == canonical else {value, value / 100}


def _is_closed_form(text: str) -> bool:
    """Whether math-verify may be asked about `text`.

    Sums and products of plain numbers are not answers: else a completion could repeat the question.
    """
    match = _CLOSED_FORM.fullmatch(text) if len(text) <= MAX_LATEX_CHARS else None
    return match is not None and (match["second"] is None or bool(_IRRATIONAL.search(text)))


def _equivalent(gold: str, given: str) -> bool:
    """By math-verify; at least one of the two is a closed form."""
    if not all(_values(text) or _is_closed_form(text) for text in (gold, given)):
        return False
    from math_verify import verify

    return bool(verify(list(_symbolic(gold)), list(_symbolic(given)), timeout_seconds=None))


@lru_cache(maxsize=4096)
def _symbolic(text: str) -> tuple[Any, ...]:
    from math_verify import parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that we run it without timeouts
    return tuple(parse(f"${text}$", parsing_timeout=None))


numeric = AnswerLine("numeric", "End with 'Answer: X'.", read_number, find_numbers, same_number)
