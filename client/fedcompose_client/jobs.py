"""What becomes of each call at this site: a ledger of events beside the call. The last event is the state.

    asked ─┬─ refused
           └─ approved ── started ── trained ─(distilled)─┬─ signed
                             └─ failed ── approved, ...   └─ held ── released

With `[calls] release = "ask"` what was signed is held until its owner has seen it and releases its digest.

`calls/<id>.json` is the call as the coordinator signed it, `calls/<id>.jsonl` what happened, in lines that cannot be
changed unnoticed. Several processes may look and write: the one that answers the coordinator, the worker, and the
commands that people type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from fedcompose import ledger
from fedcompose.call import MAX_CALL_BYTES, Call, check_history, read_own_call
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.files import read_limited, write_atomic
from fedcompose.ledger import Entry

Event = Literal[
    "asked", "refused", "approved", "started", "trained", "distilled", "signed", "held", "released", "failed"
]
State = Literal["asked", "refused", "approved", "training", "trained", "held", "ready", "failed"]
Decision = Literal["approved", "refused"]

STATE_AFTER: Mapping[str, State] = {
    "asked": "asked",
    "refused": "refused",
    "approved": "approved",
    "started": "training",
    "trained": "trained",
    "distilled": "trained",
    "signed": "ready",
    "held": "held",
    "released": "ready",
    "failed": "failed",
}
MAY_APPROVE: frozenset[State] = frozenset({"asked", "refused", "failed"})


@dataclass(frozen=True)
class Job:
    """A call that this site keeps, and what has happened to it."""

    call: Call
    envelope: bytes
    events: Sequence[Entry]

    @property
    def state(self) -> State:
        """A call without events was put into the folder by hand."""
        return STATE_AFTER[self.events[-1].event] if self.events else "asked"

    @property
    def since_approval(self) -> Mapping[str, Entry]:
        """What has happened since the newest approval, by event."""
        approvals = [index for index, entry in enumerate(self.events) if entry.event == "approved"]
        return {entry.event: entry for entry in self.events[approvals[-1] if approvals else 0 :]}

    @property
    def held(self) -> str | None:
        """The digest of what was signed for this call, while it waits for its owner's release."""
        return str(self.events[-1].fields["offer"]) if self.state == "held" else None

    @property
    def offer(self) -> str | None:
        """The digest of what was signed for this call, while it may leave."""
        return str(self.events[-1].fields["offer"]) if self.state == "ready" else None


def keep(site: Path, call: Call, envelope: bytes, now: datetime) -> Job:
    """The job of this call, begun if it is new. Calls are kept for good: they hold the coordinator's ledger's heads.

    Raises: RefusedError: `CALL_ID_TAKEN` (another call has this id), `LEDGER_SHRUNK`, `LEDGER_FORKED`.
    """
    path = call_path(site, call.id)
    if path.exists() and read_limited(path, MAX_CALL_BYTES) != envelope:
        raise RefusedError("CALL_ID_TAKEN", f"another call {call.id} was accepted before")
    check_history([call, *(each.call for each in jobs(site) if each.call.id != call.id)])
    if not path.exists():
        write_atomic(path, envelope)
    if not read_job(site, call.id).events:
        record(site, call.id, "asked", now, sha256=call.digest)
    return read_job(site, call.id)


def decide(site: Path, call_id: str, decision: Decision, now: datetime) -> Job:
    """Approve or refuse a call. An approved one that failed may be approved again; what is ready can still be refused.

    Raises: ConfigError: `CALL_MISSING`, `CALL_STATE`.
    """
    found = read_job(site, call_id)
    allowed = found.state in MAY_APPROVE if decision == "approved" else found.state != "refused"
    if not allowed:
        raise ConfigError(
            "CALL_STATE",
            f"the call {call_id} cannot be {decision} any more",
            expected=f"a call that is {', '.join(sorted(MAY_APPROVE))}" if decision == "approved" else None,
            got=found.state,
        )
    record(site, call_id, decision, now)
    return read_job(site, call_id)


def sign(site: Path, call_id: str, offer: str, now: datetime, *, hold: bool = False) -> None:
    """Write down that an offer of this digest was signed for the call. Unless it is held, it may now be fetched.

    Raises: ConfigError: `CALL_STATE`, for a call that was refused, perhaps while the work for it went on.
    """
    if read_job(site, call_id).state == "refused":
        raise ConfigError(
            "CALL_STATE", f"the call {call_id} was refused", fix="approve it first, if you have changed your mind"
        )
    record(site, call_id, "held" if hold else "signed", now, offer=offer)


def release(site: Path, offer: str, now: datetime) -> Job:
    """Let the held offer of exactly this digest be fetched.

    Raises: ConfigError: `RELEASE_UNKNOWN`.
    """
    for job in jobs(site):
        if job.held == offer:
            record(site, job.call.id, "released", now, offer=offer)
            return read_job(site, job.call.id)
    raise ConfigError(
        "RELEASE_UNKNOWN",
        "nothing of this digest is held here",
        expected=" or ".join(job.held for job in jobs(site) if job.held) or "something that was signed and is held",
        fix="fedcompose client preview",
    )


def record(site: Path, call_id: str, event: Event, now: datetime, **fields: str) -> None:
    """Add an event, on disk when this returns."""
    path = _events_path(site, call_id)
    ledger.repair(path)
    ledger.append(path, event, now, **fields)


def read_job(site: Path, call_id: str) -> Job:
    """One call and its events.

    Raises: ConfigError: `CALL_MISSING`. RefusedError: `LEDGER_BROKEN`.
    """
    path = call_path(site, call_id)
    if not path.is_file():
        raise ConfigError(
            "CALL_MISSING", f"there is no call {call_id!a} in {path.parent}", fix="fedcompose client calls"
        )
    envelope = read_limited(path, MAX_CALL_BYTES)
    events = _events_path(site, call_id)
    ledger.repair(events)
    return Job(read_own_call(envelope), envelope, ledger.verify(events))


def jobs(site: Path) -> list[Job]:
    """All calls that this site keeps, the oldest first."""
    return [read_job(site, path.stem) for path in sorted((site / "calls").glob("*.json"))]


def call_path(site: Path, call_id: str) -> Path:
    return site / "calls" / f"{call_id}.json"


def _events_path(site: Path, call_id: str) -> Path:
    return site / "calls" / f"{call_id}.jsonl"
