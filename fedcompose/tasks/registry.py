"""Finding tasks and generators by name: the built-in ones, reasoning-gym's, and those of installed packages.

A package adds its own by an entry point in the group `fedcompose.tasks` whose name is the task's or
generator's name and whose value is the object. A name in a file or a trace only ever picks among what is
installed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

from fedcompose.errors import ConfigError
from fedcompose.tasks import arithmetic, clock, logic, ordering
from fedcompose.tasks.choice import choice
from fedcompose.tasks.code import code
from fedcompose.tasks.example import JSON, Example, Origin, Task
from fedcompose.tasks.generators import Generator, Split, distinct
from fedcompose.tasks.gym import PREFIX, GymGenerator, gym_generator
from fedcompose.tasks.numeric import numeric
from fedcompose.tasks.text import exact, yes_no

ENTRY_POINTS = "fedcompose.tasks"
TASKS: Mapping[str, Task] = {task.name: task for task in (numeric, choice, yes_no, exact, code)}
GENERATORS: Mapping[str, Generator[Any]] = {
    generator.name: generator
    for module in (arithmetic, ordering, logic, clock)
    for generator in cast("tuple[Generator[Any], ...]", module.GENERATORS)
}


def task_names() -> list[str]:
    """Every task that `get_task` finds on this machine."""
    added = (name for name in _added() if not isinstance(_load(name), Generator))
    return sorted({*TASKS, *added})


def generator_names() -> list[str]:
    """Every generator on this machine, without reasoning-gym's."""
    added = (name for name in _added() if isinstance(_load(name), Generator))
    return sorted({*GENERATORS, *added})


def get_task(name: str) -> Task:
    """Raises: ConfigError: `TASK_UNKNOWN`."""
    found = TASKS.get(name) or (_load(name) if name in _added() else None)
    if found is None or isinstance(found, Generator):
        raise _unknown("TASK_UNKNOWN", f"there is no task {name!a} here", task_names())
    return cast(Task, found)


def get_generator(name: str) -> Generator[Any] | GymGenerator:
    """Raises: ConfigError: `GENERATOR_UNKNOWN`. MissingError: `PACKAGE_MISSING`, without reasoning-gym."""
    if name.startswith(PREFIX):
        return gym_generator(name)
    found = GENERATORS.get(name) or (_load(name) if name in _added() else None)
    if not isinstance(found, Generator):
        raise _unknown("GENERATOR_UNKNOWN", f"there is no generator {name!a} here", generator_names())
    return found


def generator_task(name: str) -> str:
    """The name of the task that scores a generator's problems."""
    return get_generator(name).task


def generate(origin: Origin) -> Example:
    """The problem at an address.

    Raises: ConfigError: `GENERATOR_UNKNOWN`, `TASK_CONFIG`.
    """
    return get_generator(origin.name).generate(origin.config, origin.seed)


def held_out(name: str, config: Mapping[str, JSON], count: int, first_seed: int = 0) -> list[Example]:
    """Distinct problems that no site trains on.

    Raises: ConfigError: `TASK_EXHAUSTED`, and those of `generate`.
    """
    return _distinct(name, config, "test", count, first_seed)


def training(name: str, config: Mapping[str, JSON], count: int, first_seed: int = 0) -> list[Example]:
    """Distinct problems to train on.

    Raises: ConfigError: `TASK_EXHAUSTED`, and those of `generate`.
    """
    return _distinct(name, config, "train", count, first_seed)


def _distinct(name: str, config: Mapping[str, JSON], split: Split, count: int, first_seed: int) -> list[Example]:
    generator = get_generator(name)
    return distinct(lambda seed: generator.generate(config, seed), split, count, first_seed)


@cache
def _added() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


@cache
def _load(name: str) -> object:
    """The object behind an entry point. Raises: ConfigError: `TASK_BROKEN`."""
    point = _added()[name]
    try:
        loaded: object = point.load()
    except (ImportError, AttributeError) as error:
        raise _broken(point, str(error)) from error
    if getattr(loaded, "name", None) != name:
        raise _broken(point, "an object of another name")
    return loaded


def _broken(point: EntryPoint, got: str) -> ConfigError:
    return ConfigError(
        "TASK_BROKEN", f"the installed task {point.name!a} cannot be used",
        expected=f"{point.value} to be a task or generator named {point.name!a}", got=got,
        fix=f"correct or uninstall the package {point.dist.name if point.dist else 'that provides it'}",
    )  # fmt: skip


def _unknown(code: str, what: str, known: list[str]) -> ConfigError:
    return ConfigError(
        code, what, expected=f"one of {', '.join(known)}",
        fix=f"correct the name, or install the package that provides it (entry point {ENTRY_POINTS})",
    )  # fmt: skip
