"""How far the sites are with the newest call, as the coordinator's files say."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fedcompose.document import parse_time
from fedcompose_coordinator.jobs import ENDED, Job, call_paths, jobs_of

AT_AN_END = ENDED | {"rejected", "refused"}  # nothing will come of itself any more


@dataclass(frozen=True)
class SiteStatus:
    """One site of one call; numbers are -1 where nothing is known."""

    call: str
    site: str
    domain: str
    state: str
    step: int
    steps: int
    eta_s: int
    bytes: int
    total: int
    last_seen: str | None
    code: str | None

    @property
    def is_at_an_end(self) -> bool:
        return self.state in AT_AN_END

    def said(self) -> str:
        """The state in words for people: `training 43 %, 12 min left`, `fetching 61 %`, `rejected BASE_MISMATCH`."""
        text = self.state
        if self.state == "fetching" and self.total > 0:
            text += f" {100 * self.bytes // self.total} %"
        elif self.state == "training" and self.steps > 0:
            text += f" {100 * max(self.step, 0) // self.steps} %"
            text += f", {_duration(self.eta_s)} left" if self.eta_s >= 0 else ""
        return f"{text} {self.code}" if self.code else text

    def seen(self, now: datetime) -> str:
        """How long ago the site was heard of."""
        if self.last_seen is None:
            return "never"
        return f"{_duration(max(0, int((now - parse_time(self.last_seen)).total_seconds())))} ago"


def read_status(home: Path, now: datetime) -> list[SiteStatus]:
    """Every site of the newest call; nothing if there is no call.

    Raises: RefusedError: as `jobs_of`.
    """
    calls = call_paths(home)
    return [_status(job, now) for job in jobs_of(home, calls[-1])] if calls else []


def _status(job: Job, now: datetime) -> SiteStatus:
    over = job.state not in AT_AN_END and job.is_over(now)
    step, steps, eta_s, size, total = (
        _number(job.seen.get(name)) for name in ("step", "steps", "eta_s", "bytes", "total")
    )
    return SiteStatus(
        job.call.id, job.site.id, job.site.domain, "missed" if over else job.state, step, steps, eta_s, size, total,
        last_seen=job.seen.get("last_seen") or None, code=job.seen.get("code") or None,
    )  # fmt: skip


def _number(value: Any) -> int:
    return value if type(value) is int else -1


def _duration(seconds: int) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds // unit} {name}"
    return f"{seconds} s"
