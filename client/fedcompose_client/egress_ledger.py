"""The ledger of everything that left this site, `egress.jsonl`, and the coordinator's receipts for it, `receipts/`.

A line is on disk before its object is handed on, so whenever a process ends the ledger never says less than was sent;
it may say more, if the sending then failed. Lines hold digests, sizes and names from closed lists, no content:

    description  status  code     the answers to the coordinator, as JSON; codes stand for errors
    offer                         names, sizes and digests of the files that were signed for a call
    window                        bytes `start` to `start + bytes` of these files, as one stream
    export                        all of these files, copied into a folder, to be carried by hand

A chain cannot show that its end was cut off. So every offer and window tells the coordinator the ledger's head, and
the coordinator signs a receipt for what has arrived and for that head: a ledger that was shortened no longer holds it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, get_args

from fedcompose import ledger
from fedcompose.delivery import MAX_RECEIPT_BYTES, Receipt, read_receipt
from fedcompose.errors import RefusedError
from fedcompose.federation import Federation
from fedcompose.files import read_limited, write_atomic
from fedcompose.ledger import Entry, Head

LEDGER_FILE = "egress.jsonl"
Kind = Literal["description", "status", "code", "offer", "window", "export"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Departures:
    """What has left, after the chain was checked: lines, receipts, and how much of what kind."""

    entries: Sequence[Entry]
    receipts: Sequence[Receipt]

    @property
    def head(self) -> Head:
        return Head(entries=self.entries[-1].n, head=self.entries[-1].sha256) if self.entries else ledger.EMPTY

    @property
    def totals(self) -> Mapping[str, tuple[int, int]]:
        """Objects and bytes, by kind."""
        count, size = Counter[str](), Counter[str]()
        for entry in self.entries:
            count[entry.event] += 1
            size[entry.event] += int(entry.fields["bytes"])
        return {kind: (count[kind], size[kind]) for kind in KINDS if count[kind]}


def note(site: Path, kind: Kind, now: datetime, *, bytes: int, sha256: str, **fields: int | str) -> Head:
    """Write down that an object is about to leave; on disk when this returns.

    Raises: RefusedError: `LEDGER_BROKEN`. MissingError: `DISK_FULL`.
    """
    path = site / LEDGER_FILE
    ledger.repair(path)
    return ledger.append(path, kind, now, bytes=bytes, sha256=sha256, **fields)


def departures(site: Path, federation: Federation | None) -> Departures:
    """What has left, held against the receipts that are kept here; without a federation they are not looked at.

    Raises: RefusedError: `LEDGER_BROKEN`, `LEDGER_TRUNCATED`, `LEDGER_FORKED`, `EGRESS_UNRECORDED` (a coordinator
        received bytes that no line tells of), and what `read_receipt` raises for a receipt that was changed.
    """
    ledger.repair(site / LEDGER_FILE)
    receipts = [] if federation is None else kept_receipts(site, federation)
    held = {f"coordinator {each.coordinator}, by its receipt for call {each.call}": each.ledger for each in receipts}
    entries = ledger.verify(site / LEDGER_FILE, held)
    for entry in entries:
        if entry.event not in KINDS or not {"bytes", "sha256"} <= entry.fields.keys():
            raise RefusedError("LEDGER_BROKEN", f"in {LEDGER_FILE}, entry {entry.n} makes no sense")
    for receipt in receipts:
        _check_covered(entries, receipt)
    return Departures(entries, receipts)


def keep_receipt(site: Path, envelope: bytes, receipt: Receipt) -> None:
    """Keep the coordinator's receipt for the whole of an offer that left here, if it speaks of this ledger as it is.

    It may come late, and again; an offer's first receipt stays.

    Raises: RefusedError: `DELIVERY_INVALID`, and what `departures` raises.
    """
    entries = ledger.verify(site / LEDGER_FILE)
    known = receipt.ledger.entries
    is_head = 0 < known <= len(entries) and entries[known - 1].sha256 == receipt.ledger.head
    if not is_head or not _was_announced(entries, receipt):
        raise RefusedError("DELIVERY_INVALID", "the receipt is for something else than what left here")
    _check_covered(entries, receipt)
    path = site / "receipts" / f"{receipt.call}-{receipt.offer[:16]}.json"
    if path.exists() and read_limited(path, MAX_RECEIPT_BYTES) != envelope:
        raise RefusedError("DELIVERY_INVALID", f"another receipt for this offer is kept already, in {path.name}")
    write_atomic(path, envelope)


def kept_receipts(site: Path, federation: Federation) -> list[Receipt]:
    """Every receipt that is kept here, its signature checked again."""
    paths = sorted((site / "receipts").glob("*.json"))
    return [read_receipt(read_limited(path, MAX_RECEIPT_BYTES), federation) for path in paths]


def _was_announced(entries: Iterable[Entry], receipt: Receipt) -> bool:
    """Whether this many bytes were offered, under this digest and for this call."""
    offer = {"call": receipt.call, "offer": receipt.offer, "total": receipt.bytes}
    return any(entry.event == "offer" and offer.items() <= entry.fields.items() for entry in entries)


def _check_covered(entries: Iterable[Entry], receipt: Receipt) -> None:
    """Every byte that the coordinator says it has of an offer is in a line of this ledger.

    Raises: RefusedError: `EGRESS_UNRECORDED`.
    """
    sent = sorted(
        (int(entry.fields["start"]), int(entry.fields["start"]) + int(entry.fields["bytes"]))
        for entry in entries
        if entry.event == "window" and (entry.fields["offer"], entry.fields["call"]) == (receipt.offer, receipt.call)
    )
    covered = 0
    for start, end in sent:
        if start <= covered:
            covered = max(covered, end)
    if covered < receipt.bytes:
        raise RefusedError(
            "EGRESS_UNRECORDED",
            f"the coordinator has bytes of call {receipt.call} that {LEDGER_FILE} does not tell of",
            expected=f"{receipt.bytes} bytes, as the receipt says",
            got=f"{covered}",
            fix="find out what else sends from this machine",
        )
