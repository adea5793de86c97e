"""The call: what a coordinator asks of which sites, on which base, until when; signed, for a site to check.

Input: signed bytes and a trusted federation file. Output: a `Call` whose every field was checked. A call
gives nobody a right that the federation file does not give. Its nonce, known only to those it was sent to, and
its digest are repeated in what a site contributes, which binds the contribution to this call and all that it
says; the nonce also stands in the requests by which a contribution is fetched.

A call carries the head of the coordinator's ledger. Sites keep the calls they accept, so a coordinator that
shortens its ledger or writes another one is found out by the next call (`check_history`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedcompose.adapter import CONFIG_FILE, MAX_RANK, MAX_TARGETS, ModuleName, parse_config
from fedcompose.contribution import Kind, VerifiedContribution
from fedcompose.document import Digest, Time, format_time
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.federation import BaseModelEntry, Federation, FederationId
from fedcompose.files import dump_json, parse_json, sha256_hex
from fedcompose.keys import Identifier
from fedcompose.ledger import EMPTY, Head
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


class WantedLora(BaseModel):
    """The LoRAs that will do: of at most this rank, on no other modules than these."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    rank: Annotated[int, Field(ge=1, le=MAX_RANK)] = 64
    targets: Annotated[tuple[ModuleName, ...], Field(strict=False, min_length=1, max_length=MAX_TARGETS)] = (
        "gate_proj",
        "up_proj",
        "down_proj",
    )


class Call(BaseModel):
    """One request for contributions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_: Literal["fedcompose/call/v1"] = Field(alias="schema")
    federation: FederationId
    coordinator: Identifier
    id: Identifier
    nonce: Digest  # 32 random bytes in hex
    issued: Time
    deadline: Time
    base: BaseModelEntry
    lora: WantedLora
    sites: Annotated[tuple[CalledSite, ...], Field(strict=False, min_length=1, max_length=MAX_CALLED_SITES)]
    want: Annotated[tuple[Kind, ...], Field(strict=False, min_length=1, max_length=2)]
    policy: Digest | None = None  # of the federation's rules, where it has any
    ledger: Head | None = None  # of the coordinator's ledger, before this call

    @model_validator(mode="after")
    def _each_once(self) -> Call:
        if len({site.id for site in self.sites}) != len(self.sites) or len(set(self.want)) != len(self.want):
            raise ValueError("a site or a kind is named twice")
        return self

    @property
    def payload(self) -> bytes:
        """The one form in which this call is signed."""
        return dump_json(self.model_dump(mode="json", by_alias=True, exclude_none=True))

    @property
    def digest(self) -> str:
        """SHA-256 of what was signed: it stands for everything that the call says."""
        return sha256_hex(self.payload)

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
    lora: WantedLora | None = None,
    ledger: Head | None = None,
) -> bytes:
    """A signed call to every active site that may contribute something of what is wanted.

    Its id begins with the time, so that the ids of one coordinator sort by age. `nonce`: 32 random bytes.

    Raises: ConfigError: `CALL_INPUT` (no such base in the federation, no such site, a deadline in the past).
        RefusedError: when the federation does not know the signer as a coordinator.
    """
    coordinator, _ = federation.coordinator_key(signer.keyid, now)
    sites = [site for site in federation.sites if site.status == "active" and set(site.may) & set(want)]
    document = {
        "schema": "fedcompose/call/v1",
        "federation": federation.id,
        "coordinator": coordinator.id,
        "id": f"{now:%Y%m%dt%H%M%Sz}-{nonce[:4].hex()}",
        "nonce": nonce.hex(),
        "issued": format_time(now),
        "deadline": format_time(deadline),
        "base": _base_entry(federation, base).model_dump(by_alias=True),
        "lora": (lora or WantedLora()).model_dump(mode="json"),
        "sites": [{"id": site.id, "domain": site.domain} for site in sites],
        "want": list(want),
        "policy": _policy(federation),
        "ledger": ledger and ledger.model_dump(),
    }
    payload = dump_json({name: value for name, value in document.items() if value is not None})
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

    Raises: RefusedError: `CALL_INVALID`, `CALL_FEDERATION`, `CALL_COORDINATOR`, `CALL_EXPIRED`, `CALL_BASE`,
        `CALL_POLICY`, `CALL_SITE`, an `ENVELOPE_*` code, or `KEY_EXPIRED` and `KEY_REVOKED` for a coordinator's key
        that no longer counts.
    """
    known = {key.keyid: key.public_key.encode() for each in federation.coordinators for key in each.keys}
    verified = verify_envelope(envelope, CALL_TYPE, known)
    signers = {federation.coordinator_key(keyid, now)[0].id for keyid in verified.keyids}
    call = parse_call(verified.payload)
    check_call(call, federation, now - grace)
    if signers != {call.coordinator}:
        raise RefusedError(
            "CALL_COORDINATOR",
            "the call names another coordinator than its signer",
            expected=", ".join(sorted(signers)),
            got=call.coordinator,
        )
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
        call = Call.model_validate(parse_json(payload, "the call"))
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise RefusedError("CALL_INVALID", "not a call of this version", got=reason) from error
    if call.payload != payload:
        raise RefusedError("CALL_INVALID", "the call is not written in the one form that calls have")
    return call


def check_call(call: Call, federation: Federation, now: datetime) -> None:
    """What holds for a call at any site: this federation, one of its bases, its policy, in time."""
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
    if call.policy != _policy(federation):
        raise RefusedError(
            "CALL_POLICY",
            "the call was made under another data-use policy than that of the federation file here",
            expected=_policy(federation) or "no policy",
            got=call.policy or "no policy",
            fix="get the current federation file",
        )


def check_answer(call: Call, found: VerifiedContribution) -> None:
    """This contribution is what the call asks for, and came in time; it must name the call itself.

    Raises: RefusedError: `CALL_UNKNOWN` (it names another one), `CALL_EXPIRED`, `CALL_SITE`, `CALL_KIND`,
        `CALL_BASE`, `CALL_SHAPE`.
    """
    claims = found.provenance
    if claims.call is None or (claims.call.id, claims.call.nonce, claims.call.sha256) != (
        call.id,
        call.nonce,
        call.digest,
    ):
        raise RefusedError("CALL_UNKNOWN", f"the contribution does not answer the call {call.id}")
    if claims.finished > call.deadline or found.received_on >= call.deadline + COLLECTION_PERIOD:
        raise RefusedError(
            "CALL_EXPIRED",
            f"the contribution answers the call {call.id} too late",
            expected=f"made until {format_time(call.deadline)}, received before "
            f"{format_time(call.deadline + COLLECTION_PERIOD)}",
            got=f"made {format_time(claims.finished)}, received {format_time(found.received_on)}",
            fix="make a new call",
        )
    if call.domain_of(found.site) != found.domain:
        raise RefusedError("CALL_SITE", f"the call {call.id} asks site {found.site} in another domain")
    if found.kind not in call.want:
        raise RefusedError(
            "CALL_KIND", f"the call {call.id} does not ask for {found.kind}", expected=" or ".join(call.want)
        )
    if (claims.base.name, claims.base.dir_hash) != (call.base.name, call.base.dir_hash):
        raise RefusedError(
            "CALL_BASE",
            f"the call {call.id} asks for another base than this was made for",
            expected=f"{call.base.name!a} ({call.base.dir_hash})",
            got=f"{claims.base.name!a} ({claims.base.dir_hash})",
        )
    if found.kind == "adapter":
        config = parse_config(found.read(CONFIG_FILE))
        check_shape(call, max([config.r, *config.rank_pattern.values()]), config.target_modules)


def check_shape(call: Call, rank: int, targets: Sequence[str]) -> None:
    """A LoRA of this rank on these modules is one that the call asks for.

    Raises: RefusedError: `CALL_SHAPE`.
    """
    wanted = tuple(f".{target}" for target in call.lora.targets)
    others = [target for target in targets if not f".{target}".endswith(wanted)]
    if rank > call.lora.rank or others:
        raise RefusedError(
            "CALL_SHAPE",
            f"the LoRA is not of a shape that the call {call.id} asks for",
            expected=f"rank at most {call.lora.rank}, on {', '.join(call.lora.targets)}",
            got=f"rank {rank}" + (f", on {others[0]!a}" if others else ""),
            fix="train with such a rank and such targets",
        )


def check_history(calls: Iterable[Call]) -> None:
    """The ledger of each coordinator, as its calls show it, only ever grew; calls of one second have no order.

    Raises: RefusedError: `LEDGER_SHRUNK`, `LEDGER_FORKED`.
    """
    newest: dict[str, Head] = {}
    heads: dict[tuple[str, int], str] = {}
    for call in sorted(calls, key=lambda call: (call.coordinator, call.issued, _head(call).entries)):
        head, known = _head(call), newest.get(call.coordinator, EMPTY)
        if head.entries < known.entries:
            raise RefusedError(
                "LEDGER_SHRUNK",
                f"the ledger of coordinator {call.coordinator} is shorter than it was",
                expected=f"at least {known.entries} entries, as an earlier call said",
                got=f"{head.entries}, says the call {call.id}",
                fix="answer no call of this coordinator before it has explained this; keep both calls",
            )
        if heads.setdefault((call.coordinator, head.entries), head.head) != head.head:
            raise RefusedError(
                "LEDGER_FORKED",
                f"coordinator {call.coordinator} has shown two ledgers of {head.entries} entries",
                fix="answer no call of this coordinator before it has explained this; keep both calls",
            )
        newest[call.coordinator] = head


def _head(call: Call) -> Head:
    return call.ledger or EMPTY


def _policy(federation: Federation) -> str | None:
    return federation.policy.sha256 if federation.policy else None


def _base_entry(federation: Federation, name: str) -> BaseModelEntry:
    for base in federation.base_models:
        if base.name == name:
            return base
    raise ConfigError(
        "CALL_INPUT",
        f"the federation has no base {name!a}",
        expected=", ".join(base.name for base in federation.base_models) or "a base in the federation file",
    )
