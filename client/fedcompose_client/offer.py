"""What may leave a site: the files of the outbox that were signed for a call, by a closed list of names.

The digest of an offer is written down when its files are signed. What lies in the outbox is offered only while it still
has that digest, so nothing leaves that was put there, or changed, later.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from fedcompose.contribution import KINDS, REQUIRED, Kind
from fedcompose.errors import RefusedError
from fedcompose.files import new_folder
from fedcompose.parts import Part, Slice, offer_digest, part_limits, stream_bytes
from fedcompose_client.egress_ledger import note


def outbox_parts(outbox: Path, want: Sequence[Kind]) -> list[Part]:
    """The files of every wanted kind that has a signature; names outside the closed list never leave.

    Raises: RefusedError: `NOT_READY`.
    """
    kinds = [kind for kind in want if (outbox / kind / "model.sig").is_file()]
    required = {f"{kind}/{name}" for kind in kinds for name in REQUIRED[kind]}
    present = [name for name in part_limits(kinds) if os.path.lexists(outbox / name)]
    if not kinds or not required <= set(present):
        raise RefusedError("NOT_READY", "there is no whole signed contribution in the outbox")
    return [_part(outbox, name) for name in present]


def read_slice(outbox: Path, piece: Slice) -> bytes:
    """Bytes of one file of the outbox."""
    with _open_file(outbox / piece.part.name) as stream:
        stream.seek(piece.offset)
        return stream.read(piece.length)


def export(site: Path, domain: str, target: Path, now: datetime) -> Path:
    """A copy of what was signed, whole or not at all, and nothing else of the outbox; the egress ledger tells of it.

    Raises: RefusedError: `NOT_READY`, `OFFER_CHANGED`, `LEDGER_BROKEN`.
    """
    outbox = site / "outbox" / domain
    parts = outbox_parts(outbox, KINDS)
    offer = offer_digest(parts)
    note(site, "export", now, bytes=stream_bytes(parts), sha256=offer, offer=offer, domain=domain)
    with new_folder(target) as folder:
        for part in parts:
            copied = folder / part.name
            copied.parent.mkdir(exist_ok=True)
            with _open_file(outbox / part.name) as source, copied.open("wb") as stream:
                shutil.copyfileobj(source, stream)
                stream.flush()
                os.fsync(stream.fileno())
        if outbox_parts(outbox, KINDS) != parts:
            raise RefusedError(
                "OFFER_CHANGED", "the outbox changed while it was copied, and nothing was exported",
                fix="once nothing is signing, run it again",
            )  # fmt: skip
    return target


def _part(outbox: Path, name: str) -> Part:
    path = outbox / name
    with _open_file(path) as stream:
        found = os.fstat(stream.fileno())
    digest = _digest(path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return Part(name, found.st_size, digest)


@lru_cache(maxsize=64)
def _digest(path: Path, *_state: int) -> str:
    """SHA-256 of a file, computed once for each state of it: every window of a transfer asks again."""
    with _open_file(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _open_file(path: Path) -> io.BufferedReader:
    """A file of the outbox; never what a link in it points to."""
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
