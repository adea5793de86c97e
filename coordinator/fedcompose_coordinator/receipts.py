"""Receipts: what this coordinator has signed to have fetched, in `receipts/`; each site keeps the same of its own.

They are signed without a person, so they need a key without passphrase, one in another program, or a file that holds
the passphrase. Without it contributions are fetched all the same, and no site gets a receipt.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from fedcompose.delivery import MAX_RECEIPT_BYTES, Receipt, make_receipt, read_receipt
from fedcompose.errors import FedcomposeError
from fedcompose.federation import Federation
from fedcompose.files import MAX_JSON_BYTES, read_limited, write_atomic
from fedcompose.keys import PASSPHRASE_FILE_VARIABLE, load_signer, needs_passphrase
from fedcompose.ledger import Head
from fedcompose.trust_state import trusted_federation
from fedcompose_coordinator.config import load_config
from fedcompose_coordinator.jobs import Job

log = logging.getLogger(__name__)

FOLDER = "receipts"


def receipt_maker(home: Path) -> Callable[[Job, int, Head], bytes | None]:
    """What signs a receipt for so many bytes of a job's offer, and keeps a copy; None where that does not work."""

    def make(job: Job, size: int, head: Head) -> bytes | None:
        try:
            return _make(home, job, size, head)
        except FedcomposeError as error:
            log.warning("no receipt was signed", extra={"site": job.site.id, "code": error.code})
            return None

    return make


def receipts(home: Path, federation: Federation) -> list[Receipt]:
    """The receipts that this coordinator has signed.

    Raises: RefusedError: as `read_receipt`.
    """
    paths = sorted((home / FOLDER).glob("*.json"))
    return [read_receipt(read_limited(path, MAX_RECEIPT_BYTES), federation) for path in paths]


def _make(home: Path, job: Job, size: int, head: Head) -> bytes | None:
    config, now = load_config(home), datetime.now(UTC)
    given = os.environ.get(PASSPHRASE_FILE_VARIABLE)
    if not given and needs_passphrase(config.key, home):
        log.warning("no receipt was signed", extra={"site": job.site.id, "code": "PASSPHRASE_NEEDED"})
        return None
    signer = load_signer(config.key, Path(given) if given else None, folder=home)
    federation = trusted_federation(read_limited(home / config.federation, MAX_JSON_BYTES), None, now)
    envelope = make_receipt(
        federation, signer, now, site=job.site.id, call=job.call.id, offer=job.offer, bytes=size, ledger=head
    )
    write_atomic(home / FOLDER / f"{job.call.id}-{job.site.id}.json", envelope)
    return envelope
