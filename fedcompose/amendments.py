"""The changes that roots make to a federation file: members, keys, roots, bases, the data-use policy.

Each function edits the JSON document of the next version, which `drafts.amend` then checks as a whole and signs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from fedcompose.document import format_time
from fedcompose.errors import ConfigError
from fedcompose.federation import Coordinator, Federation, Key, Revocation, Site, worse_of
from fedcompose.keys import Enrolment, check_handed_over, read_enrolment
from fedcompose.signing import keyid_of

KEY_VALIDITY = timedelta(days=365)
OVERLAP = timedelta(days=14)  # how long an old key counts beside the new one


def add_member(
    document: dict[str, Any], enrolment: Enrolment, now: datetime, validity: timedelta = KEY_VALIDITY
) -> None:
    """List a site or a coordinator; or, for one that has no key left that counts, its new key.

    Raises: ConfigError: `ENROLMENT_ROLE`, `ENROLMENT_REPLACES`, `FEDERATION_INPUT`.
    """
    if enrolment.role == "root":
        raise ConfigError("ENROLMENT_ROLE", "a root is not enrolled", fix="fedcompose federation roots --add FILE")
    if enrolment.replaces is not None:
        raise ConfigError(
            "ENROLMENT_REPLACES", "this new key takes over from an older one", fix="fedcompose federation rotate FILE"
        )
    key = _key_entry(enrolment, now, validity)
    known = _member(document, enrolment)
    if known is not None:
        if any(_counts(Key.model_validate(each), now) for each in known["keys"]):
            raise ConfigError(
                "FEDERATION_INPUT",
                f"{enrolment.role} {enrolment.id} is in the federation already, with a key that counts",
                fix="for a new key beside it: fedcompose keys rotate; if the old key is lost: "
                "fedcompose federation revoke first",
            )
        known["keys"].append(key)
        if enrolment.node_key is not None:
            known["node_key"] = enrolment.node_key
    elif enrolment.role == "site":
        site = {"id": enrolment.id, "domain": enrolment.domain, "status": "active", "may": ["adapter", "traces"]}
        document["sites"].append(site | {"keys": [key], "node_key": enrolment.node_key})
    else:
        document["coordinators"].append({"id": enrolment.id, "keys": [key]})


def replace_key(document: dict[str, Any], envelope: bytes, now: datetime, overlap: timedelta = OVERLAP) -> None:
    """Take over the new key of an enrolment that the old key signed as well.

    A member's old key counts until `overlap` has passed, and is then revoked as rotated. A root's is replaced at once:
    both sign this version. So is a site's node key, if the enrolment has one: it signs nothing that should last.

    Raises: RefusedError: `ENVELOPE_KEY` when one of the two did not sign. ConfigError: `ENROLMENT_REPLACES`.
    """
    enrolment = read_enrolment(envelope)
    if enrolment.replaces is None:
        raise ConfigError(
            "ENROLMENT_REPLACES",
            "this enrolment does not take over from an older key",
            fix="make one with `fedcompose keys rotate`, or enrol a new member with `fedcompose federation enroll`",
        )
    member = None if enrolment.role == "root" else _member(document, enrolment)
    listed = document["roots"] if enrolment.role == "root" else member["keys"] if member else []
    old = next((entry for entry in listed if entry["keyid"] == enrolment.replaces), None)
    if old is None:
        raise ConfigError(
            "ENROLMENT_REPLACES",
            f"{enrolment.role} {enrolment.id} of this federation does not have the key that is to be replaced",
            got=f"key {enrolment.replaces}",
        )
    check_handed_over(envelope, old["public_key"].encode())
    if enrolment.role == "root":
        old |= root_entry(old["name"], enrolment.public_key)
        return
    if not _counts(Key.model_validate(old), now):
        raise ConfigError(
            "ENROLMENT_REPLACES",
            "the key that is to be replaced no longer counts",
            fix="have the new key enrolled like a first one: fedcompose keys new, fedcompose federation enroll",
        )
    _revoke(old, Revocation(at=now + overlap, reason="rotated"))
    listed.append(_key_entry(enrolment, now, KEY_VALIDITY))
    if member is not None and enrolment.node_key is not None:
        member["node_key"] = enrolment.node_key


def revoke_keys(document: dict[str, Any], keyids: Iterable[str], revocation: Revocation) -> None:
    """Stop believing keys of members from a time on.

    Raises: ConfigError: `FEDERATION_INPUT` (no such key; revoked at least as strictly already).
    """
    entries = {key["keyid"]: key for member in _members(document) for key in member["keys"]}
    for keyid in keyids:
        if keyid not in entries:
            raise ConfigError("FEDERATION_INPUT", "no site or coordinator has this key", got=f"key {keyid}")
        _revoke(entries[keyid], revocation)


def set_status(document: dict[str, Any], site_id: str, status: str) -> None:
    """Suspend a site, or reinstate it.

    Raises: ConfigError: `FEDERATION_INPUT`.
    """
    sites = [site for site in document["sites"] if site["id"] == site_id]
    if not sites:
        raise ConfigError("FEDERATION_INPUT", f"the federation has no site {site_id!a}")
    if sites[0]["status"] == status:
        raise ConfigError("FEDERATION_INPUT", f"site {site_id} is {status} already")
    sites[0]["status"] = status


def change_roots(
    document: dict[str, Any],
    *,
    add: Iterable[Enrolment] = (),
    remove: Sequence[str] = (),
    threshold: int | None = None,
) -> None:
    """Add roots by their enrolments, remove roots by name or fingerprint, and set how many must sign.

    Raises: ConfigError: `ENROLMENT_ROLE`, `FEDERATION_INPUT`.
    """
    for name in remove:
        found = [root for root in document["roots"] if name in (root["name"], root["keyid"])]
        if len(found) != 1:
            raise ConfigError("FEDERATION_INPUT", f"not one root, but {len(found)}, go by {name!a}")
        document["roots"].remove(found[0])
    for enrolment in add:
        if enrolment.role != "root":
            raise ConfigError("ENROLMENT_ROLE", f"{enrolment.id} asks to be a {enrolment.role}, not a root")
        document["roots"].append(root_entry(enrolment.id, enrolment.public_key))
    if threshold is not None:
        document["threshold"] = threshold


def change_bases(document: dict[str, Any], *, add: Mapping[str, str], remove: Sequence[str] = ()) -> None:
    """Add base models by name and dirHash, and remove them by name.

    Raises: ConfigError: `FEDERATION_INPUT`.
    """
    for name in remove:
        found = [base for base in document["base_models"] if base["name"] == name]
        if not found:
            raise ConfigError("FEDERATION_INPUT", f"the federation has no base {name!a}")
        document["base_models"].remove(found[0])
    document["base_models"] += [{"name": name, "dirHash": digest} for name, digest in add.items()]


def set_policy(document: dict[str, Any], sha256: str) -> None:
    """Bind the federation to the data-use policy with this digest."""
    document["policy"] = {"sha256": sha256}


def leave(document: dict[str, Any]) -> None:
    """Change nothing: a version that only expires later."""


def keys_of(federation: Federation, target: str, revocation: Revocation) -> list[str]:
    """The keys that somebody means who withdraws trust from a fingerprint, or from a member by its id.

    Of a member those of which `revocation` says more than is known. Roots' keys are not among them: `change_roots`.

    Raises: ConfigError: `FEDERATION_INPUT`.
    """
    members: list[Coordinator | Site] = [*federation.coordinators, *federation.sites]
    if any(key.keyid == target for member in members for key in member.keys):
        return [target]
    named = [member for member in members if member.id == target]
    if not named and any(target in (root.keyid, root.name) for root in federation.roots):
        raise ConfigError(
            "FEDERATION_INPUT",
            "a root's key is not revoked but removed, by enough of the roots",
            fix="fedcompose federation roots --remove ROOT",
        )
    keys = [key for member in named for key in member.keys]
    found = [key.keyid for key in keys if key.revoked is None or worse_of(revocation, key.revoked) != key.revoked]
    if len(named) != 1 or not found:
        raise ConfigError(
            "FEDERATION_INPUT",
            f"there is nothing to revoke under {target[:64]!a}",
            expected="the fingerprint of a member's key, or the id of a member with a key that still counts",
            got=f"{len(named)} members of this id",
        )
    return found


def _revoke(key: dict[str, Any], revocation: Revocation) -> None:
    known = Key.model_validate(key).revoked
    both = worse_of(revocation, known) if known else revocation
    if both == known:
        raise ConfigError(
            "FEDERATION_INPUT",
            "that would say nothing more than the federation file says already",
            expected=f"compromised, or a time before {format_time(known.at)}",
            got=f"key {key['keyid']}, revoked as {known.reason}",
        )
    key["revoked"] = both.model_dump(mode="json")


def _members(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield from document["coordinators"]
    yield from document["sites"]


def _member(document: Mapping[str, Any], enrolment: Enrolment) -> dict[str, Any] | None:
    """The member that the enrolment speaks of; a site with another domain is another site.

    Raises: ConfigError: `FEDERATION_INPUT`.
    """
    members = document["sites"] if enrolment.role == "site" else document["coordinators"]
    for member in members:
        if member["id"] == enrolment.id:
            if member.get("domain") != enrolment.domain:
                raise ConfigError(
                    "FEDERATION_INPUT",
                    f"site {enrolment.id} is enrolled for another domain",
                    expected=member.get("domain"),
                    got=enrolment.domain,
                )
            found: dict[str, Any] = member
            return found
    return None


def _counts(key: Key, now: datetime) -> bool:
    return now < key.not_after and (key.revoked is None or now < key.revoked.at)


def root_entry(name: str, public_key: str) -> dict[str, str]:
    return {"keyid": keyid_of(public_key.encode()), "name": name, "public_key": public_key}


def _key_entry(enrolment: Enrolment, now: datetime, validity: timedelta) -> dict[str, Any]:
    """The key counts from the start of the day, so that clocks may differ a little."""
    start = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return {
        "keyid": keyid_of(enrolment.public_key.encode()),
        "public_key": enrolment.public_key,
        "not_before": format_time(start),
        "not_after": format_time(start + validity),
        "revoked": None,
    }
