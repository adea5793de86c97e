"""The federation file: who belongs, with which keys, on which base. All else is believed because of it.

`federation.json` is a DSSE envelope that the federation's roots sign. The rules, most of them TUF's:

1. A file counts only if at least `threshold` of the roots that it lists signed it, and until it expires.
2. Whose roots? At first those whose fingerprints a person gave; from then on those of the version that was accepted
last: the next one must be signed by as many of *those* roots as that version asked for, besides its own.
3. Versions never go back, one version has one content, and a key never changes its holder.
4. A public key appears once in the whole file, under its own fingerprint, so that no key counts twice.

This file holds the document and the rules: bytes in, a `Federation` out, the clock an argument, nothing on disk.
`drafts.py` makes the next version, `trust_state.py` remembers what this machine accepted, and `revocations.py` is the
short way to withdraw trust.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
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

from fedcompose.errors import RefusedError
from fedcompose.files import parse_json, sha256_hex
from fedcompose.keys import Identifier, NodeKey, public_key_bytes
from fedcompose.signing import keyid_of, read_envelope_unverified, verify_envelope

FEDERATION_TYPE = "application/vnd.fedcompose.federation.v1+json"

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
Reason = Literal["rotated", "compromised"]


class Document(BaseModel):
    """Base of the documents that are read strictly: unknown fields are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Root(Document):
    """Someone whose signature, with enough others, makes a federation file."""

    keyid: Digest
    name: Title
    public_key: str


class Revocation(Document):
    """From `at` on the key is not believed; of a compromised key, doubt the older signatures too."""

    at: Time
    reason: Reason


class Key(Document):
    """A signing key and the time in which it counts."""

    keyid: Digest
    public_key: str
    not_before: Time
    not_after: Time
    revoked: Revocation | None = None


Keys = Annotated[tuple[Key, ...], Field(strict=False)]  # JSON has lists where we want tuples


class Coordinator(Document):
    """Who may call, compose and release."""

    id: Identifier
    keys: Keys


class Site(Document):
    """Who may contribute, in which domain, and what."""

    id: Identifier
    domain: Identifier
    status: Literal["active", "suspended"]
    may: Annotated[tuple[Literal["adapter", "traces"], ...], Field(strict=False)]
    keys: Keys
    node_key: NodeKey | None = None  # by which the coordinator knows the site's connection; it signs nothing


class BaseModelEntry(Document):
    """A base that this federation builds on, by the digest of its files."""

    name: Title
    dir_hash: Digest = Field(alias="dirHash")


class Policy(Document):
    """The rules for contributions, by the digest of the document that holds them."""

    sha256: Digest


class Federation(Document):
    """One version of the federation file. Whether to believe it is for `verify_federation` to say."""

    schema_: Literal["fedcompose/federation/v1"] = Field(alias="schema")
    id: FederationId = Field(alias="federation")
    name: Title
    version: Annotated[int, Field(ge=1, lt=1 << 53)]  # beyond it JSON readers disagree about integers
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
        holding: list[Root | Key] = [*self.roots, *keys]
        if self.threshold > len(self.roots):
            raise ValueError("the threshold is larger than the number of roots")
        if self.expires <= self.issued or any(key.not_after <= key.not_before for key in keys):
            raise ValueError("something ends before it begins")
        if (self.version == 1) != (self.previous is None):
            raise ValueError("the first version, and no other, follows none")
        _check_unique("site", [site.id for site in self.sites])
        _check_unique("coordinator", [coordinator.id for coordinator in self.coordinators])
        _check_unique("base", [base.name for base in self.base_models])
        _check_keys(holding)
        nodes = [keyid for keyid, _ in _node_keys(self.sites)]
        _check_unique("public key", [*(key.keyid for key in holding), *nodes])
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

    def doubts(self, keyid: str) -> str | None:
        """A sentence about a key that was reported compromised: what it signed earlier counts, but look again."""
        for holder, key in self._keys():
            if key.keyid == keyid and key.revoked is not None and key.revoked.reason == "compromised":
                return (
                    f"the key {keyid[:12]} of {holder} is reported compromised since {format_time(key.revoked.at)}: "
                    "what was received before that still counts, but ask its owner about it"
                )
        return None

    def _keys(self) -> Iterator[tuple[str, Key]]:
        yield from ((f"coordinator {each.id}", key) for each in self.coordinators for key in each.keys)
        yield from ((f"site {each.id}", key) for each in self.sites for key in each.keys)


# --- believing a version --------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenedFile:
    """A federation file that agrees with itself, and which known roots signed it: perhaps too few, as in a draft."""

    federation: Federation
    sha256: str  # of the signed document, which is what `previous` in the next version names
    signed: frozenset[str]

    @property
    def own_signed(self) -> frozenset[str]:
        """Those of the file's own roots that signed it."""
        return self.signed & {root.keyid for root in self.federation.roots}


class AcceptedVersion(Document):
    """A version of a federation file, by what was signed."""

    version: Annotated[int, Field(ge=1)]
    sha256: Digest


class Pin(AcceptedVersion):
    """What a machine remembers of the version that it accepted last: enough to judge the next one."""

    roots: Annotated[tuple[Digest, ...], Field(strict=False)]
    threshold: Annotated[int, Field(ge=1)]


def pin_of(opened: OpenedFile) -> Pin:
    """What to remember of a file that was accepted."""
    federation = opened.federation
    return Pin(
        version=federation.version,
        sha256=opened.sha256,
        roots=tuple(root.keyid for root in federation.roots),
        threshold=federation.threshold,
    )


def open_federation(envelope: bytes, older: Federation | None = None) -> OpenedFile:
    """What the file says, and which of its own roots and of the roots of `older` signed it. Believe nothing yet.

    Raises: RefusedError: `FEDERATION_INVALID`, or an `ENVELOPE_*` or `KEY_UNUSABLE` code.
    """
    payload = read_envelope_unverified(envelope, FEDERATION_TYPE)
    federation = _parse(payload)
    roots = [*federation.roots, *(older.roots if older else ())]
    keys = {root.keyid: root.public_key.encode() for root in roots}
    signed = verify_envelope(envelope, FEDERATION_TYPE, keys).keyids
    return OpenedFile(federation, sha256_hex(payload), signed)


def claimed_federation(envelope: bytes) -> str:
    """The id of the federation that a file says it is of: to look up what is known of it, nothing more.

    Raises: RefusedError: `FEDERATION_INVALID` or an `ENVELOPE_*` code.
    """
    return _parse(read_envelope_unverified(envelope, FEDERATION_TYPE)).id


@lru_cache(maxsize=8)  # a file of many sites takes long to parse, and every message of every site asks for it
def _parse(payload: bytes) -> Federation:
    try:
        return Federation.model_validate(parse_json(payload, "the federation file"))
    except ValidationError as error:
        reason = first_problem(error)
        raise RefusedError("FEDERATION_INVALID", "not a federation file of this version", got=reason) from error


def check_threshold(opened: OpenedFile) -> None:
    """As many of the file's own roots signed it as it asks for.

    Raises: RefusedError: `FEDERATION_THRESHOLD`.
    """
    federation = opened.federation
    if len(opened.own_signed) < federation.threshold:
        raise RefusedError(
            "FEDERATION_THRESHOLD",
            "too few roots signed this federation file",
            expected=f"{federation.threshold} of its {len(federation.roots)} roots",
            got=f"{len(opened.own_signed)}",
            fix="it is a draft: have another root sign it, fedcompose federation sign --help",
        )


def read_federation(envelope: bytes) -> tuple[Federation, frozenset[str]]:
    """A file that agrees with itself, and which of its own roots signed it. That is no reason to trust them.

    Raises: RefusedError: `FEDERATION_INVALID`, `FEDERATION_THRESHOLD`, or an `ENVELOPE_*` or `KEY_UNUSABLE`
    code.
    """
    opened = open_federation(envelope)
    check_threshold(opened)
    return opened.federation, opened.signed


def verify_federation(envelope: bytes, *, root_fingerprints: Collection[str], now: datetime) -> Federation:
    """The federation file that the owners of these fingerprints signed.

    Each fingerprint must be of a root that the file lists and that signed it, and they must be as many as
    the file's threshold. (Were some of them enough, one dishonest root could hand out a file with a lower
    threshold.)

    Raises: RefusedError: `TRUST_ROOT_UNKNOWN`, `FEDERATION_EXPIRED`, and all that `read_federation` raises.
    """
    opened = open_federation(envelope)
    check_threshold(opened)
    check_given(opened, root_fingerprints)
    check_current(opened.federation, now)
    return opened.federation


def check_given(opened: OpenedFile, given: Collection[str]) -> None:
    """The roots that a person named signed this file, and they are as many as it asks for.

    Raises: RefusedError: `TRUST_ROOT_UNKNOWN`.
    """
    strangers = sorted(set(given) - opened.own_signed)
    if strangers:
        raise RefusedError(
            "TRUST_ROOT_UNKNOWN",
            "a root that you named did not sign this federation file",
            expected=f"a signature by {strangers[0]!a}",
            got=f"signatures by {', '.join(sorted(opened.own_signed))}",
            fix="do not trust this file; compare fingerprints with the roots, by phone or in person",
        )
    if len(set(given)) < opened.federation.threshold:
        raise RefusedError(
            "TRUST_ROOT_UNKNOWN",
            "too few of this federation's roots are known here",
            expected=f"the fingerprints of {opened.federation.threshold} roots",
            got=f"{len(set(given))}",
            fix="ask that many roots for their fingerprints, and give each: --root-fingerprint FINGERPRINT",
        )


def check_current(federation: Federation, now: datetime) -> None:
    """An old file that somebody keeps showing stops counting by itself.

    Raises: RefusedError: `FEDERATION_EXPIRED`.
    """
    if now >= federation.expires:
        raise RefusedError(
            "FEDERATION_EXPIRED",
            f"version {federation.version} of the federation file has expired",
            expected=f"a time before {format_time(federation.expires)}",
            got=format_time(now),
            fix="ask a root or the coordinator for the current file, or check this machine's clock",
        )


def check_order(opened: OpenedFile, pin: AcceptedVersion) -> None:
    """The file is the accepted version or a later one.

    Raises: RefusedError: `FEDERATION_ROLLBACK`, `FEDERATION_FORK`.
    """
    federation = opened.federation
    if federation.version < pin.version:
        raise RefusedError(
            "FEDERATION_ROLLBACK",
            "this federation file is older than one that this machine has seen",
            expected=f"version {pin.version} or later",
            got=f"version {federation.version}",
            fix="ask a root or the coordinator for the current file",
        )
    if federation.version == pin.version and opened.sha256 != pin.sha256:
        raise RefusedError(
            "FEDERATION_FORK",
            f"there are two federation files of version {pin.version}",
            fix="do not trust either until the roots have explained it",
        )
    if federation.version == pin.version + 1 and federation.previous != pin.sha256:
        raise RefusedError("FEDERATION_FORK", f"this file does not follow the version {pin.version} seen before")


def check_roots(opened: OpenedFile, pin: Pin) -> None:
    """As many of the roots accepted before signed the file as the version accepted before asks for.

    Raises: RefusedError: `TRUST_ROOT_UNKNOWN`.
    """
    known = opened.signed & set(pin.roots)
    if len(known) < pin.threshold:
        raise RefusedError(
            "TRUST_ROOT_UNKNOWN",
            "too few of the roots that this machine trusts signed the new federation file",
            expected=f"{pin.threshold} of {', '.join(pin.roots)}",
            got=f"{len(known)}",
        )


def check_holders(newer: Federation, older: Federation) -> None:
    """No key changes its holder: who had it enrolled proved to hold it, under one name and in one role.

    Raises: RefusedError: `FEDERATION_KEY_MOVED`.
    """
    before = holders(older)
    for keyid, holder in holders(newer).items():
        if before.get(keyid, holder) != holder:
            raise RefusedError(
                "FEDERATION_KEY_MOVED",
                "a key was given to another holder",
                expected=f"key {keyid} to stay with {before[keyid]}",
                got=holder,
                fix="do not trust this file until the roots have explained it",
            )


def holders(federation: Federation) -> dict[str, str]:
    """Who holds each key, as `site site-a`, by fingerprint."""
    found = {root.keyid: "root" for root in federation.roots}
    found |= {key.keyid: f"coordinator {each.id}" for each in federation.coordinators for key in each.keys}
    found |= {keyid: f"site {site}" for keyid, site in _node_keys(federation.sites)}
    return found | {key.keyid: f"site {each.id}" for each in federation.sites for key in each.keys}


def _node_keys(sites: Iterable[Site]) -> list[tuple[str, str]]:
    """The fingerprint of every node key, and whose it is."""
    return [(keyid_of(site.node_key.encode()), site.id) for site in sites if site.node_key is not None]


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
            f"{whose} {'did not count yet' if at < key.not_before else 'had expired'}",
            expected=f"a time from {format_time(key.not_before)} to {format_time(key.not_after)}",
            got=format_time(at),
            fix="check this machine's clock, or have its owner enrol a new key: fedcompose federation enroll --help",
        )
    if key.revoked is not None:
        check_not_revoked(key.revoked, at, whose)


def check_not_revoked(revoked: Revocation, at: datetime, whose: str) -> None:
    """Raises: RefusedError: `KEY_REVOKED`."""
    if at < revoked.at:
        return
    why, fix = {
        "rotated": ("another key took its place", "ask its owner to sign with the key that counts now"),
        "compromised": (
            "somebody else may hold it",
            "do not use this; ask its owner, by phone or in person, for one signed with a new key",
        ),
    }[revoked.reason]
    raise RefusedError(
        "KEY_REVOKED",
        f"{whose} is revoked ({revoked.reason}): {why}",
        expected=f"a time before {format_time(revoked.at)}",
        got=format_time(at),
        fix=fix,
    )


def worse_of(one: Revocation, other: Revocation) -> Revocation:
    """What holds if both are said: from the earlier time on, and compromised if either says so."""
    reason: Reason = "compromised" if "compromised" in (one.reason, other.reason) else "rotated"
    return Revocation(at=min(one.at, other.at), reason=reason)


def _check_unique(what: str, names: Sequence[str]) -> None:
    if len(set(names)) != len(names):
        raise ValueError(f"a {what} is listed twice")


def _check_keys(keys: Sequence[Root | Key]) -> None:
    if any(keyid_of(public_key_bytes(key.public_key)) != key.keyid for key in keys):
        raise ValueError("a fingerprint is not that of its key")


def first_problem(error: ValidationError) -> str:
    """Where and why, without the value; the place may be a stranger's text, so it is escaped and short."""
    problem = error.errors(include_input=False)[0]
    place = ".".join(str(part) for part in problem["loc"])
    reason = problem["msg"].removeprefix("Value error, ")
    return f"{ascii(place)[:80]}: {reason}" if place else reason
