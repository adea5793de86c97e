"""Boolean expressions, evaluated from the inside out."""

from __future__ import annotations

from random import Random

from pydantic import Field

from fedcompose.tasks.example import Example
from fedcompose.tasks.generators import Generator, GeneratorConfig


class LogicConfig(GeneratorConfig):
    literals: int = Field(4, ge=3, le=8)


def _logic(source: Random, config: LogicConfig) -> Example:
    """`(not True or False) and (True or False)`, half of them true (about 10,000)."""
    wanted = source.random() < 0.5
    while True:
        steps: list[str] = []
        text, value = _expression(source, config.literals, steps)
        if value == wanted:
            break
    text = text[1:-1] if text.startswith("(") else text
    return Example(f"Is {text} true?", "yes" if value else "no", f"{', '.join(steps)}.")


def _expression(source: Random, literals: int, steps: list[str]) -> tuple[str, bool]:
    """A random tree over `literals` leaves as text, and its value; appends one step per operation."""
    if literals == 1:
        value = source.random() < 0.5
        if source.random() < 2 / 3:
            return str(value), value
        steps.append(f"not {value}={not value}")
        return f"not {value}", not value
    left_size = source.randint(1, literals - 1)
    left, a = _expression(source, left_size, steps)
    right, b = _expression(source, literals - left_size, steps)
    word = source.choice(("and", "or"))
    value = (a and b) if word == "and" else (a or b)
    steps.append(f"{a} {word} {b}={value}")
    return f"({left} {word} {right})", value


GENERATORS = (Generator("logic", "yes_no", LogicConfig, _logic),)
