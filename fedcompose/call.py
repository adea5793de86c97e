"""The call: what a coordinator asks of which sites, on which base, until when; signed, for a site to check.

Input: signed bytes and a trusted federation file. Output: a `Call` whose every field was checked. A call
gives nobody a right that the federation file does not give. Its nonce, known only to those it was sent to, is
repeated in what a site contributes, which binds the contribution to this call, and in the requests by which
it is fetched.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedcompose.contribution import Kind
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.federation import BaseModelEntry, Digest, Federation, FederationId, Time, format_time
from fedcompose.files import dump_json, parse_json
from fedcompose.keys import Identifier
from fedcompose.signing import Signer, read_envelope_unverified, sign_envelope, verify_envelope

CALL_TYPE = "application/vnd.fedcompose.call.v1+json"
MAX_CALL_BYTES = 256 * 1024
MAX_CALLED_SITES = 1000
COLLECTION_PERIOD = timedelta(days=30)  # contributions made in time may be fetched for this long after the deadline


class CalledSite(BaseModel):
    """A site that is asked to contribute, and the domain in which it is."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: Identifier
    domain: Identifier


class Call(BaseModel):
    """One request for contributions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_: Literal["fedcompose/call/v1"] = Field(alias="schema")
    federation: FederationId
    id: Identifier
    nonce: Digest  # 32 random bytes in hex
    deadline: Time
    base: BaseModelEntry
    sites: Annotated[tuple[CalledSite, ...], Field(strict=False, min_length=1, max_length=MAX_CALLED_SITES)]
    want: Annotated[tuple[Kind, ...], Field(strict=False, min_length=1, max_length=2)]

    @model_validator(mode="after")
    def _each_once(self) -> Call:
        if len({site.id for site in self.sites}) != len(self.sites) or len(set(self.want)) != len(self.want):
            raise ValueError("a site or a kind is named twice")
        return self

    def domain_of(self, site: str) -> str:
        """The domain in which this site is asked.

        Raises: RefusedError: `CALL_SITE`.
        """
        for called in self.sites:
            if called.id == site:
                return called.domain
        raise RefusedError("CALL_SITE", f"the call {self.id} is not addressed to site {site!a}")


def make_call(
    federation: Federation,
    signer: Signer,
    base: str,
    want: Sequence[Kind],
    *,
    deadline: datetime,
    now: datetime,
    nonce: bytes,
) -> bytes:
    """A signed call to every active site that may contribute something of what is wanted.

    Its id begins with the time, so that the ids of one coordinator sort by age. `nonce`: 32 random bytes.

    Raises: ConfigError: `CALL_INPUT` (no such base in the federation, no such site, a deadline in the past).
        RefusedError: when the federation does not know the signer as a coordinator.
    """
    federation.coordinator_key(signer.keyid, now)
    sites = [site for site in federation.sites if site.status == "active" and set(site.may) & set(want)]
    document = {
        "schema": "fedcompose/call/v1",
        "federation": federation.id,
        "id": f"{now:%Y%m%dt%H%M%Sz}-{nonce[:4].hex()}",
        "nonce": nonce.hex(),
        "deadline": format_time(deadline),
        "base": _base_entry(federation, base).model_dump(by_alias=True),
        "sites": [{"id": site.id, "domain": site.domain} for site in sites],
        "want": list(want),
    }
    payload = dump_json(document)
    try:
        check_call(parse_call(payload), federation, now)
    except RefusedError as error:
        raise ConfigError("CALL_INPUT", "no site could accept this call", got=error.what) from error
    return sign_envelope(payload, CALL_TYPE, [signer])


def verify_call(
    envelope: bytes, federation: Federation, site: str, now: datetime, *, grace: timedelta = timedelta(0)
) -> Call:
    """The call that a coordinator of this federation signed and addressed to `site`.

    It is open until `grace` after its deadline.

    Raises: RefusedError: `CALL_INVALID`, `CALL_FEDERATION`, `CALL_EXPIRED`, `CALL_BASE`, `CALL_SITE`, an `ENVELOPE_*`
        code, or `KEY_EXPIRED` and `KEY_REVOKED` for a coordinator's key that no longer counts.
    """
    known = {key.keyid: key.public_key.encode() for each in federation.coordinators for key in each.keys}
    verified = verify_envelope(envelope, CALL_TYPE, known)
    for keyid in verified.keyids:
        federation.coordinator_key(keyid, now)
    call = parse_call(verified.payload)
    check_call(call, federation, now - grace)
    if call.domain_of(site) != federation.site(site).domain:
        raise RefusedError("CALL_SITE", "the call names another domain for this site than the federation file does")
    return call


def read_own_call(envelope: bytes) -> Call:
    """A call from this machine's own folder, its signature not checked again.

    Raises: RefusedError: `CALL_INVALID` or an `ENVELOPE_*` code.
    """
    return parse_call(read_envelope_unverified(envelope, CALL_TYPE))


def parse_call(payload: bytes) -> Call:
    try:
        return Call.model_validate(parse_json(payload, "the call"))
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise RefusedError("CALL_INVALID", "not a call of this version", got=reason) from error


def check_call(call: Call, federation: Federation, now: datetime) -> None:
    """What holds for a call at any site: this federation, one of its bases, in time."""
    if call.federation != federation.id:
        raise RefusedError(
            "CALL_FEDERATION",
            "the call is for another federation",
            expected=federation.id,
            got=call.federation,
        )
    if now >= call.deadline:
        raise RefusedError("CALL_EXPIRED", f"the call {call.id} ended at {format_time(call.deadline)}")
    if call.base not in federation.base_models:
        raise RefusedError("CALL_BASE", f"the federation does not build on {call.base.name!a} with this digest")


def _base_entry(federation: Federation, name: str) -> BaseModelEntry:
    for base in federation.base_models:
        if base.name == name:
            return base
    raise ConfigError(
        "CALL_INPUT",
        f"the federation has no base {name!a}",
        expected=", ".join(base.name for base in federation.base_models) or "a base in the federation file",
    )
