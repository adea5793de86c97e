"""What this coordinator has decided: a line in `ledger.jsonl` for each decision, and what follows from the lines.

The ledger is the record and not a copy of it: a contribution is admitted because a line says so. So no crash can
leave ledger and record in disagreement, and an old copy of `state.json` brings nothing back. `state.json` holds only
what the ledger cannot know of itself: its own head, and the latest time that this coordinator has seen.

    called     the call and its digest            received   a contribution that passed every check
    refused    a digest and the code              approved   by whom, with which key
    admitted   the contribution                   composed   the candidate and its experts
    released   the release                        repaired   what a crash had left half written
    quarantined  the contribution, and the codes of what `screen` found

Every command that decides something does so within `deciding`: one at a time, with the whole ledger checked against
the heads that are known here, and not while the clock is behind what it was.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedcompose import ledger
from fedcompose.call import MAX_CALL_BYTES, Call, read_own_call
from fedcompose.contribution import Kind
from fedcompose.document import Digest, Time, format_time
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.files import read_json, read_limited, write_json
from fedcompose.keys import Identifier
from fedcompose.ledger import EMPTY, Entry, Head

LEDGER_FILE = "ledger.jsonl"
STATE_FILE = "state.json"
CLOCK_TOLERANCE = timedelta(minutes=5)  # by which a clock may be set back; time services move it by seconds


class _State(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_: Literal["fedcompose/coordinator-state/v1"] = Field(alias="schema")
    latest: Time
    ledger: Head


class Known(BaseModel):
    """A contribution that passed every check when it was received."""

    model_config = ConfigDict(frozen=True, strict=True)

    site: Identifier
    kind: Kind
    sequence: int
    bytes: int
    received_on: datetime
    call: Identifier | None = None
    approvals: dict[Identifier, Digest] = {}  # of what was signed, by approver
    admitted: bool = False


@dataclass
class Decisions:
    """What has been decided so far; `record` adds a decision."""

    home: Path
    now: datetime
    head: Head = EMPTY
    contributions: dict[str, Known] = field(default_factory=dict)  # by dirHash

    def record(self, event: str, **fields: int | str | Sequence[str]) -> None:
        """Write a decision down. When this returns it holds, whatever happens next."""
        self.head = ledger.append(self.home / LEDGER_FILE, event, self.now, **fields)
        self._follow(event, self.now, fields)

    def replay(self, entry: Entry) -> None:
        """Take in a decision that was written down before.

        Raises: RefusedError: `LEDGER_BROKEN`, for one that does not follow from those before it.
        """
        self.head = Head(entries=entry.n, head=entry.sha256)
        try:
            self._follow(entry.event, entry.at, entry.fields)
        except (KeyError, ValidationError) as error:
            raise RefusedError("LEDGER_BROKEN", f"in {LEDGER_FILE}, entry {entry.n} makes no sense") from error

    def _follow(self, event: str, at: datetime, fields: Mapping[str, Any]) -> None:
        """What a decision changes, for those that change what is known of a contribution."""
        if event == "received":
            self.contributions[fields["contribution"]] = Known.model_validate({**fields, "received_on": at})
        elif event == "approved":
            approvals = {**self.contributions[fields["contribution"]].approvals, fields["by"]: fields["approval"]}
            self._change(fields["contribution"], approvals=approvals)
        elif event == "admitted":
            self._change(fields["contribution"], admitted=True)

    def _change(self, digest: str, **changes: Any) -> None:
        self.contributions[digest] = self.contributions[digest].model_copy(update=changes)


@contextmanager
def deciding(home: Path, now: datetime) -> Iterator[Decisions]:
    """All decisions so far, to add to; one process at a time.

    What a crash left half written is set aside, and a line says so.

    Raises: RefusedError: `CLOCK_SET_BACK`, and all that `fedcompose.ledger.verify` raises. ConfigError:
        `STATE_INVALID`.
    """
    now = now.replace(microsecond=0)  # a ledger has no finer times
    with _locked(home):
        torn = ledger.repair(home / LEDGER_FILE)
        state = _read_state(home / STATE_FILE)
        entries = ledger.verify(home / LEDGER_FILE, held_heads(home))
        latest = _latest(state, entries, now)
        _check_clock(now, latest)
        decisions = _replayed(home, now, entries)
        try:
            if torn:
                decisions.record("repaired", torn=torn)
            yield decisions
        finally:
            _remember(home / STATE_FILE, max(now, latest), decisions.head, state)


def decided(home: Path) -> Mapping[str, Known]:
    """Every contribution that was received, by dirHash, to look at.

    Raises: as `deciding`, but for the clock.
    """
    with _locked(home):
        entries = ledger.verify(home / LEDGER_FILE, held_heads(home))
        return _replayed(home, datetime.min, entries).contributions


def held_heads(home: Path) -> dict[str, Head]:
    """The heads of the ledger that are known here: the last one written, and those that calls told the sites."""
    state = _read_state(home / STATE_FILE)
    heads = {STATE_FILE: state.ledger} if state else {}
    return heads | {f"every site, by call {call.id}": call.ledger for call in own_calls(home) if call.ledger}


def own_calls(home: Path) -> list[Call]:
    """The calls that were made here.

    Raises: RefusedError: as `read_own_call`.
    """
    return [read_own_call(read_limited(path, MAX_CALL_BYTES)) for path in sorted((home / "calls").glob("*.json"))]


def _replayed(home: Path, now: datetime, entries: Sequence[Entry]) -> Decisions:
    decisions = Decisions(home, now)
    for entry in entries:
        decisions.replay(entry)
    return decisions


def _latest(state: _State | None, entries: Sequence[Entry], now: datetime) -> datetime:
    """The latest time seen; of the ledger's own times only those count that `state.json` does not know yet."""
    known = [state.latest] if state else []
    return max([*known, *(entry.at for entry in entries[state.ledger.entries if state else 0 :])], default=now)


def _check_clock(now: datetime, latest: datetime) -> None:
    if now < latest - CLOCK_TOLERANCE:
        raise RefusedError(
            "CLOCK_SET_BACK",
            "this machine's clock is behind the time that it showed before",
            expected=f"{format_time(latest)} or later",
            got=format_time(now),
            fix=f"set the clock; only if it was wrong before and is right now, change `latest` in {STATE_FILE}",
        )


def _read_state(path: Path) -> _State | None:
    if not path.exists():
        return None
    try:
        return _State.model_validate(read_json(path))
    except (ValidationError, RefusedError) as error:
        raise ConfigError("STATE_INVALID", f"{path} cannot be read", fix="restore it from a backup") from error


def _remember(path: Path, latest: datetime, head: Head, before: _State | None) -> None:
    state = _State(schema="fedcompose/coordinator-state/v1", latest=latest, ledger=head)
    if state != before:
        write_json(path, state.model_dump(mode="json", by_alias=True))


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    home.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(home / ".decisions.lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
