"""`federation.json`, a DSSE envelope that the federation's roots sign, and when it is believed.

The rules, most of them TUF's:

1. A file counts only if at least `threshold` of the roots that it lists signed it, and until it expires.
2. Whose roots? At first those whose fingerprints a person gave; from then on those of the version that was accepted
last: the next one must be signed by as many of *those* roots as that version asked for, besides its own.
3. Versions never go back, one version has one content, and a key never changes its holder.
4. A public key appears once in the whole file, under its own fingerprint, so that no key counts twice.

Bytes in, a `Federation` out, the clock an argument, nothing on disk.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Annotated

from pydantic import Field, ValidationError

from fedcompose.document import Digest, Document, first_problem, format_time
from fedcompose.errors import RefusedError
from fedcompose.federation import Federation, holders
from fedcompose.files import parse_json, sha256_hex
from fedcompose.signing import read_envelope_unverified, verify_envelope

FEDERATION_TYPE = "application/vnd.fedcompose.federation.v1+json"


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
