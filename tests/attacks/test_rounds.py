"""Rounds, rotation, revocation, suspension, replay and wrong clocks in any order, against a model of a few lines.

The machine makes real keys, real signed contributions and real versions of a federation file, and hands them to a real
intake. The model says what must come of each; hypothesis looks for an order in which it does not.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    multiple,
    rule,
    run_state_machine_as_test,
)

from fedcompose.amendments import add_member, replace_key, set_status
from fedcompose.document import format_time
from fedcompose.drafts import amend
from fedcompose.errors import RefusedError
from fedcompose.federation import Federation
from fedcompose.files import dir_hash, folder_digests
from fedcompose.keys import load_signer, new_key, read_enrolment
from fedcompose.revocations import RevokedKey, next_revocations
from fedcompose.signing import Signer
from fedcompose.trust_state import (
    accept_revocations,
    accepted_federation,
    accepted_revocations,
    trusted_federation,
)
from fedcompose_client.contribute import contribute
from fedcompose_coordinator import intake
from tests.attacks.attack import Folder
from tests.attacks.every_byte import small_experts
from tests.federation_sim import SITES, FederationSim, make_federation

SITE = st.sampled_from(sorted(SITES))
REASON = st.sampled_from(["rotated", "compromised"])
HOURS = st.sampled_from([1, 30, 24 * 20])


@dataclass(frozen=True)
class Made:
    """A contribution as it left a site, or as somebody signed it anew."""

    folder: Path
    site: str
    signer: str  # the site whose key signed, and the key
    keyid: str
    sequence: int
    expires: datetime
    digest: str


class Rounds(RuleBasedStateMachine):
    """What has happened, as simply as it can be told: keys, revocations, suspensions, and what was received when."""

    made: Bundle[Made] = Bundle("made")

    def __init__(self, base: Path, experts: dict[str, Path]) -> None:
        super().__init__()
        self.folder = Path(mkdtemp())
        os.environ["FEDCOMPOSE_HOME"] = str(self.folder / "home")
        self.sim: FederationSim = make_federation(self.folder / "federation", base, experts)
        self.id = self.sim.federation.id
        self.versions = [self.sim.envelope]
        self.expires = self.sim.federation.expires
        self.keys: dict[str, list[Signer]] = {site: [each.signer] for site, each in self.sim.sites.items()}
        self.revoked: dict[str, datetime] = {}  # by key, the earliest time that was ever said
        self.suspended: set[str] = set()
        self.received: dict[str, tuple[Made, datetime]] = {}
        self.latest: datetime | None = None  # when the coordinator decided last
        trusted_federation(self.sim.envelope, [self.sim.root.keyid], self.now)

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def now(self) -> datetime:
        return self.sim.now

    # --- the model --------------------------------------------------------------------------------

    def counts(self, keyid: str, at: datetime) -> bool:
        return keyid not in self.revoked or at < self.revoked[keyid]

    def expected(self, one: Made) -> str:
        """What must come of a contribution that arrives now."""
        if self.now >= self.expires:
            return "FEDERATION_EXPIRED"
        if one.signer in self.suspended:
            return "SITE_SUSPENDED"
        if not self.counts(one.keyid, self.now):
            return "KEY_REVOKED"
        if one.signer != one.site:
            return "SITE_MISMATCH"
        if self.now >= one.expires:
            return "CONTRIBUTION_EXPIRED"
        if one.digest in self.received:
            return "already admitted"
        last = max((each.sequence for each, _ in self.received.values() if each.site == one.site), default=0)
        return "admitted" if one.sequence > last else "REPLAYED"

    def left(self) -> dict[str, str]:
        """What may be composed now: of each site the newest, if its key still counts for the time it was received."""
        newest: dict[str, tuple[Made, datetime]] = {}
        for one, at in self.received.values():
            if one.site not in newest or newest[one.site][0].sequence < one.sequence:
                newest[one.site] = (one, at)
        return {
            site: one.digest
            for site, (one, at) in newest.items()
            if site not in self.suspended and self.counts(one.keyid, at)
        }

    # --- what sites do ----------------------------------------------------------------------------

    @initialize(target=made)
    def begin(self) -> Any:
        """Two rounds of each site lie there; none has been received."""
        return multiple(*(one for site in (*SITES, *SITES) if (one := self.sign(site))))

    @rule(target=made, site=SITE)
    def contributes(self, site: str) -> Any:
        return self.sign(site) or multiple()

    def sign(self, site: str) -> Made | None:
        """A site signs with its newest key, if it still has one that counts."""
        signer = self.keys[site][-1]
        if self.now >= self.expires or site in self.suspended or not self.counts(signer.keyid, self.now):
            return None
        there = self.sim.sites[site]
        (found,) = contribute(there.folder, there.domain, signer, self.federation(), self.now, base=self.sim.base)
        copy = self.new_folder()
        shutil.copytree(found.path, copy)
        claims = found.provenance
        return Made(copy, site, site, signer.keyid, claims.sequence, claims.expires, found.dir_hash)

    def new_folder(self) -> Path:
        return self.folder / "sent" / f"{len(list(self.folder.glob('sent/*')))}" / "adapter"

    @rule(target=made, one=made, thief=SITE)
    def is_signed_by_another(self, one: Made, thief: str) -> Made:
        """Another site signs what this one claims; or a site signs its own claims anew, with its newest key."""
        copy = self.new_folder()
        shutil.copytree(one.folder, copy)
        signer = self.keys[thief][-1]
        Folder(self.sim, copy, signer).sign_only()
        digests = folder_digests(copy)
        del digests["model.sig"]
        return Made(copy, one.site, thief, signer.keyid, one.sequence, one.expires, dir_hash(digests))

    # --- what the coordinator does ----------------------------------------------------------------

    def federation(self) -> Federation:
        return trusted_federation(self.versions[-1], None, self.now)

    def receive(self, one: Made) -> str:
        try:
            (receipt,) = intake.receive(
                [one.folder], self.sim.coordinator_home, self.federation(), self.sim.base, self.now
            )
        except RefusedError as error:
            return error.code
        return receipt.refusal.code if receipt.refusal else receipt.outcome

    @rule(one=made)
    def receives(self, one: Made) -> None:
        expected = self.expected(one)
        assert self.receive(one) == expected
        if expected == "admitted":
            self.received[one.digest] = (one, self.now)
        if expected != "FEDERATION_EXPIRED":
            self.latest = self.now
        stored = {path.name for path in self.sim.coordinator_home.glob("store/*")}
        assert stored == self.received.keys()

    @rule()
    def looks_at_what_it_has(self) -> None:
        known = accepted_federation(self.id)
        assert known is not None
        found = intake.admitted(self.sim.coordinator_home, known)
        assert {each.site: each.dir_hash for each in found} == self.left()

    @rule(one=made, back=st.sampled_from([timedelta(0), timedelta(hours=1), timedelta(days=3), timedelta(days=30)]))
    def is_deceived(self, one: Made, back: timedelta) -> None:
        """By an old version of the federation file, or by its own clock."""
        if back and self.latest is not None:
            self.has_its_clock_set_back(one, self.latest - back)
        for older in self.versions[:-1]:
            with pytest.raises(RefusedError) as caught:
                trusted_federation(older, [self.sim.root.keyid], self.now)
            assert caught.value.code == "FEDERATION_ROLLBACK"

    def has_its_clock_set_back(self, one: Made, to: datetime) -> None:
        now, self.sim.now = self.now, to
        try:
            assert self.receive(one) in ("CLOCK_BEHIND", "CLOCK_SET_BACK", "FEDERATION_EXPIRED")
        finally:
            self.sim.now = now

    # --- what the roots do ------------------------------------------------------------------------

    def amend(self, change: Callable[[dict[str, Any]], None]) -> None:
        """The next version, which every machine gets."""
        self.versions.append(amend(self.versions[-1], change, self.sim.root, self.now))
        self.expires = self.federation().expires

    @rule(decision=st.sampled_from(["renew", "rotate", "withdraw", "enrol_anew", "suspend"]), site=SITE, reason=REASON)
    def decide(self, decision: str, site: str, reason: Any) -> None:
        """One rule for all, so that what is received stays the most frequent event."""
        if decision == "renew":
            self.amend(lambda document: None)
        elif decision == "rotate":
            self.rotate(site, 24 if reason == "rotated" else 0)
        elif decision == "withdraw":
            self.withdraw(site, reason)
        elif decision == "enrol_anew":
            self.enrol_anew(site)
        else:
            self.suspend_or_reinstate(site)

    def rotate(self, site: str, hours: int) -> None:
        """A site's new key takes over; the old one counts a little longer."""
        old = self.keys[site][-1]
        if not self.counts(old.keyid, self.now) or old.keyid in self.revoked:
            return
        there = self.sim.sites[site]
        made = new_key(there.folder / "keys", site, "site", there.domain, None, old)
        overlap = timedelta(hours=hours)
        self.amend(lambda document: replace_key(document, made.enrolment.read_bytes(), self.now, overlap))
        self.keys[site].append(load_signer(made.private))
        self.revoked[old.keyid] = self.now + overlap

    def withdraw(self, site: str, reason: Any) -> None:
        """One root puts a key on the revocation list."""
        key = self.keys[site][-1]
        if key.keyid in self.revoked:
            return
        self.amend(lambda document: None)
        older = accepted_revocations(self.id)
        entry = RevokedKey(keyid=key.keyid, at=self.now, reason=reason)
        accept_revocations(next_revocations(older, [entry], [], self.sim.root, self.now))
        self.revoked[key.keyid] = self.now

    def enrol_anew(self, site: str) -> None:
        """A site that lost its last key comes with a new one."""
        if any(self.counts(key.keyid, self.now) for key in self.keys[site]):
            return
        there = self.sim.sites[site]
        made = new_key(there.folder / f"keys-{len(self.keys[site])}", site, "site", there.domain, None)
        request = read_enrolment(made.enrolment.read_bytes())

        def change(document: dict[str, Any]) -> None:
            listed = next(each for each in document["sites"] if each["id"] == site)
            for key in listed["keys"]:  # what the list alone withdrew is withdrawn in the file as well
                if key["revoked"] is None:
                    key["revoked"] = {"at": format_time(self.revoked[key["keyid"]]), "reason": "compromised"}
            add_member(document, request, self.now)

        self.amend(change)
        self.keys[site].append(load_signer(made.private))

    def suspend_or_reinstate(self, site: str) -> None:
        status = "active" if site in self.suspended else "suspended"
        self.amend(lambda document: set_status(document, site, status))
        self.suspended ^= {site}

    @rule(hours=HOURS)
    def time_goes_by(self, hours: int) -> None:
        self.sim.now += timedelta(hours=hours)


@pytest.mark.parametrize(
    ("examples", "steps"), [(12, 25), pytest.param(150, 50, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_any_order_of_events(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples: int, steps: int
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setenv("FEDCOMPOSE_HOME", str(tmp_path))
    experts = small_experts(tmp_path)
    for site in SITES:
        experts[site] = experts["site-a"]
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(lambda: Rounds(tiny_base, experts), settings=chosen)
