"""Attacks with keys that no longer count, or that may not do this, judged by the coordinator that receives."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from fedcompose import ledger
from fedcompose.document import format_time
from fedcompose.drafts import amend
from fedcompose.revocations import RevokedKey, next_revocations, no_revocations
from fedcompose.trust_state import accept_revocations, trusted_federation
from tests.attacks.attack import Cases, Contribution, Mutation


def site(change: Any) -> Mutation:
    """The root signs a version in which site-a is listed otherwise."""

    def mutate(attack: Contribution) -> None:
        sim = attack.sim
        sim.envelope = amend(
            sim.envelope,
            lambda document: change(next(each for each in document["sites"] if each["id"] == "site-a"), sim.now),
            sim.root,
            sim.now,
        )

    return mutate


def key(**changes: Any) -> Mutation:
    """... in which its key is: a time is given as a distance from now."""

    def change(listed: dict[str, Any], now: Any) -> None:
        times = {name: format_time(now + value) for name, value in changes.items()}
        listed["keys"][0].update(times)

    return site(change)


def revoked(reason: str, before: timedelta = timedelta(0)) -> Mutation:
    return site(
        lambda listed, now: listed["keys"][0].update(revoked={"at": format_time(now - before), "reason": reason})
    )


def listed(reason: Any) -> Mutation:
    """One root withdraws the key at once, by the revocation list, which this machine accepts."""

    def mutate(attack: Contribution) -> None:
        sim = attack.sim
        federation = trusted_federation(sim.envelope, [sim.root.keyid], sim.now)
        entry = RevokedKey(keyid=attack.signer.keyid, at=sim.now, reason=reason)
        accept_revocations(next_revocations(no_revocations(federation.id), [entry], [], sim.root, sim.now))

    return mutate


def swapped(attack: Contribution) -> None:
    """Two sites swap their keys: each signs what it says with the other's."""
    attack.sign(attack.sim.sites["site-b"].signer)


MEMBERS: Cases = {
    "key-expired": (key(not_before=-timedelta(days=9), not_after=-timedelta(days=1)), "KEY_EXPIRED"),
    "key-that-does-not-count-yet": (key(not_before=timedelta(days=1)), "KEY_EXPIRED"),
    "key-revoked-as-rotated": (revoked("rotated"), "KEY_REVOKED"),
    "key-revoked-as-compromised": (revoked("compromised"), "KEY_REVOKED"),
    "key-on-the-revocation-list": (listed("rotated"), "KEY_REVOKED"),
    "key-on-the-revocation-list-as-compromised": (listed("compromised"), "KEY_REVOKED"),
    "keys-of-two-sites-swapped": (swapped, "SITE_MISMATCH"),
    "key-revoked-long-ago": (revoked("compromised", timedelta(days=30)), "KEY_REVOKED"),
    "site-suspended": (site(lambda listed, now: listed.update(status="suspended")), "SITE_SUSPENDED"),
    "site-that-may-not": (site(lambda listed, now: listed.update(may=["traces"])), "NOT_PERMITTED"),
    "site-in-another-domain": (site(lambda listed, now: listed.update(domain="law")), "DOMAIN_MISMATCH"),
}


# --- what the coordinator remembers ---------------------------------------------------------------


def clock_set_back(attack: Contribution) -> None:
    """The coordinator has decided something; then its clock is set back by an hour."""
    attack.admit()
    attack.sim.now -= timedelta(hours=1)


def memory(change: Any) -> Mutation:
    """The coordinator has admitted this; then somebody changes what it wrote down, to have it admitted anew."""

    def mutate(attack: Contribution) -> None:
        attack.admit()
        change(attack.sim.coordinator_home)

    return mutate


def cut(home: Path) -> None:
    path = home / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def edited(home: Path) -> None:
    path = home / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b"site-a", b"site-b"))


def restored(attack: Contribution) -> None:
    """Ledger and state are restored from a copy; a call that went out in between knows better."""
    home = attack.sim.coordinator_home
    attack.admit()
    saved = {name: (home / name).read_bytes() for name in ("ledger.jsonl", "state.json")}
    assert attack.receive(attack.another()).outcome == "admitted"
    attack.call(ledger=ledger.head(home / "ledger.jsonl"))
    for name, data in saved.items():
        (home / name).write_bytes(data)


MEMORY: Cases = {
    "coordinator-clock-set-back": (clock_set_back, "CLOCK_SET_BACK"),
    "coordinator-ledger-cut": (memory(cut), "LEDGER_TRUNCATED"),
    "coordinator-ledger-removed": (memory(lambda home: (home / "ledger.jsonl").unlink()), "LEDGER_TRUNCATED"),
    "coordinator-ledger-edited": (memory(edited), "LEDGER_BROKEN"),
    "coordinator-restored-from-a-copy": (restored, "LEDGER_TRUNCATED"),
}
