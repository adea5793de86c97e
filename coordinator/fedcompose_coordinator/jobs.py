"""What has become of a call at one site, in files that outlive every process.

    calls/<call>/<site>.jsonl    a line whenever the state changed; the last one counts
    calls/<call>/<site>.json     how far it is and when the site was last heard of, for people to look at
    calls/<call>/<site>/         a contribution on its way, see `partial.py`

    called → asked → approved → training → trained → ready → fetching → received → admitted, or rejected
                   → refused                → failed                               → waiting

The states up to `ready` are the site's own word; those after it are ours. A job that ends in none of the last ones is
`missed` when the time for collecting is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from fedcompose import ledger
from fedcompose.call import COLLECTION_PERIOD, MAX_CALL_BYTES, Call, CalledSite, read_own_call
from fedcompose.document import format_time
from fedcompose.errors import FedcomposeError
from fedcompose.files import dump_json, read_json, read_limited, write_atomic

CALLED = "called"  # before the site has answered
OURS = frozenset({"received", "waiting", "admitted"})  # what came is being judged, or good: the site is done
ENDED = frozenset({"waiting", "admitted", "missed"})


@dataclass
class Job:
    """One call at one site."""

    home: Path
    call: Call
    envelope: bytes
    site: CalledSite
    state: str = CALLED
    offer: str = ""  # the digest of the offer that `state` is about
    seen: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.home / "calls" / self.call.id

    @property
    def record(self) -> Path:
        return self.folder / f"{self.site.id}.jsonl"

    @property
    def partial(self) -> Path:
        return self.folder / self.site.id

    @property
    def inbox(self) -> Path:
        return self.home / "inbox" / self.site.id / self.site.domain

    @property
    def is_accepted(self) -> bool:
        """Whether the site has the call."""
        return self.state != CALLED

    def enter(self, state: str, now: datetime, **fields: int | str) -> None:
        """Write down that the state has changed, if it has."""
        offer = str(fields.get("offer", self.offer))
        if (state, offer) != (self.state, self.offer):
            ledger.append(self.record, state, now, **fields)
            self.state, self.offer = state, offer
        self.tell(now, state=state, code=str(fields.get("code", "")))

    def tell(self, heard: datetime | None, **changes: int | str) -> None:
        """Keep what people may want to see; `heard` is when, if this is from the site."""
        seen = {**self.seen, **changes}
        if heard is not None:
            seen["last_seen"] = format_time(heard)
        if seen != self.seen:
            write_atomic(self.folder / f"{self.site.id}.json", dump_json(seen))
            self.seen = seen

    def is_over(self, now: datetime) -> bool:
        """Whether the site's time is up: to accept the call, or to hand over what it made in time."""
        deadline = self.call.deadline
        return now >= (deadline + COLLECTION_PERIOD if self.is_accepted else deadline)


def open_job(home: Path, call: Call, envelope: bytes, site: CalledSite) -> Job:
    """The job as its record says; a last line that a crash cut short is set aside.

    Raises: RefusedError: `LEDGER_BROKEN`.
    """
    job = Job(home, call, envelope, site)
    ledger.repair(job.record)
    for entry in ledger.verify(job.record):
        job.state, job.offer = entry.event, str(entry.fields.get("offer", job.offer))
    job.seen = read_seen(job.folder / f"{site.id}.json")
    return job


def jobs_of(home: Path, call_path: Path) -> list[Job]:
    """The jobs of one call of this coordinator's, a job for each site."""
    envelope = read_limited(call_path, MAX_CALL_BYTES)
    call = read_own_call(envelope)
    return [open_job(home, call, envelope, site) for site in call.sites]


def call_paths(home: Path) -> Sequence[Path]:
    """The calls of this coordinator, the oldest first."""
    return sorted((home / "calls").glob("*.json"))


def read_seen(path: Path) -> dict[str, Any]:
    """What was last seen of a job; nothing if that cannot be read: it decides whether a receipt is sent once more."""
    try:
        found = read_json(path)
    except FedcomposeError:
        return {}
    return found if isinstance(found, dict) else {}
