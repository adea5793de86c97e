"""Make the next version of a federation file, and pass it from root to root until enough have signed.

    read the current version ──change──▶ draft ──sign──▶ ... ──▶ signed by enough roots ──accept──▶ every machine

A draft is the same envelope as `federation.json`, with fewer signatures than it needs: the threshold of the version
before, by that version's roots, and its own threshold, by its own. No machine believes it, so it may travel by any
way. What a root signs is what `differences` says: it compares every field of both versions.

Bytes in, bytes out; the clock is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from pydantic import ValidationError

from fedcompose.amendments import add_member, change_roots, root_entry
from fedcompose.document import first_problem, format_time
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.federation import Coordinator, Federation, Key, Site, holders
from fedcompose.federation_file import (
    FEDERATION_TYPE,
    OpenedFile,
    check_current,
    check_holders,
    check_order,
    check_threshold,
    open_federation,
    pin_of,
)
from fedcompose.files import dump_json
from fedcompose.keys import Enrolment, read_enrolment
from fedcompose.signing import Signer, countersign_envelope, keyid_of, sign_envelope

FILE_VALIDITY = timedelta(days=90)

Change = Callable[[dict[str, Any]], None]  # edits the JSON document of the next version


# --- versions -------------------------------------------------------------------------------------


def create_federation(
    name: str,
    root: Signer,
    root_name: str,
    bases: Mapping[str, str],
    federation_id: str,
    now: datetime,
    *,
    others: Iterable[Enrolment] = (),
    threshold: int = 1,
) -> bytes:
    """The first version, signed by one of its roots; a draft if `threshold` asks for more of them.

    `bases` maps names to dirHashes. `others` are the other roots' verified enrolments.

    Raises: ConfigError: `FEDERATION_INPUT`, `ENROLMENT_ROLE`.
    """
    document = {
        "schema": "fedcompose/federation/v1",
        "federation": federation_id,
        "name": name,
        "version": 1,
        "previous": None,
        "issued": format_time(now),
        "expires": format_time(now + FILE_VALIDITY),
        "threshold": threshold,
        "roots": [root_entry(root_name, root.public_pem.decode())],
        "coordinators": [],
        "sites": [],
        "base_models": [{"name": base, "dirHash": digest} for base, digest in bases.items()],
        "policy": None,
    }
    change_roots(document, add=others)
    return _signed(document, root)[0]


def amend(
    envelope: bytes,
    change: Change,
    root: Signer,
    now: datetime,
    *,
    accepted: str | None = None,
    draft: bytes | None = None,
) -> bytes:
    """The next version of a federation file, with `change` made and a new expiry, signed by one of its roots.

    The root believes the file because its own signature is on it, or because this machine has accepted it:
    `accepted` is the digest of what was accepted. An expired file can be continued. Where a `draft` of the next version
    is being prepared, the change is added to it; whoever signed it before has to sign again.

    Raises: RefusedError: when the file fails its checks, or `change` its own. ConfigError: `FEDERATION_SIGNERS` (not a
        root, or no reason to believe the file), `FEDERATION_INPUT` (the result would not be valid), `DRAFT_OTHER`.
    """
    current = open_federation(envelope)
    check_threshold(current)
    if root.keyid not in root_ids(current.federation):
        raise ConfigError("FEDERATION_SIGNERS", "that key is not a root's", got=f"key {root.keyid}")
    if root.keyid not in current.signed and current.sha256 != accepted:
        raise ConfigError(
            "FEDERATION_SIGNERS",
            "that key did not sign this federation file, and this machine has not accepted it",
            fix="if you trust it: fedcompose federation accept --help",
        )
    begun = _begun(draft, current, root) if draft else None
    document = (begun or current.federation).model_dump(mode="json", by_alias=True) | {
        "version": current.federation.version + 1,
        "previous": current.sha256,
        "issued": format_time(now),
        "expires": format_time(now + FILE_VALIDITY),
    }
    change(document)
    proposed, federation = _signed(document, root)
    check_holders(federation, current.federation)
    return proposed


def _begun(draft: bytes, current: OpenedFile, root: Signer) -> Federation | None:
    """What this root has proposed so far; nothing if the draft has been overtaken by the current version."""
    opened = open_federation(draft, current.federation)
    if opened.federation.id == current.federation.id and opened.federation.version <= current.federation.version:
        return None
    if opened.federation.previous != current.sha256 or root.keyid not in opened.signed:
        raise ConfigError(
            "DRAFT_OTHER",
            "there is a draft here that this root did not make for this federation file",
            fix="read it, and sign it or remove it: fedcompose federation show --help",
        )
    return opened.federation


def enrol(envelope: bytes, enrolment: bytes, root: Signer, now: datetime) -> bytes:
    """The next version with the sender of `enrolment` in it. Raises: as `amend` and `add_member`."""
    request = read_enrolment(enrolment)
    return amend(envelope, lambda document: add_member(document, request, now), root, now)


def sign_draft(draft: bytes, accepted: OpenedFile | None, root: Signer, now: datetime) -> bytes:
    """The draft with one more root's signature.

    `accepted` is the version before, as this machine accepted it; None only for the first version.

    Raises: RefusedError: `FEDERATION_ROLLBACK`, `FEDERATION_FORK`, `FEDERATION_KEY_MOVED`, `FEDERATION_EXPIRED`, and
        all that `open_federation` raises. ConfigError: `FEDERATION_SIGNERS`.
    """
    older = accepted.federation if accepted else None
    opened = open_federation(draft, older)
    check_draft(opened, accepted)
    check_current(opened.federation, now)
    roots = root_ids(opened.federation) | (root_ids(older) if older else set())
    if root.keyid not in roots:
        raise ConfigError("FEDERATION_SIGNERS", "that key is not a root's", got=f"key {root.keyid}")
    return countersign_envelope(draft, FEDERATION_TYPE, root)


def check_draft(opened: OpenedFile, accepted: OpenedFile | None) -> None:
    """The draft directly follows the version that this machine accepted, or begins a federation.

    Raises: RefusedError: `FEDERATION_ROLLBACK`, `FEDERATION_FORK`, `FEDERATION_KEY_MOVED`, `FEDERATION_GAP` (versions
        are missing here).
    """
    version = opened.federation.version
    if accepted is not None:
        check_order(opened, pin_of(accepted))
        check_holders(opened.federation, accepted.federation)
    before = accepted.federation.version if accepted else 0
    if version not in (before, before + 1):
        raise RefusedError(
            "FEDERATION_GAP",
            f"what changes in version {version} cannot be said without version {version - 1}",
            got=f"version {before} accepted on this machine" if accepted else "no version accepted on this machine",
            fix="accept the versions before first: fedcompose federation accept --help",
        )


def missing_signatures(opened: OpenedFile, older: Federation | None) -> list[str]:
    """What a draft still needs, in words; nothing if it is complete."""
    newer, asked = opened.federation, []
    if older is not None and (older.threshold, root_ids(older)) != (newer.threshold, root_ids(newer)):
        asked.append((older, " of the roots until now"))
    missing = []
    for federation, whose in (*asked, (newer, " of the new roots" if asked else "")):
        lacking = federation.threshold - len(opened.signed & root_ids(federation))
        if lacking > 0:
            names = ", ".join(root.name for root in federation.roots if root.keyid not in opened.signed)
            missing.append(f"{lacking} more{whose}: {names}")
    return missing


def root_ids(federation: Federation) -> set[str]:
    return {root.keyid for root in federation.roots}


def _signed(document: Mapping[str, Any], root: Signer) -> tuple[bytes, Federation]:
    try:
        federation = Federation.model_validate(document)
    except ValidationError as error:
        reason = first_problem(error)
        raise ConfigError("FEDERATION_INPUT", "that would not be a valid federation file", got=reason) from error
    payload = dump_json(federation.model_dump(mode="json", by_alias=True))
    return sign_envelope(payload, FEDERATION_TYPE, [root]), federation


# --- what changes ---------------------------------------------------------------------------------


class Difference(NamedTuple):
    """One fact that is new (`+`), gone (`-`) or different (`~`), and what it says now, or said before it went."""

    mark: str
    what: str
    value: str


def differences(older: Federation | None, newer: Federation) -> list[Difference]:
    """Everything in which two versions differ, but for version number, date of issue and the link between them.

    A root that reads this reads all that it signs.
    """
    before, after = _facts(older) if older else {}, _facts(newer)
    found = [Difference("-", what, value) for what, value in before.items() if what not in after]
    for what, value in after.items():
        if what not in before:
            found.append(Difference("+", what, value))
        elif value != before[what]:
            found.append(Difference("~", what, f"{before[what]} → {value}"))
    return found


def _facts(federation: Federation) -> dict[str, str]:
    """Every field of a federation file, as what it is about and what it says."""
    facts = {
        "federation": federation.id,
        "name": federation.name,
        "good until": format_time(federation.expires),
        "roots that must sign": str(federation.threshold),
        "data-use policy": f"sha256 {federation.policy.sha256}" if federation.policy else "none",
    }
    facts |= {f"root {root.keyid}": root.name for root in federation.roots}
    facts |= {f"base {base.name}": f"dirHash {base.dir_hash}" for base in federation.base_models}
    for coordinator in federation.coordinators:
        facts[f"coordinator {coordinator.id}"] = "may call, compose and release"
    for site in federation.sites:
        may = " and ".join(site.may) or "nothing"
        facts[f"site {site.id}"] = f"domain {site.domain}, may send {may}, {site.status}"
        if site.node_key is not None:
            facts[f"connection of site {site.id}"] = f"node key {keyid_of(site.node_key.encode())}"
    members: list[Coordinator | Site] = [*federation.coordinators, *federation.sites]
    owners = holders(federation)
    for key in (key for member in members for key in member.keys):
        facts[f"key {key.keyid}"] = f"of {owners[key.keyid]}, {_validity(key)}"
    return facts


def _validity(key: Key) -> str:
    text = f"counts from {format_time(key.not_before)} until {format_time(key.not_after)}"
    if key.revoked is not None:
        text += f", revoked ({key.revoked.reason}) from {format_time(key.revoked.at)}"
    return text
