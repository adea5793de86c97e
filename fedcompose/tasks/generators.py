"""Procedural problems, addressed as (name, config, seed) so that a prompt can be made again anywhere.

The same origin gives the same problem on every machine and Python version. Sites and coordinator need not
talk to keep training and held-out prompts apart: the question text itself decides, by a stable hash, to
which side it belongs.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fedcompose.errors import ConfigError
from fedcompose.tasks.example import JSON, Example, Origin

TEST_SHARE_PERCENT = 20
MAX_MISSES = 5_000  # seeds in a row that brought no new question: the generator is exhausted

Split = Literal["train", "test"]


class GeneratorConfig(BaseModel):
    """Base of all generators' settings: bounded, nothing unknown, because origins arrive from other sites."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


ConfigT = TypeVar("ConfigT", bound=GeneratorConfig)


@dataclass(frozen=True)
class Generator(Generic[ConfigT]):
    """A source of problems: `make` draws one from the given random source alone."""

    name: str
    task: str  # name of the task that scores its problems
    config: type[ConfigT]
    make: Callable[[random.Random, ConfigT], Example]

    def generate(self, config: Mapping[str, JSON], seed: int) -> Example:
        """Raises: ConfigError: `TASK_CONFIG`."""
        settings = self.settings(config)
        changed = settings.model_dump(exclude_defaults=True)  # so that a new field does not change old problems
        source = random.Random(f"{self.name}:{json.dumps(changed, sort_keys=True)}:{seed}")
        return replace(self.make(source, settings), origin=Origin(self.name, dict(config), seed))

    def settings(self, config: Mapping[str, JSON]) -> ConfigT:
        try:
            return self.config.model_validate(dict(config))
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"]) or "config"
            raise ConfigError(
                "TASK_CONFIG", f"generator {self.name!a} does not take this config", 
                got=f"{field}: {first['msg']}",
                fix=f"use only {', '.join(sorted(self.config.model_fields))}, within their bounds",
            ) from error  # fmt: skip


def split_of(question: str) -> Split:
    """The side of the train/test border on which a question lies, everywhere and for ever."""
    bucket = int.from_bytes(hashlib.sha256(question.encode()).digest()[:4], "big") % 100
    return "test" if bucket < TEST_SHARE_PERCENT else "train"


def distinct(make: Callable[[int], Example], split: Split, count: int, first_seed: int = 0) -> list[Example]:
    """The first `count` distinct questions of one split, in the order of their seeds.

    Raises: ConfigError: `TASK_EXHAUSTED`, when the generator has no more of them.
    """
    found: dict[str, Example] = {}
    seed, misses = first_seed, 0
    while len(found) < count:
        example = make(seed)
        seed += 1
        if split_of(example.question) == split and example.question not in found:
            found[example.question] = example
            misses = 0
        elif (misses := misses + 1) > MAX_MISSES:
            raise ConfigError(
                "TASK_EXHAUSTED", "the generator has too few distinct questions",
                expected=f"{count} in the {split} split", got=str(len(found)),
                fix="widen its config or ask for fewer",
            )  # fmt: skip
    return list(found.values())
