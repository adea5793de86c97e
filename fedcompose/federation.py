"""The federation: who belongs, with which keys, on which base. All else is believed because of it.

This is what the file says and what follows from it: whose key is that, did it count then? `federation_file.py` has the
rules by which a file is believed, `drafts.py` makes the next version, `trust_state.py` remembers what this machine
accepted, and `revocations.py` is the short way to withdraw trust.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Annotated, Literal, TypeVar

from pydantic import Field, model_validator

from fedcompose.document import Digest, Document, Time, Title, format_time
from fedcompose.errors import RefusedError
from fedcompose.keys import Identifier, NodeKey, public_key_bytes
from fedcompose.signing import keyid_of

FederationId = Annotated[str, Field(pattern=r"^urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\z")]
Reason = Literal["rotated", "compromised"]


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


def holders(federation: Federation) -> dict[str, str]:
    """Who holds each key, as `site site-a`, by fingerprint."""
    found = {root.keyid: "root" for root in federation.roots}
    found |= {key.keyid: f"coordinator {each.id}" for each in federation.coordinators for key in each.keys}
    found |= {keyid: f"site {site}" for keyid, site in _node_keys(federation.sites)}
    return found | {key.keyid: f"site {each.id}" for each in federation.sites for key in each.keys}


def _node_keys(sites: Iterable[Site]) -> list[tuple[str, str]]:
    """The fingerprint of every node key, and whose it is."""
    return [(keyid_of(site.node_key.encode()), site.id) for site in sites if site.node_key is not None]
