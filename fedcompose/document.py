"""Documents that are signed or kept: read strictly, and times, digests and names written in one way."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
)

_TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z", re.ASCII)


def format_time(moment: datetime) -> str:
    """UTC to the second, as every document of this project writes it: 2026-11-20T09:00:00Z."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str) -> datetime:
    """Read the one form that `format_time` writes.

    Raises: ValueError.
    """
    if not _TIME.fullmatch(text):
        raise ValueError("a time is written like 2026-11-20T09:00:00Z")
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)


def _as_time(value: Any) -> Any:
    return parse_time(value) if isinstance(value, str) else value


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("a name is made of printable characters")
    return text


Time = Annotated[AwareDatetime, BeforeValidator(_as_time), PlainSerializer(format_time)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}\z")]
Title = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_printable)]


class Document(BaseModel):
    """Base of the documents that are read strictly: unknown fields are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def first_problem(error: ValidationError) -> str:
    """Where and why, without the value; the place may be a stranger's text, so it is escaped and short."""
    problem = error.errors(include_input=False)[0]
    place = ".".join(str(part) for part in problem["loc"])
    reason = problem["msg"].removeprefix("Value error, ")
    return f"{ascii(place)[:80]}: {reason}" if place else reason
