"""The one place that hands bytes to the transport: a closed list of objects, each written down before it leaves.

    Description  Status  Code     small answers, read back as strictly as the coordinator will read them
    Announced                     the list of the files that were signed, and released, for a call
    Window                        bytes of these files

What is not of these kinds is refused. Files are named by the call for which they were released, never by a path; their
digests are compared with the released one before and after they are read. When the ledger cannot be written, nothing
leaves, not even a code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fedcompose import wire
from fedcompose.contribution import KINDS
from fedcompose.errors import RefusedError
from fedcompose.files import sha256_hex
from fedcompose.wire import Description, Part, RecordDict, Status
from fedcompose_client.egress_ledger import Kind, note
from fedcompose_client.jobs import read_job
from fedcompose_client.offer import outbox_parts, read_slice

# Every code that may leave; any other error leaves as SITE_ERROR.
REFUSALS = frozenset(
    {
        "ACTION_UNKNOWN", "BASE_NOT_FOUND", "CALL_BASE", "CALL_COORDINATOR", "CALL_EXPIRED", "CALL_FEDERATION",
        "CALL_ID_TAKEN", "CALL_INVALID", "CALL_POLICY", "CALL_SHAPE", "CALL_SITE", "CALL_UNKNOWN", "DOMAIN_UNKNOWN",
        "ENVELOPE_INVALID", "ENVELOPE_KEY", "ENVELOPE_SHAPE", "ENVELOPE_TYPE", "FEDERATION_EXPIRED", "KEY_EXPIRED",
        "KEY_REVOKED", "LEDGER_FORKED", "LEDGER_SHRUNK", "MESSAGE_INVALID", wire.NOT_READY, wire.OFFER_CHANGED,
        "DELIVERY_INVALID", "EGRESS_UNRECORDED", "TRUST_ROOT_UNKNOWN",
    }
)  # fmt: skip
SITE_ERROR = "SITE_ERROR"


@dataclass(frozen=True)
class Code:
    """That something was done, or the code of an error; never its text, for a text could quote data."""

    code: str


@dataclass(frozen=True)
class Announced:
    """The files released for a call."""

    call: str
    domain: str


@dataclass(frozen=True)
class Window:
    """Bytes `start` to `start + length` of the files that have this offer's digest."""

    call: str
    domain: str
    offer: str
    start: int
    length: int


Outgoing = Description | Status | Code | Announced | Window


def send(site: Path, outgoing: Outgoing, now: datetime) -> RecordDict:
    """The answer that carries this object. When this returns, the ledger says that it left.

    Raises: RefusedError: `EGRESS_TYPE` (no object of the list), `NOT_READY`, `OFFER_CHANGED`, `LEDGER_BROKEN`.
        MissingError: `DISK_FULL`.
    """
    if isinstance(outgoing, Description):
        content = wire.description_answer(outgoing)
        wire.read_description(content)
        return _small(site, "description", content, now)
    if isinstance(outgoing, Status):
        content = wire.status_answer(outgoing)
        wire.read_status(content)
        return _small(site, "status", content, now)
    if isinstance(outgoing, Code):
        known = outgoing.code in REFUSALS or outgoing.code == wire.ACCEPTED
        return _small(site, "code", wire.answer(outgoing.code if known else SITE_ERROR), now)
    if isinstance(outgoing, Announced):
        return _announce(site, outgoing, now)
    if isinstance(outgoing, Window):
        return _window(site, outgoing, now)
    raise RefusedError("EGRESS_TYPE", "this is no object that may leave a site")


def released_parts(site: Path, call_id: str, domain: str) -> list[Part]:
    """The files that were released for this call, if they still lie in the outbox as they were signed.

    Raises: RefusedError: `NOT_READY`.
    """
    job = read_job(site, call_id)
    if job.offer is None:
        raise RefusedError(wire.NOT_READY, f"the call is {job.state}")
    parts = outbox_parts(site / "outbox" / domain, job.call.want)
    if wire.offer_digest(parts) != job.offer:
        raise RefusedError(wire.NOT_READY, "what lies in the outbox is not what was signed for this call")
    return parts


def _small(site: Path, kind: Kind, content: RecordDict, now: datetime) -> RecordDict:
    written = _as_json(dict(content["answer"]))
    note(site, kind, now, bytes=len(written), sha256=sha256_hex(written))
    return content


def _announce(site: Path, outgoing: Announced, now: datetime) -> RecordDict:
    parts = released_parts(site, outgoing.call, outgoing.domain)
    content = wire.offer_answer(parts)
    wire.read_offer(content, KINDS)
    written = _as_json([asdict(part) for part in parts])
    digest = wire.offer_digest(parts)
    head = note(
        site, "offer", now, bytes=len(written), sha256=sha256_hex(written), call=outgoing.call, offer=digest,
        total=wire.stream_bytes(parts),
    )  # fmt: skip
    return wire.with_head(content, head)


def _window(site: Path, outgoing: Window, now: datetime) -> RecordDict:
    parts = released_parts(site, outgoing.call, outgoing.domain)
    if wire.offer_digest(parts) != outgoing.offer:
        raise RefusedError("OFFER_CHANGED", "another contribution has been signed for this call since")
    outbox = site / "outbox" / outgoing.domain
    slices = wire.plan(parts, outgoing.start, outgoing.length)
    pieces = {piece.part.name: read_slice(outbox, piece) for piece in slices}
    content = wire.window_answer(pieces)
    wire.read_window(content, parts, outgoing.start, outgoing.length)
    if released_parts(site, outgoing.call, outgoing.domain) != parts:
        raise RefusedError(wire.OFFER_CHANGED, "a file of the outbox changed while it was read")
    digest = hashlib.sha256()
    for data in pieces.values():
        digest.update(data)
    head = note(
        site, "window", now, bytes=sum(map(len, pieces.values())), sha256=digest.hexdigest(), call=outgoing.call,
        offer=outgoing.offer, start=outgoing.start,
    )  # fmt: skip
    return wire.with_head(content, head)


def _as_json(value: Mapping[str, Any] | list[Any]) -> bytes:
    """One form of a small object, to have a size and a digest."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
