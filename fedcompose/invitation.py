"""The invitation: where a coordinator listens, and which certificate authority vouches for that listener; signed.

Input: signed bytes and a trusted federation file. Output: an `Invitation` of one of its coordinators. It makes TLS
trust follow from the federation file, so that nobody has to be believed about a certificate. It is no secret and gives
no right: which sites may connect, the federation file says.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from cryptography import x509
from pydantic import AfterValidator, Field, ValidationError

from fedcompose.document import Document, Time, first_problem, format_time
from fedcompose.errors import RefusedError
from fedcompose.federation import Federation, FederationId
from fedcompose.files import dump_json, parse_json
from fedcompose.keys import Identifier
from fedcompose.signing import Signer, read_envelope_unverified, sign_envelope, verify_envelope

INVITATION_TYPE = "application/vnd.fedcompose.invitation.v1+json"
INVITATION_FILE = "invitation.json"
MAX_INVITATION_BYTES = 64 * 1024
MAX_CERTIFICATE_CHARS = 16 * 1024  # one certificate of an authority is below 2 kB


def _port_in_range(address: str) -> str:
    if not 1 <= int(address.rpartition(":")[2]) <= 65535:
        raise ValueError("a port is a number from 1 to 65535")
    return address


def _one_certificate(pem: str) -> str:
    if len(x509.load_pem_x509_certificates(pem.encode())) != 1:
        raise ValueError("one certificate is expected")
    return pem


Address = Annotated[
    str,
    Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9.-]{0,252}|\[[0-9a-fA-F:]{2,39}\]):[0-9]{1,5}\z"),
    AfterValidator(_port_in_range),
]
Certificate = Annotated[str, Field(max_length=MAX_CERTIFICATE_CHARS), AfterValidator(_one_certificate)]


class Invitation(Document):
    """Where to connect (`host:port`), and the certificate of the authority that must have signed what answers there."""

    schema_: Literal["fedcompose/invitation/v1"] = Field(alias="schema")
    federation: FederationId
    coordinator: Identifier
    issued: Time
    address: Address
    ca_certificate: Certificate

    @property
    def ca_pem(self) -> bytes:
        return self.ca_certificate.encode()


def make_invitation(federation: Federation, signer: Signer, address: str, ca_pem: bytes, now: datetime) -> bytes:
    """A signed invitation to all sites of the federation.

    Raises: RefusedError: `INVITATION_INVALID`; when the federation does not know the signer as a coordinator.
    """
    coordinator, _ = federation.coordinator_key(signer.keyid, now)
    document = {
        "schema": "fedcompose/invitation/v1",
        "federation": federation.id,
        "coordinator": coordinator.id,
        "issued": format_time(now),
        "address": address,
        "ca_certificate": ca_pem.decode(),
    }
    payload = dump_json(document)
    _parse(payload)
    return sign_envelope(payload, INVITATION_TYPE, [signer])


def read_invitation(envelope: bytes, federation: Federation, now: datetime) -> Invitation:
    """The invitation that a coordinator of this federation signed.

    Raises: RefusedError: `INVITATION_INVALID`, `INVITATION_FEDERATION`, `INVITATION_COORDINATOR`, an `ENVELOPE_*` code,
        or `KEY_EXPIRED` and `KEY_REVOKED` for a coordinator's key that no longer counts.
    """
    known = {key.keyid: key.public_key.encode() for each in federation.coordinators for key in each.keys}
    verified = verify_envelope(envelope, INVITATION_TYPE, known)
    signers = {federation.coordinator_key(keyid, now)[0].id for keyid in verified.keyids}
    invitation = _parse(verified.payload)
    if invitation.federation != federation.id:
        raise RefusedError(
            "INVITATION_FEDERATION",
            "the invitation is to another federation",
            expected=federation.id,
            got=invitation.federation,
        )
    if signers != {invitation.coordinator}:
        raise RefusedError(
            "INVITATION_COORDINATOR",
            "the invitation names another coordinator than its signer",
            expected=", ".join(sorted(signers)),
            got=invitation.coordinator,
        )
    return invitation


def check_newer(invitation: Invitation, kept: bytes) -> None:
    """Refuse to go back behind the invitation that was kept: what an old certificate vouched for may be stolen.

    Raises: RefusedError: `INVITATION_OLD`.
    """
    before = _parse(read_envelope_unverified(kept, INVITATION_TYPE))
    same = (before.federation, before.coordinator) == (invitation.federation, invitation.coordinator)
    if same and invitation.issued < before.issued:
        raise RefusedError(
            "INVITATION_OLD",
            "the coordinator has sent a newer invitation, which is in use here",
            expected=f"one of {format_time(before.issued)} or later",
            got=format_time(invitation.issued),
            fix="use the newest one, or ask the coordinator for another: fedcompose coordinator invite",
        )


def _parse(payload: bytes) -> Invitation:
    try:
        return Invitation.model_validate(parse_json(payload, "the invitation", MAX_INVITATION_BYTES))
    except ValidationError as error:
        raise RefusedError(
            "INVITATION_INVALID", "not an invitation of this version", got=first_problem(error)
        ) from error
