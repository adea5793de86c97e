"""The revocation list: one root withdraws trust, at once, for keys and for releases.

Granting trust takes a new version of the federation file, with the signatures of enough roots. Withdrawing it must not
wait for them: `revocations.json` is a DSSE envelope that any one of the current roots signs. What is on the list stays
on it. A list has a number that rises, and the next list holds every entry of the one before, so that nobody alone can
give back what was withdrawn; that takes a new key, enrolled by enough roots, or a new release.

Input: signed bytes and a federation that is already believed. Output: a `Revocations`. `trust_state.py` remembers which
list this machine accepted, and applies it wherever a federation file is believed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from fedcompose.document import Digest, Document, Time, first_problem, format_time
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.federation import Federation, FederationId, Member, Revocation, check_not_revoked, worse_of
from fedcompose.files import dump_json, parse_json
from fedcompose.signing import Signer, read_envelope_unverified, sign_envelope, verify_envelope

REVOCATIONS_TYPE = "application/vnd.fedcompose.revocations.v1+json"


class RevokedKey(Revocation):
    """A key of a site or a coordinator, and from when on it is not believed."""

    keyid: Digest


class WithdrawnRelease(Document):
    """A release, by the digest that identifies it, and when it was withdrawn."""

    dir_hash: Digest = Field(alias="dirHash")
    at: Time


class Revocations(Document):
    """One list. Whether to believe it is for `verify_revocations` to say."""

    schema_: Literal["fedcompose/revocations/v1"] = Field(alias="schema")
    federation: FederationId
    number: Annotated[int, Field(ge=0, lt=1 << 53)]  # beyond it JSON readers disagree about integers
    issued: Time
    keys: Annotated[tuple[RevokedKey, ...], Field(strict=False)]
    releases: Annotated[tuple[WithdrawnRelease, ...], Field(strict=False)]

    @model_validator(mode="after")
    def _each_once(self) -> Revocations:
        keyids, releases = {entry.keyid for entry in self.keys}, {entry.dir_hash for entry in self.releases}
        if len(keyids) != len(self.keys) or len(releases) != len(self.releases):
            raise ValueError("a key or a release is listed twice")
        return self

    def check_key(self, keyid: str, at: datetime) -> None:
        """The list does not revoke this key, or only from later than `at` on.

        Raises: RefusedError: `KEY_REVOKED`.
        """
        for entry in self.keys:
            if entry.keyid == keyid:
                check_not_revoked(entry, at, f"the key {keyid[:12]}")

    def check_release(self, dir_hash: str) -> None:
        """The list does not withdraw the release that this dirHash identifies.

        Raises: RefusedError: `RELEASE_WITHDRAWN`.
        """
        for entry in self.releases:
            if entry.dir_hash == dir_hash:
                raise RefusedError(
                    "RELEASE_WITHDRAWN",
                    f"a root of the federation withdrew this release on {format_time(entry.at)}",
                    expected="a release that nobody withdrew",
                    got=f"dirHash {dir_hash}, entry of revocation list {self.number}",
                    fix="do not use it; ask the coordinator for a newer release",
                )


def with_revocations(federation: Federation, revocations: Revocations) -> Federation:
    """The same federation with the keys revoked that the list names as well."""
    listed = {entry.keyid: entry for entry in revocations.keys}
    changes = {
        "sites": tuple(_revoke(site, listed) for site in federation.sites),
        "coordinators": tuple(_revoke(coordinator, listed) for coordinator in federation.coordinators),
    }
    return federation.model_copy(update=changes)


def _revoke(member: Member, listed: Mapping[str, RevokedKey]) -> Member:
    """The member with its listed keys revoked."""
    keys = []
    for key in member.keys:
        entry = listed.get(key.keyid)
        if entry is not None:
            key = key.model_copy(update={"revoked": worse_of(entry, key.revoked or entry)})
        keys.append(key)
    return member.model_copy(update={"keys": tuple(keys)})


def no_revocations(federation_id: str) -> Revocations:
    """The list before the first one."""
    never = datetime.fromtimestamp(0, UTC)
    return Revocations(
        schema="fedcompose/revocations/v1", federation=federation_id, number=0, issued=never, keys=(), releases=()
    )


def next_revocations(
    older: Revocations, keys: Iterable[RevokedKey], releases: Iterable[WithdrawnRelease], root: Signer, now: datetime
) -> bytes:
    """The next list: all that `older` withdraws, and these keys and releases; signed by one root.

    For a key that is listed already, what holds is the earlier time, and compromised if either entry says so.

    Raises: ConfigError: `REVOCATIONS_INPUT` (nothing would change).
    """
    listed = {entry.keyid: entry for entry in older.keys}
    for entry in keys:
        worse = worse_of(entry, listed.get(entry.keyid, entry))
        listed[entry.keyid] = RevokedKey(keyid=entry.keyid, at=worse.at, reason=worse.reason)
    withdrawn = {entry.dir_hash: entry for entry in (*releases, *older.releases)}
    if tuple(listed.values()) == older.keys and len(withdrawn) == len(older.releases):
        raise ConfigError("REVOCATIONS_INPUT", f"revocation list {older.number} says so already")
    changes = {
        "number": older.number + 1,
        "issued": now,
        "keys": tuple(listed.values()),
        "releases": tuple(withdrawn.values()),
    }
    document = older.model_copy(update=changes).model_dump(mode="json", by_alias=True)
    return sign_envelope(dump_json(document), REVOCATIONS_TYPE, [root])


def verify_revocations(envelope: bytes, federation: Federation) -> Revocations:
    """The list that a current root of this federation signed. One is enough.

    Raises: RefusedError: `REVOCATIONS_INVALID`, `FEDERATION_MISMATCH`, or an `ENVELOPE_*` code.
    """
    roots = {root.keyid: root.public_key.encode() for root in federation.roots}
    listed = parse_revocations(verify_envelope(envelope, REVOCATIONS_TYPE, roots).payload)
    if listed.federation != federation.id:
        raise RefusedError(
            "FEDERATION_MISMATCH",
            "the revocation list is for another federation",
            expected=federation.id,
            got=listed.federation,
        )
    return listed


def read_revocations_unverified(envelope: bytes) -> Revocations:
    """What a list claims: to learn its federation, or to look at it. Nothing of it is believed.

    Raises: RefusedError: `REVOCATIONS_INVALID`, or an `ENVELOPE_*` code.
    """
    return parse_revocations(read_envelope_unverified(envelope, REVOCATIONS_TYPE))


def parse_revocations(payload: bytes) -> Revocations:
    try:
        return Revocations.model_validate(parse_json(payload, "the revocation list"))
    except ValidationError as error:
        reason = first_problem(error)
        raise RefusedError("REVOCATIONS_INVALID", "not a revocation list of this version", got=reason) from error


def check_newer(newer: Revocations, older: Revocations) -> None:
    """The list is the accepted one or a later one that takes nothing back.

    Raises: RefusedError: `REVOCATIONS_ROLLBACK`, `REVOCATIONS_FORK`.
    """
    if newer.number < older.number:
        raise RefusedError(
            "REVOCATIONS_ROLLBACK",
            "this revocation list is older than one that this machine has accepted",
            expected=f"number {older.number} or later",
            got=f"number {newer.number}",
            fix="ask a root for the current list",
        )
    if newer.number == older.number and newer != older:
        raise RefusedError(
            "REVOCATIONS_FORK",
            f"there are two revocation lists with the number {older.number}",
            fix="ask a root to withdraw again what only one of them lists: the next list has all of it",
        )
    listed = {entry.keyid: entry for entry in newer.keys}
    for entry in older.keys:
        kept = listed.get(entry.keyid)
        if kept is None or (kept.at, kept.reason) != (worse_of(kept, entry).at, worse_of(kept, entry).reason):
            raise _taken_back(f"key {entry.keyid}")
    if missing := {entry.dir_hash for entry in older.releases} - {entry.dir_hash for entry in newer.releases}:
        raise _taken_back(f"release {min(missing)}")


def _taken_back(what: str) -> RefusedError:
    return RefusedError(
        "REVOCATIONS_ROLLBACK",
        "this revocation list takes something back that this machine has accepted",
        expected=f"what it said before about {what}",
        fix="ask the roots who made this list, and why",
    )
