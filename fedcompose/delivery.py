"""The receipt: what of an offer a coordinator has received, and how far the site's egress ledger had come; signed.

Input: signed bytes and a trusted federation file. Output: a `Receipt` of one of its coordinators. The site keeps it: a
ledger whose end was cut off afterwards no longer holds the head that the receipt names. The coordinator keeps it too.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from fedcompose.document import Digest, Document, Time, first_problem, format_time
from fedcompose.errors import RefusedError
from fedcompose.federation import Federation, FederationId
from fedcompose.files import dump_json, parse_json
from fedcompose.keys import Identifier
from fedcompose.ledger import Head
from fedcompose.signing import Signer, sign_envelope, verify_envelope

DELIVERY_TYPE = "application/vnd.fedcompose.delivery.v1+json"
MAX_RECEIPT_BYTES = 16 * 1024


class Receipt(Document):
    """`bytes` of the offer with this digest have arrived; `ledger` is the site's own head that came along."""

    schema_: Literal["fedcompose/delivery/v1"] = Field(alias="schema")
    federation: FederationId
    coordinator: Identifier
    site: Identifier
    call: Identifier
    offer: Digest
    bytes: Annotated[int, Field(ge=0, lt=1 << 53)]
    ledger: Head
    issued: Time


def make_receipt(
    federation: Federation, signer: Signer, now: datetime, *, site: str, call: str, offer: str, bytes: int, ledger: Head
) -> bytes:
    """A signed receipt.

    Raises: RefusedError: `DELIVERY_INVALID`; when the federation does not know the signer as a coordinator.
    """
    coordinator, _ = federation.coordinator_key(signer.keyid, now)
    document = {
        "schema": "fedcompose/delivery/v1",
        "federation": federation.id,
        "coordinator": coordinator.id,
        "site": site,
        "call": call,
        "offer": offer,
        "bytes": bytes,
        "ledger": ledger.model_dump(),
        "issued": format_time(now),
    }
    payload = dump_json(document)
    _parse(payload)
    return sign_envelope(payload, DELIVERY_TYPE, [signer])


def read_receipt(envelope: bytes, federation: Federation) -> Receipt:
    """The receipt that a coordinator of this federation signed, with a key that counted then.

    Raises: RefusedError: `DELIVERY_INVALID`, an `ENVELOPE_*` code, or `KEY_EXPIRED` and `KEY_REVOKED`.
    """
    known = {key.keyid: key.public_key.encode() for each in federation.coordinators for key in each.keys}
    verified = verify_envelope(envelope, DELIVERY_TYPE, known)
    receipt = _parse(verified.payload)
    signers = {federation.coordinator_key(keyid, receipt.issued)[0].id for keyid in verified.keyids}
    if (receipt.federation, {receipt.coordinator}) != (federation.id, signers):
        raise RefusedError("DELIVERY_INVALID", "the receipt is of another federation or coordinator")
    return receipt


def _parse(payload: bytes) -> Receipt:
    try:
        return Receipt.model_validate(parse_json(payload, "the receipt", MAX_RECEIPT_BYTES))
    except ValidationError as error:
        raise RefusedError("DELIVERY_INVALID", "not a receipt of this version", got=first_problem(error)) from error
