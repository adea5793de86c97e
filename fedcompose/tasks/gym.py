"""The procedural datasets of reasoning-gym (an extra), as `reasoning_gym:<dataset>`.

An origin's seed addresses one problem: item 0 of the dataset made with that seed. Problems are scored by
our own tasks against the dataset's reference answer, so where several answers would do, only that one
counts. The library's own scorers are never called: several pass the answer they are given to `eval`, and
here answers come from models and from other sites. For the same reason a config holds numbers and switches
only: some datasets evaluate strings of their config, and others read files named there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from fedcompose.errors import ConfigError, MissingError
from fedcompose.tasks.example import JSON, Example, Origin, Task
from fedcompose.tasks.numeric import numeric
from fedcompose.tasks.text import exact, yes_no

PREFIX = "reasoning_gym:"
MAX_CONFIG_NUMBER = 1_000_000
MAX_QUESTION_CHARS = 20_000
PROBES = 8  # problems looked at to choose a dataset's task


@dataclass(frozen=True)
class GymGenerator:
    """One dataset of reasoning-gym; made by `gym_generator`."""

    name: str
    dataset: str

    @property
    def task(self) -> str:
        """`numeric` or `yes_no` where all of the first problems have such answers, else `exact`."""
        return _task(self.dataset).name

    def generate(self, config: Mapping[str, JSON], seed: int) -> Example:
        """Raises: ConfigError: `TASK_CONFIG`, `TASK_NO_ANSWER` (no short reference answer)."""
        entry = _entry(self.dataset, config, seed)
        answer = _task(self.dataset).canonical(str(entry["answer"])) if entry["answer"] is not None else None
        question = str(entry["question"]).strip()
        if answer is None or len(question) > MAX_QUESTION_CHARS:
            raise ConfigError(
                "TASK_NO_ANSWER", f"{self.name!a} has no reference answer that task {self.task} can check",
                fix="choose another dataset or config",
            )  # fmt: skip
        return Example(question, answer, origin=Origin(self.name, dict(config), seed))


def gym_generator(name: str) -> GymGenerator:
    """Raises: MissingError: `PACKAGE_MISSING`. ConfigError: `GENERATOR_UNKNOWN`."""
    dataset = name.removeprefix(PREFIX)
    if dataset not in _datasets():
        raise ConfigError(
            "GENERATOR_UNKNOWN", f"reasoning-gym has no dataset {dataset!a}",
            expected=f"one of {', '.join(sorted(_datasets()))}",
        )  # fmt: skip
    return GymGenerator(name, dataset)


def _datasets() -> Mapping[str, tuple[Any, Any]]:
    """Each dataset's class and config class."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise MissingError(
            "PACKAGE_MISSING", "problems of reasoning-gym need a package that is not installed",
            fix="pip install 'fedcompose[reasoning-gym]'",
        ) from error  # fmt: skip
    datasets: Mapping[str, tuple[Any, Any]] = DATASETS
    return datasets


@cache
def _task(dataset: str) -> Task:
    entries = [_entry(dataset, {}, seed) for seed in range(PROBES)]
    answers = [str(entry["answer"]) for entry in entries]
    fitting = (task for task in (numeric, yes_no) if all(task.canonical(answer) for answer in answers))
    return next(fitting, exact)


def _entry(dataset: str, config: Mapping[str, JSON], seed: int) -> dict[str, Any]:
    make, settings = _datasets()[dataset]
    allowed = {field.name for field in dataclasses.fields(settings)} - {"seed", "size"}
    refused = [key for key, value in config.items() if key not in allowed or not _plain(value)]
    if refused:
        raise _config_error(dataset, f"{refused[0]!a}", allowed)
    try:
        entry: dict[str, Any] = make(config=settings(**config, seed=seed, size=1))[0]
    except (AssertionError, TypeError, ValueError) as error:  # how reasoning-gym reports a bad config
        raise _config_error(dataset, str(error), allowed) from error
    return entry


def _plain(value: JSON) -> bool:
    if isinstance(value, list):
        return len(value) <= 100 and all(_plain(item) and not isinstance(item, list) for item in value)
    return value is None or (isinstance(value, bool | int | float) and abs(value) <= MAX_CONFIG_NUMBER)


def _config_error(dataset: str, got: str, allowed: set[str]) -> ConfigError:
    return ConfigError(
        "TASK_CONFIG", f"reasoning-gym's {dataset!a} does not take this config", got=got,
        expected=f"numbers and switches among {', '.join(sorted(allowed))}",
    )  # fmt: skip
