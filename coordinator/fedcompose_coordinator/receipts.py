"""Receipts: what this coordinator has signed to have fetched, in `receipts/`; each site keeps the same of its own.

Each offer has one, written down before it is sent. What the site has not taken is sent again, in the same bytes, by
whichever process next follows or collects the call, until the time for collecting is over.

They are signed without a person, so they need a key without passphrase, one in another program, or a file that holds
the passphrase. Without it contributions are fetched all the same, and no site gets a receipt.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from fedcompose.delivery import MAX_RECEIPT_BYTES, Receipt, make_receipt, read_receipt
from fedcompose.errors import FedcomposeError
from fedcompose.federation import Federation
from fedcompose.files import MAX_JSON_BYTES, read_limited, write_atomic
from fedcompose.keys import PASSPHRASE_FILE_VARIABLE, load_signer, needs_passphrase
from fedcompose.ledger import Head
from fedcompose.parts import Part, offer_digest, stream_bytes
from fedcompose.trust_state import trusted_federation
from fedcompose_coordinator.config import load_config
from fedcompose_coordinator.jobs import Job

log = logging.getLogger(__name__)

FOLDER = "receipts"
TAKEN = "receipt"  # in what was seen of a job: the digest of the offer whose receipt the site has


def receipt_for(job: Job, parts: Sequence[Part], head: Head) -> bytes | None:
    """The one receipt for these files of a job, signed now unless it was before; None where that does not work."""
    path = _path(job, offer_digest(parts))
    try:
        return read_limited(path, MAX_RECEIPT_BYTES) if path.is_file() else _make(path, job, parts, head)
    except FedcomposeError as error:
        log.warning("no receipt was signed", extra={"site": job.site.id, "code": error.code})
        return None


def owed(job: Job, now: datetime) -> bytes | None:
    """The receipt that was signed for the job's offer, if the site can still take it and is not known to have it."""
    path = _path(job, job.offer)
    if job.seen.get(TAKEN) == job.offer or job.is_over(now) or not path.is_file():
        return None
    return read_limited(path, MAX_RECEIPT_BYTES)


def taken(job: Job, now: datetime) -> None:
    """Keep in mind that the site has the receipt for the job's offer; if that is forgotten, it is sent once more."""
    job.tell(now, **{TAKEN: job.offer})


def receipts(home: Path, federation: Federation) -> list[Receipt]:
    """The receipts that this coordinator has signed.

    Raises: RefusedError: as `read_receipt`.
    """
    paths = sorted((home / FOLDER).glob("*.json"))
    return [read_receipt(read_limited(path, MAX_RECEIPT_BYTES), federation) for path in paths]


def _path(job: Job, offer: str) -> Path:
    return job.home / FOLDER / f"{job.call.id}-{job.site.id}-{offer}.json"


def _make(path: Path, job: Job, parts: Sequence[Part], head: Head) -> bytes | None:
    home, now = job.home, datetime.now(UTC)
    config = load_config(home)
    given = os.environ.get(PASSPHRASE_FILE_VARIABLE)
    if not given and needs_passphrase(config.key, home):
        log.warning("no receipt was signed", extra={"site": job.site.id, "code": "PASSPHRASE_NEEDED"})
        return None
    signer = load_signer(config.key, Path(given) if given else None, folder=home)
    federation = trusted_federation(read_limited(home / config.federation, MAX_JSON_BYTES), None, now)
    envelope = make_receipt(
        federation, signer, now, site=job.site.id, call=job.call.id, offer=offer_digest(parts),
        bytes=stream_bytes(parts), ledger=head,
    )  # fmt: skip
    write_atomic(path, envelope)
    return envelope
