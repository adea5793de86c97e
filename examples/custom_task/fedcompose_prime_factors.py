"""A task of one's own, `number_list`, and a generator of problems for it, `prime_factors`.

Install it beside fedcompose at every site and at the coordinator (`pip install ./examples/custom_task`); from then on
`task = "number_list"` works in site.toml, and `prime_factors` wherever a generator is named.
"""

from __future__ import annotations

import re
from random import Random

from pydantic import Field

from fedcompose.tasks import AnswerLine, Example, Generator, GeneratorConfig

_LIST = re.compile(r"\d+(?:, ?\d+)*")


def read(text: str) -> str | None:
    """A whole answer: numbers between commas, in any order."""
    return _sorted(text) if _LIST.fullmatch(text) else None


def find(text: str) -> list[str]:
    """Every list of numbers in free text."""
    return [_sorted(match) for match in _LIST.findall(text)]


def _sorted(numbers: str) -> str:
    return ", ".join(map(str, sorted(int(number) for number in numbers.split(","))))


number_list = AnswerLine("number_list", "End with 'Answer: X, Y, ...'.", read, find)


class Config(GeneratorConfig):
    max_number: int = Field(5000, ge=100, le=100_000)


def make(source: Random, config: Config) -> Example:
    """`84`: divide by the smallest prime until 1 is left. Draws from `source` alone, so that it can be repeated."""
    number = left = source.randint(10, config.max_number)
    factors, steps = [], []
    while left > 1:
        factor = next((d for d in range(2, int(left**0.5) + 1) if left % d == 0), left)
        steps.append(f"{left}/{factor}={left // factor}")
        factors.append(factor)
        left //= factor
    answer = ", ".join(map(str, factors))
    return Example(f"What are the prime factors of {number}?", answer, solution=f"{', '.join(steps)}.")


prime_factors = Generator("prime_factors", "number_list", Config, make)
