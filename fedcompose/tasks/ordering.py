"""Comparing, ordering and counting numbers. Numbers are the distinct questions under the default config."""

from __future__ import annotations

from fractions import Fraction
from math import gcd
from random import Random
from typing import Literal

from pydantic import Field

from fedcompose.tasks.choice import LETTERS, render_choices
from fedcompose.tasks.example import Example
from fedcompose.tasks.generators import Generator, GeneratorConfig

_RANKS = ("largest", "second largest", "third largest", "fourth largest", "fifth largest")


class OrderStatisticConfig(GeneratorConfig):
    rank: int = Field(2, ge=1, le=5)
    count: int = Field(5, ge=5, le=10)
    max_number: int = Field(99, ge=20, le=9999)


def _order_statistic(source: Random, config: OrderStatisticConfig) -> Example:
    """`second largest of 34, 71, 12, 57, 40`: the solution sorts (billions)."""
    numbers = source.sample(range(1, config.max_number + 1), config.count)
    ordered = sorted(numbers, reverse=True)
    question = f"What is the {_RANKS[config.rank - 1]} of {', '.join(map(str, numbers))}?"
    return Example(question, str(ordered[config.rank - 1]), f"{' '.join(map(str, ordered))}.")


class ExtremeConfig(GeneratorConfig):
    count: int = Field(5, ge=3, le=10)
    max_number: int = Field(99, ge=20, le=9999)


def _extreme(source: Random, config: ExtremeConfig) -> Example:
    """`largest of 34, 71, 12, 57, 40` or the smallest: the solution names the best so far at each step (billions)."""
    numbers = source.sample(range(1, config.max_number + 1), config.count)
    word, best = source.choice((("largest", max), ("smallest", min)))
    steps = " ".join(str(best(numbers[: i + 1])) for i in range(config.count))
    return Example(f"What is the {word} of {', '.join(map(str, numbers))}?", str(best(numbers)), f"{steps}.")


class ChoiceConfig(GeneratorConfig):
    count: int = Field(5, ge=3, le=10)
    max_number: int = Field(99, ge=20, le=9999)


def _largest_choice(source: Random, config: ChoiceConfig) -> Example:
    """`Which is largest? A) 34 B) 71 …`: the solution names the best so far at each step (billions)."""
    numbers = source.sample(range(1, config.max_number + 1), config.count)
    best = [max(range(i + 1), key=numbers.__getitem__) for i in range(config.count)]
    steps = " ".join(f"{LETTERS[i]}{numbers[i]}" for i in best)
    return Example(render_choices("Which is largest?", [str(n) for n in numbers]), LETTERS[best[-1]], f"{steps}.")


def _closest_choice(source: Random, config: ChoiceConfig) -> Example:
    """`Which is closest to 50? A) 34 B) 71 …`: the solution takes each distance (billions)."""
    while True:
        numbers = source.sample(range(1, config.max_number + 1), config.count)
        middle = source.randint(1, config.max_number)
        distances = [abs(number - middle) for number in numbers]
        if distances.count(min(distances)) == 1:
            break
    steps = " ".join(f"{letter}{distance}" for letter, distance in zip(LETTERS, distances, strict=False))
    question = render_choices(f"Which is closest to {middle}?", [str(n) for n in numbers])
    return Example(question, LETTERS[distances.index(min(distances))], f"{steps}.")


class FractionsConfig(GeneratorConfig):
    count: int = Field(3, ge=2, le=5)
    max_denominator: int = Field(12, ge=6, le=99)


def _compare_fractions(source: Random, config: FractionsConfig) -> Example:
    """`largest of 3/4, 5/7, 2/3`, by cross products against the best so far (about 85,000)."""
    proper = [(a, b) for b in range(2, config.max_denominator + 1) for a in range(1, b) if gcd(a, b) == 1]
    fractions = source.sample(proper, config.count)
    best, steps = fractions[0], []
    for a, b in fractions[1:]:
        left, right = best[0] * b, a * best[1]
        steps.append(f"{best[0]}*{b}={left}, {a}*{best[1]}={right}, ")
        best = max(best, (a, b), key=lambda pair: Fraction(*pair))
        steps[-1] += f"{best[0]}/{best[1]}."
    question = f"Which is largest: {', '.join(f'{a}/{b}' for a, b in fractions)}?"
    return Example(question, f"{best[0]}/{best[1]}", " ".join(steps))


class CountItemsConfig(GeneratorConfig):
    property: Literal["above", "even"] = "above"
    count: int = Field(7, ge=4, le=20)
    max_number: int = Field(99, ge=50, le=9999)


def _count_items(source: Random, config: CountItemsConfig) -> Example:
    """`How many of 34, 71, 12 … are above 38?`, every count equally often (billions)."""
    wanted, numbers = source.randint(1, config.count), list(range(1, config.max_number + 1))
    limit = source.randint(config.count, config.max_number - config.count)
    hits = [n for n in numbers if (n > limit if config.property == "above" else n % 2 == 0)]
    others = [n for n in numbers if (n <= limit if config.property == "above" else n % 2 == 1)]
    drawn = source.sample(hits, wanted) + source.sample(others, config.count - wanted)
    source.shuffle(drawn)
    what = f"above {limit}" if config.property == "above" else "even"
    listed = " ".join(str(n) for n in drawn if n in set(hits))
    return Example(f"How many of {', '.join(map(str, drawn))} are {what}?", str(wanted), f"{listed}.")


GENERATORS = (
    Generator("order_statistic", "numeric", OrderStatisticConfig, _order_statistic),
    Generator("extreme", "numeric", ExtremeConfig, _extreme),
    Generator("largest_choice", "choice", ChoiceConfig, _largest_choice),
    Generator("closest_choice", "choice", ChoiceConfig, _closest_choice),
    Generator("compare_fractions", "numeric", FractionsConfig, _compare_fractions),
    Generator("count_items", "numeric", CountItemsConfig, _count_items),
)
