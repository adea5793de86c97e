"""Clock arithmetic on a 24-hour clock, within one day."""

from __future__ import annotations

from random import Random

from pydantic import Field

from fedcompose.tasks.example import Example
from fedcompose.tasks.generators import Generator, GeneratorConfig

DAY_MINUTES = 24 * 60


class ClockConfig(GeneratorConfig):
    max_minutes: int = Field(180, ge=30, le=720)


def _clock(source: Random, config: ClockConfig) -> Example:
    """`What time is 85 minutes after 09:50?` (about 220,000)."""
    added = source.randint(5, config.max_minutes)
    start = source.randrange(DAY_MINUTES - added)
    hour, minute = divmod(start, 60)
    hours, minutes = divmod(added, 60)
    steps = [
        f"{added}={hours}h{minutes}",
        f"{hour}+{hours}={hour + hours}",
        f"{minute}+{minutes}={minute + minutes}",
    ]
    if minute + minutes >= 60:
        steps.append(f"{minute + minutes}-60={minute + minutes - 60}")
        steps.append(f"{hour + hours}+1={hour + hours + 1}")
    return Example(f"What time is {added} minutes after {_time(start)}?", _time(start + added), f"{', '.join(steps)}.")


def _duration(source: Random, config: ClockConfig) -> Example:
    """`How many minutes from 09:50 to 11:15?` (about 220,000)."""
    length = source.randint(5, config.max_minutes)
    start = source.randrange(DAY_MINUTES - length)
    (hour, minute), (end_hour, end_minute) = divmod(start, 60), divmod(start + length, 60)
    hours = 60 * (end_hour - hour)
    steps = [f"{end_hour}-{hour}={end_hour - hour}", f"{end_hour - hour}*60={hours}"]
    steps += [f"{hours}+{end_minute}={hours + end_minute}", f"{hours + end_minute}-{minute}={length}"]
    return Example(
        f"How many minutes from {_time(start)} to {_time(start + length)}?",
        str(length),
        f"{', '.join(steps)}.",
    )


def _time(minutes: int) -> str:
    return f"{minutes // 60:02}:{minutes % 60:02}"


GENERATORS = (
    Generator("clock", "exact", ClockConfig, _clock),
    Generator("duration", "numeric", ClockConfig, _duration),
)
