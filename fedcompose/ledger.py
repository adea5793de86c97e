"""A ledger: a file of JSON lines that only grows, each line naming the line before it by SHA-256.

    {"at":"2026-11-20T09:00:00Z","event":"admitted","n":7,"previous":"<sha256 of line 6>", …}

A line is written in one canonical form and hashed with its line break, so `tail -n 1 ledger.jsonl | sha256sum`
prints the head. Whoever changes, removes, inserts or swaps lines breaks the chain at that place. Whoever cuts the
end off, or writes everything anew from some line on, leaves a chain that agrees with itself: only the heads that
somebody else has kept can tell. So heads are worth handing out, and `verify` takes those that were.

Values are numbers, and texts of a narrow alphabet: no sentence fits, so nothing a stranger wrote can stand here.
What the events mean is for the caller to know.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field

from fedcompose.document import Digest, format_time, parse_time
from fedcompose.errors import RefusedError
from fedcompose.files import disk_errors, parse_json, sha256_hex, write_atomic

MAX_LINE_BYTES = 64 << 10  # an event that names 512 contributions takes 35 kB
KNOWN_LINES = 1 << 13  # some 10 MB; every decision reads the whole ledger, of which all but the last line is known
TORN = ".torn"  # ending of the file that keeps what was cut off while it was written

_OWN = frozenset({"at", "event", "n", "previous"})
_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_TEXT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/+-]{0,127}", re.ASCII)


class Head(BaseModel):
    """How many entries a ledger has, and the SHA-256 of the last one's line: it stands for all of them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    entries: Annotated[int, Field(ge=0, lt=1 << 53)]
    head: Digest


EMPTY = Head(entries=0, head=sha256_hex(b""))


@dataclass(frozen=True)
class Entry:
    """One line: its number from 1 on, when and what, the event's own fields, and the line's SHA-256."""

    n: int
    at: datetime
    event: str
    fields: Mapping[str, Any]
    previous: str
    sha256: str


def append(path: Path, event: str, at: datetime, **fields: int | str | Sequence[str]) -> Head:
    """Add one entry, on disk when this returns; several processes may do so at once.

    Raises: ValueError: for a name or a value that has no place in a ledger, or a line that is too long.
        RefusedError: `LEDGER_BROKEN` when the file does not end in an entry.
    """
    with _opened(path) as descriptor:
        last = _last_entry(descriptor)
        document = {"at": format_time(at), "event": event, "n": last.entries + 1, "previous": last.head}
        line = _line(fields | document)
        if fields.keys() & document.keys() or not _is_entry(fields | document) or len(line) > MAX_LINE_BYTES:
            raise ValueError(f"the event {event!a} does not fit into a ledger")
        with disk_errors(path):
            _write(descriptor, line)
    return Head(entries=last.entries + 1, head=sha256_hex(line))


def head(path: Path) -> Head:
    """The head of a ledger whose last line is whole; the chain before it is not looked at.

    Raises: RefusedError: `LEDGER_BROKEN`.
    """
    if not path.exists():
        return EMPTY
    with _opened(path) as descriptor:
        return _last_entry(descriptor)


def verify(path: Path, held: Mapping[str, Head] | None = None) -> list[Entry]:
    """All entries of a ledger whose chain holds, and which contains every head in `held`, by who holds it.

    An absent file is an empty ledger. The error names the first bad entry.

    Raises: RefusedError: `LEDGER_BROKEN` (an entry was changed, removed, inserted or moved, or the last one is cut
        off), `LEDGER_TRUNCATED` (entries are missing at the end), `LEDGER_FORKED` (someone was shown another entry).
    """
    entries = _chain(path.name, list(_read_lines(path)))
    _check_held(path.name, entries, held or {})
    return entries


def repair(path: Path) -> str | None:
    """Move a last line that is not whole, as a crash leaves it, into a file beside; the SHA-256 of what was moved.

    Such a line was never reported as written, so nobody holds its head. Call it before `append`, as whoever may.
    """
    if not path.exists():
        return None
    with _opened(path) as descriptor:
        tail = _tail(descriptor)
        torn = tail[tail.rfind(b"\n") + 1 :]
        if not torn:
            return None
        write_atomic(path.with_name(path.name + TORN), torn, 0o600)
        os.ftruncate(descriptor, os.fstat(descriptor).st_size - len(torn))
        os.fsync(descriptor)
    return sha256_hex(torn)


# --- lines ----------------------------------------------------------------------------------------


def _line(document: Mapping[str, Any]) -> bytes:
    """The one canonical form of an entry."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _is_entry(document: Any) -> bool:
    """Whether this has an entry's fields, and nothing but numbers and plain texts in the others."""
    return (
        isinstance(document, dict)
        and document.keys() >= _OWN
        and all(_NAME.fullmatch(name) and _is_value(value) for name, value in document.items())
        and isinstance(document["event"], str)
        and _NAME.fullmatch(document["event"]) is not None
        and isinstance(document["previous"], str)
        and _is_count(document["n"])
        and _is_time(document["at"])
    )


def _is_value(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(each, str) and _TEXT.fullmatch(each) for each in value)
    return _is_count(value) or (isinstance(value, str) and _TEXT.fullmatch(value) is not None)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _is_time(value: Any) -> bool:
    try:
        return isinstance(value, str) and parse_time(value) is not None
    except ValueError:
        return False


@lru_cache(maxsize=KNOWN_LINES)
def _parse(line: bytes) -> Entry | None:
    """The entry in a line, if it is one in canonical form."""
    try:
        document = parse_json(line, "a ledger's line")
    except RefusedError:
        return None
    if not _is_entry(document) or _line(document) != line:
        return None
    fields = {name: value for name, value in document.items() if name not in _OWN}
    at = parse_time(document["at"])
    return Entry(document["n"], at, document["event"], fields, document["previous"], sha256_hex(line))


# --- the chain ------------------------------------------------------------------------------------


def _chain(name: str, lines: Sequence[bytes]) -> list[Entry]:
    """Every line as an entry that continues the one before it."""
    entries: list[Entry] = []
    for n, line in enumerate(lines, start=1):
        entry = _parse(line)
        if n == len(lines) and not line.endswith(b"\n"):
            _broken(name, f"{n}", "is cut off", fix="the next command that writes to it sets this line aside")
        if entry is None:
            _broken(name, f"{n}", "is not an entry in the form that this program writes")
        if entry.n != n:
            _broken(name, f"{n}", f"is missing, or not in its place: number {entry.n} stands there")
        if entry.previous != (entries[-1].sha256 if entries else EMPTY.head):
            _broken(name, _first_changed(n, entry, lines), "was changed after it was written")
        entries.append(entry)
    return entries


def _first_changed(n: int, entry: Entry, lines: Sequence[bytes]) -> str:
    """Which of two neighbours that do not fit was changed; `n` has not been if the entry after it fits it."""
    if n == 1:
        return "1"
    if n == len(lines):
        return f"{n - 1}, or {n} after it,"
    following = _parse(lines[n])
    return f"{n - 1}" if following is not None and following.previous == entry.sha256 else f"{n}"


def _broken(name: str, n: str, what: str, fix: str = "") -> NoReturn:
    raise RefusedError(
        "LEDGER_BROKEN",
        f"in {name}, entry {n} {what}",
        fix=fix or "restore the ledger from a backup; until then trust nothing that follows the entry before",
    )


def _check_held(name: str, entries: Sequence[Entry], held: Mapping[str, Head]) -> None:
    """Every head that somebody holds is that of an entry here, judged in the order of the entries."""
    agreed = 0
    for holder, known in sorted(held.items(), key=lambda item: item[1].entries):
        if known.entries > len(entries):
            raise RefusedError(
                "LEDGER_TRUNCATED",
                f"in {name}, entry {len(entries) + 1} is missing, and all that followed",
                expected=f"{known.entries} entries, as {holder} has seen",
                got=f"{len(entries)}",
                fix="restore the ledger from a backup, and find out who removed its end",
            )
        found = entries[known.entries - 1].sha256 if known.entries else EMPTY.head
        if found != known.head:
            raise RefusedError(
                "LEDGER_FORKED",
                f"in {name}, entry {agreed + 1} or one after it, up to {known.entries}, was written anew",
                expected=f"entry {known.entries} with SHA-256 {known.head}, as {holder} has seen",
                got=found,
                fix="restore the ledger from a backup, and find out who wrote another one",
            )
        agreed = known.entries


# --- the file -------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The ledger, to be read and appended to by one process at a time."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, flags, 0o600)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise RefusedError("FILE_NOT_REGULAR", f"{path.name!a} is a symbolic link") from error
            raise
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _write(descriptor: int, line: bytes) -> None:
    """All of the line, or nothing when the disk is full."""
    size = os.fstat(descriptor).st_size
    try:
        while line:
            line = line[os.write(descriptor, line) :]
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def _tail(descriptor: int) -> bytes:
    """The end of the file, long enough for the last line and what may follow it unfinished."""
    size = os.fstat(descriptor).st_size
    wanted = min(size, 2 * MAX_LINE_BYTES)
    return os.pread(descriptor, wanted, size - wanted)


def _last_entry(descriptor: int) -> Head:
    tail = _tail(descriptor)
    if not tail:
        return EMPTY
    line = tail[tail.rfind(b"\n", 0, -1) + 1 :]
    entry = _parse(line)
    if entry is None:
        raise RefusedError("LEDGER_BROKEN", "the ledger does not end in an entry", fix="restore it from a backup")
    return Head(entries=entry.n, head=entry.sha256)


def _read_lines(path: Path) -> Iterator[bytes]:
    """Line by line; one that is too long comes in pieces, none of which is an entry."""
    if not path.exists():
        return
    with path.open("rb") as stream:
        while line := stream.readline(MAX_LINE_BYTES):
            yield line
