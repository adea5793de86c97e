"""The federation file: who belongs, with which keys, on which base. All else is believed because of it.

`federation.json` is a DSSE envelope that the federation's roots sign. The rules, most of them TUF's:

1. A file is accepted only if at least `threshold` of the roots that it lists signed it, and it has not
expired. 2. Whose roots? At first those whose fingerprints a person gave; from then on the pinned ones: a
newer version must be signed by as many of the pinned roots as the pinned version asked for, besides its own.
3. Versions never go back, and one version has one content. 4. A public key appears once in the whole file,
under its own fingerprint, so that no key counts twice.

Input and output are bytes, the clock is an argument, and the only file touched is this machine's
`trust-state.json` (rules 2 and 3). Rotated roots, revoked keys and suspended sites are honoured; no command
here writes them yet.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from fedcompose.errors import ConfigError, RefusedError
from fedcompose.files import dump_json, parse_json, read_json, sha256_hex, write_json
from fedcompose.keys import Enrolment, Identifier, public_key_bytes, read_enrolment
from fedcompose.signing import Signer, keyid_of, read_envelope_unverified, sign_envelope, verify_envelope

FEDERATION_TYPE = "application/vnd.fedcompose.federation.v1+json"
KEY_VALIDITY = timedelta(days=365)
FILE_VALIDITY = timedelta(days=90)

_TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z", re.ASCII)


def format_time(moment: datetime) -> str:
    """UTC to the second, as every document of this project writes it: 2026-11-20T09:00:00Z."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str) -> datetime:
    """Read the one form that `format_time` writes.

    Raises: ValueError.
    """
    if not _TIME.fullmatch(text):
        raise ValueError("a time is written like 2026-11-20T09:00:00Z")
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)


def _as_time(value: Any) -> Any:
    return parse_time(value) if isinstance(value, str) else value


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("a name is made of printable characters")
    return text


Time = Annotated[AwareDatetime, BeforeValidator(_as_time), PlainSerializer(format_time)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}\z")]
FederationId = Annotated[str, Field(pattern=r"^urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\z")]
Title = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_printable)]


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Root(_Document):
    """Someone whose signature, with enough others, makes a federation file."""

    keyid: Digest
    name: Title
    public_key: str


class Revocation(_Document):
    """From `at` on the key is not believed; of a compromised key, doubt the older signatures too."""

    at: Time
    reason: Literal["rotated", "compromised"]


class Key(_Document):
    """A signing key and the time in which it counts."""

    keyid: Digest
    public_key: str
    not_before: Time
    not_after: Time
    revoked: Revocation | None = None


Keys = Annotated[tuple[Key, ...], Field(strict=False)]  # JSON has lists where we want tuples


class Coordinator(_Document):
    """Who may call, compose and release."""

    id: Identifier
    keys: Keys


class Site(_Document):
    """Who may contribute, in which domain, and what."""

    id: Identifier
    domain: Identifier
    status: Literal["active", "suspended"]
    may: Annotated[tuple[Literal["adapter", "traces"], ...], Field(strict=False)]
    keys: Keys


class BaseModelEntry(_Document):
    """A base that this federation builds on, by the digest of its files."""

    name: Title
    dir_hash: Digest = Field(alias="dirHash")


class Policy(_Document):
    """The rules for contributions, by the digest of the document that holds them."""

    sha256: Digest


class Federation(_Document):
    """One version of the federation file. Whether to believe it is for `verify_federation` to say."""

    schema_: Literal["fedcompose/federation/v1"] = Field(alias="schema")
    id: FederationId = Field(alias="federation")
    name: Title
    version: Annotated[int, Field(ge=1)]
    previous: Digest | None
    issued: Time
    expires: Time
    threshold: Annotated[int, Field(ge=1)]
    roots: Annotated[tuple[Root, ...], Field(strict=False, min_length=1)]
    coordinators: Annotated[tuple[Coordinator, ...], Field(strict=False)]
    sites: Annotated[tuple[Site, ...], Field(strict=False)]
    base_models: Annotated[tuple[BaseModelEntry, ...], Field(strict=False)]
    policy: Policy | None

    @model_validator(mode="after")
    def _check(self) -> Federation:
        members: list[Coordinator | Site] = [*self.coordinators, *self.sites]
        keys = [key for member in members for key in member.keys]
        if self.threshold > len(self.roots):
            raise ValueError("the threshold is larger than the number of roots")
        if self.expires <= self.issued or any(key.not_after <= key.not_before for key in keys):
            raise ValueError("something ends before it begins")
        if (self.version == 1) != (self.previous is None):
            raise ValueError("the first version, and no other, follows none")
        _check_unique("site", [site.id for site in self.sites])
        _check_unique("coordinator", [coordinator.id for coordinator in self.coordinators])
        _check_unique("base", [base.name for base in self.base_models])
        _check_keys([*self.roots, *keys])
        return self

    def site(self, site_id: str) -> Site:
        """The site of this name.

        Raises: RefusedError: `SITE_UNKNOWN`.
        """
        for site in self.sites:
            if site.id == site_id:
                return site
        raise RefusedError("SITE_UNKNOWN", f"version {self.version} of the federation has no site {site_id!a}")

    def site_key(self, keyid: str, at: datetime) -> tuple[Site, Key]:
        """The active site whose key this is, if the key counted at `at`.

        Raises: RefusedError: `KEY_UNKNOWN`, `SITE_SUSPENDED`, `KEY_EXPIRED`, `KEY_REVOKED`.
        """
        site, key = _holder(self.sites, keyid, "site")
        if site.status != "active":
            raise RefusedError(
                "SITE_SUSPENDED", f"site {site.id} is suspended since some version before {self.version}"
            )
        _check_counted(key, at, f"the key of site {site.id}")
        return site, key

    def coordinator_key(self, keyid: str, at: datetime) -> tuple[Coordinator, Key]:
        """The coordinator whose key this is, if the key counted at `at`.

        Raises: RefusedError: `KEY_UNKNOWN`, `KEY_EXPIRED`, `KEY_REVOKED`.
        """
        coordinator, key = _holder(self.coordinators, keyid, "coordinator")
        _check_counted(key, at, f"the key of coordinator {coordinator.id}")
        return coordinator, key


# --- making a version -----------------------------------------------------------------------------


def create_federation(
    name: str, root: Signer, root_name: str, bases: Mapping[str, str], federation_id: str, now: datetime
) -> bytes:
    """The first version of a federation file, signed by its one root. `bases` maps names to dirHashes.

    Raises: ConfigError: `FEDERATION_INPUT`.
    """
    document = {
        "schema": "fedcompose/federation/v1",
        "federation": federation_id,
        "name": name,
        "version": 1,
        "previous": None,
        "issued": format_time(now),
        "expires": format_time(now + FILE_VALIDITY),
        "threshold": 1,
        "roots": [{"keyid": root.keyid, "name": root_name, "public_key": root.public_pem.decode()}],
        "coordinators": [],
        "sites": [],
        "base_models": [{"name": base, "dirHash": digest} for base, digest in bases.items()],
        "policy": None,
    }
    return sign_federation(document, [root])


def enrol(envelope: bytes, enrolment: bytes, root: Signer, now: datetime) -> bytes:
    """The next version of a federation file, with the sender of `enrolment` in it, signed by `root`.

    An expired file can be continued: the root's own signature is on it.

    Raises: RefusedError: when either document fails its checks. ConfigError: `ENROLMENT_ROLE`,
        `FEDERATION_SIGNERS` (not a root that signed, or too few), `FEDERATION_INPUT` (say, an id or key
        already in use).
    """
    payload, federation, signed = _open(envelope)
    if root.keyid not in signed:
        raise ConfigError("FEDERATION_SIGNERS", "that key did not sign this federation file", got=f"key {root.keyid}")
    document = federation.model_dump(mode="json", by_alias=True) | {
        "version": federation.version + 1,
        "previous": sha256_hex(payload),
        "issued": format_time(now),
        "expires": format_time(now + FILE_VALIDITY),
    }
    _add_member(document, read_enrolment(enrolment), now)
    return sign_federation(document, [root])


def sign_federation(document: Mapping[str, Any], roots: Sequence[Signer]) -> bytes:
    """The federation file that holds `document`.

    Raises: ConfigError: `FEDERATION_INPUT`, `FEDERATION_SIGNERS`.
    """
    try:
        federation = Federation.model_validate(document)
    except ValidationError as error:
        reason = _first_problem(error)
        raise ConfigError("FEDERATION_INPUT", "that would not be a valid federation file", got=reason) from error
    if len({root.keyid for root in roots} & {root.keyid for root in federation.roots}) < federation.threshold:
        raise ConfigError("FEDERATION_SIGNERS", "too few roots sign", expected=f"{federation.threshold} of its roots")
    return sign_envelope(dump_json(federation.model_dump(mode="json", by_alias=True)), FEDERATION_TYPE, roots)


def _add_member(document: dict[str, Any], enrolment: Enrolment, now: datetime) -> None:
    """List the sender. Its key counts from the start of the day, so that clocks may differ a little."""
    start = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    key = {
        "keyid": keyid_of(enrolment.public_key.encode()),
        "public_key": enrolment.public_key,
        "not_before": format_time(start),
        "not_after": format_time(start + KEY_VALIDITY),
        "revoked": None,
    }
    if enrolment.role == "site":
        site = {
            "id": enrolment.id,
            "domain": enrolment.domain,
            "status": "active",
            "may": ["adapter", "traces"],
        }
        document["sites"].append(site | {"keys": [key]})
    elif enrolment.role == "coordinator":
        document["coordinators"].append({"id": enrolment.id, "keys": [key]})
    else:
        raise ConfigError("ENROLMENT_ROLE", "a root is named when a federation begins, not enrolled afterwards")


# --- believing a version --------------------------------------------------------------------------


def read_federation(envelope: bytes) -> tuple[Federation, frozenset[str]]:
    """A file that agrees with itself, and which of its own roots signed it. That is no reason to trust them.

    Raises: RefusedError: `FEDERATION_INVALID`, `FEDERATION_THRESHOLD`, or an `ENVELOPE_*` or `KEY_UNUSABLE`
    code.
    """
    _, federation, signed = _open(envelope)
    return federation, signed


def verify_federation(envelope: bytes, *, root_fingerprints: Collection[str], now: datetime) -> Federation:
    """The federation file that the owners of these fingerprints signed.

    Each fingerprint must be of a root that the file lists and that signed it, and they must be as many as
    the file's threshold. (Were some of them enough, one dishonest root could hand out a file with a lower
    threshold.)

    Raises: RefusedError: `TRUST_ROOT_UNKNOWN`, `FEDERATION_EXPIRED`, and all that `read_federation` raises.
    """
    _, federation, signed = _open(envelope)
    _check_given(federation, signed, root_fingerprints)
    _check_current(federation, now)
    return federation


def trusted_federation(envelope: bytes, root_fingerprints: Collection[str] | None, now: datetime) -> Federation:
    """The federation file, checked against what this machine has pinned, and then pinned itself.

    The first time a person must give fingerprints, got from the roots in some other way than with the file.
    From then on the pinned roots decide; fingerprints that are given nevertheless must hold as well.

    Raises: RefusedError: `FEDERATION_ROLLBACK` (a newer version was seen before), `FEDERATION_FORK` (this
        version was seen with another content), and all that `verify_federation` raises. ConfigError:
        `TRUST_STATE_INVALID`.
    """
    payload, federation, signed = _open(envelope)
    with _trust_state() as pins:
        pin = pins.get(federation.id)
        if pin is None and not root_fingerprints:
            raise RefusedError(
                "TRUST_ROOT_UNKNOWN",
                f"nothing on this machine says whether to trust federation {federation.name!a}",
                fix="ask its roots for their fingerprints, by phone or in person, and give them once: "
                "--root-fingerprint FINGERPRINT",
            )
        if root_fingerprints:
            _check_given(federation, signed, root_fingerprints)
        if pin is not None:
            _check_pin(pin, federation, signed, sha256_hex(payload))
        _check_current(federation, now)
        pins[federation.id] = Pin(
            roots=tuple(root.keyid for root in federation.roots),
            threshold=federation.threshold,
            version=federation.version,
            sha256=sha256_hex(payload),
        )
    return federation


def _open(envelope: bytes) -> tuple[bytes, Federation, frozenset[str]]:
    """The payload, what it says, and which of its own roots signed it: at least its threshold."""
    payload = read_envelope_unverified(envelope, FEDERATION_TYPE)
    try:
        federation = Federation.model_validate(parse_json(payload, "the federation file"))
    except ValidationError as error:
        reason = _first_problem(error)
        raise RefusedError("FEDERATION_INVALID", "not a federation file of this version", got=reason) from error
    roots = {root.keyid: root.public_key.encode() for root in federation.roots}
    signed = verify_envelope(envelope, FEDERATION_TYPE, roots).keyids
    if len(signed) < federation.threshold:
        raise RefusedError(
            "FEDERATION_THRESHOLD",
            "too few roots signed this federation file",
            expected=f"{federation.threshold} of its {len(roots)} roots",
            got=f"{len(signed)}",
        )
    return payload, federation, signed


def _check_given(federation: Federation, signed: frozenset[str], given: Collection[str]) -> None:
    strangers = sorted(set(given) - signed)
    if strangers:
        raise RefusedError(
            "TRUST_ROOT_UNKNOWN",
            "a root that you named did not sign this federation file",
            expected=f"a signature by {strangers[0]!a}",
            got=f"signatures by {', '.join(sorted(signed))}",
            fix="do not trust this file; compare fingerprints with the roots, by phone or in person",
        )
    if len(set(given)) < federation.threshold:
        raise RefusedError(
            "TRUST_ROOT_UNKNOWN",
            "too few of this federation's roots are known here",
            expected=f"the fingerprints of {federation.threshold} roots",
            got=f"{len(set(given))}",
        )


def _check_current(federation: Federation, now: datetime) -> None:
    if now >= federation.expires:
        raise RefusedError(
            "FEDERATION_EXPIRED",
            f"version {federation.version} of the federation file has expired",
            expected=f"a time before {format_time(federation.expires)}",
            got=format_time(now),
            fix="ask for the current file, or check this machine's clock",
        )


# --- what this machine remembers ------------------------------------------------------------------


class Pin(_Document):
    """What was last believed of one federation."""

    roots: Annotated[tuple[Digest, ...], Field(strict=False)]
    threshold: Annotated[int, Field(ge=1)]
    version: Annotated[int, Field(ge=1)]
    sha256: Digest


class _TrustState(_Document):
    schema_: Literal["fedcompose/trust-state/v1"] = Field(alias="schema")
    federations: dict[FederationId, Pin]


def pinned(federation_id: str) -> Pin | None:
    """What this machine last believed of a federation, if anything.

    Raises: ConfigError: `TRUST_STATE_INVALID`.
    """
    return _read_trust_state(_trust_state_path()).get(federation_id)


def _check_pin(pin: Pin, federation: Federation, signed: frozenset[str], sha256: str) -> None:
    if federation.version < pin.version:
        raise RefusedError(
            "FEDERATION_ROLLBACK",
            "this federation file is older than one that this machine has seen",
            expected=f"version {pin.version} or later",
            got=f"version {federation.version}",
            fix="ask for the current file",
        )
    if federation.version == pin.version and sha256 != pin.sha256:
        raise RefusedError(
            "FEDERATION_FORK",
            f"there are two federation files of version {pin.version}",
            fix="do not trust either until the roots have explained it",
        )
    if federation.version == pin.version + 1 and federation.previous != pin.sha256:
        raise RefusedError("FEDERATION_FORK", f"this file does not follow the version {pin.version} seen before")
    if len(signed & set(pin.roots)) < pin.threshold:
        raise RefusedError(
            "TRUST_ROOT_UNKNOWN",
            "too few of the roots that this machine trusts signed the new federation file",
            expected=f"{pin.threshold} of {', '.join(pin.roots)}",
        )


@contextmanager
def _trust_state() -> Iterator[dict[str, Pin]]:
    """The pins by federation id; what the block changes is written if it ends well. One process at a time."""
    path = _trust_state_path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = _read_trust_state(path)
        pins = dict(before)
        yield pins
        if pins != before:
            state = _TrustState(schema="fedcompose/trust-state/v1", federations=pins)
            write_json(path, state.model_dump(mode="json", by_alias=True))


def _trust_state_path() -> Path:
    return Path(os.environ.get("FEDCOMPOSE_HOME") or Path.home() / ".fedcompose") / "trust-state.json"


def _read_trust_state(path: Path) -> dict[str, Pin]:
    if not path.exists():
        return {}
    try:
        return _TrustState.model_validate(read_json(path)).federations
    except (ValidationError, RefusedError) as error:
        raise ConfigError(
            "TRUST_STATE_INVALID",
            f"{path} cannot be read",
            fix="restore it from a backup; or delete it, and give --root-fingerprint again",
        ) from error


# --- checks ---------------------------------------------------------------------------------------

Member = TypeVar("Member", Site, Coordinator)


def _holder(members: Sequence[Member], keyid: str, role: str) -> tuple[Member, Key]:
    for member in members:
        for key in member.keys:
            if key.keyid == keyid:
                return member, key
    raise RefusedError(
        "KEY_UNKNOWN",
        f"no {role} of this federation has this key",
        got=f"key {keyid!a}",
        fix="get the current federation file, or have the key enrolled: fedcompose federation enroll --help",
    )


def _check_counted(key: Key, at: datetime, whose: str) -> None:
    if not key.not_before <= at < key.not_after:
        raise RefusedError(
            "KEY_EXPIRED",
            f"{whose} did not count at that time",
            expected=f"a time from {format_time(key.not_before)} to {format_time(key.not_after)}",
            got=format_time(at),
            fix="check this machine's clock, or have a new key enrolled",
        )
    if key.revoked is not None and at >= key.revoked.at:
        since = format_time(key.revoked.at)
        raise RefusedError("KEY_REVOKED", f"{whose} is revoked ({key.revoked.reason}) since {since}")


def _check_unique(what: str, names: Sequence[str]) -> None:
    if len(set(names)) != len(names):
        raise ValueError(f"a {what} is listed twice")


def _check_keys(keys: Sequence[Root | Key]) -> None:
    _check_unique("public key", [key.keyid for key in keys])
    if any(keyid_of(public_key_bytes(key.public_key)) != key.keyid for key in keys):
        raise ValueError("a fingerprint is not that of its key")


def _first_problem(error: ValidationError) -> str:
    """Where and why, without the value; the place may be a stranger's text, so it is escaped and short."""
    problem = error.errors(include_input=False)[0]
    place = ".".join(str(part) for part in problem["loc"])
    reason = problem["msg"].removeprefix("Value error, ")
    return f"{ascii(place)[:80]}: {reason}" if place else reason
