from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from fedcompose import ledger
from fedcompose.errors import ConfigError, FedcomposeError, RefusedError
from fedcompose.files import dump_json
from fedcompose.keys import load_signer, new_key
from fedcompose.signing import Signer, read_envelope_unverified, sign_envelope
from fedcompose_coordinator import approvals, intake
from fedcompose_coordinator.approvals import APPROVAL_TYPE, Rule, read_rule
from fedcompose_coordinator.decisions import Decisions
from fedcompose_coordinator.intake import Receipt
from tests.coordinator.test_intake import die_before, killed
from tests.federation_sim import FederationSim

PEOPLE = ("alice", "bob", "carol")


@pytest.fixture
def people(sim: FederationSim) -> dict[str, Signer]:
    """Three approvers, of whom the coordinator asks two."""
    keys = sim.coordinator_home / "approvers"
    signers = {name: load_signer(new_key(keys, name, "coordinator", None, None).private) for name in PEOPLE}
    sim.rule = read_rule(sim.coordinator_home, 2, {name: Path(f"approvers/{name}.pub") for name in PEOPLE})
    return signers


@pytest.fixture
def digest(sim: FederationSim, people: dict[str, Signer]) -> str:
    """An adapter that waits."""
    adapter, _ = sim.contribute("site-a")
    receipt = sim.receive(adapter.path)[0]
    assert (receipt.outcome, receipt.refusal) == ("waiting", None)
    return adapter.dir_hash


def approve(sim: FederationSim, digest: str, name: str, signer: Signer) -> Receipt:
    return intake.approve(sim.coordinator_home, sim.federation, digest, name, signer, sim.rule, sim.now)


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(FedcomposeError) as caught:
        action()
    return caught.value.code


def test_two_people_admit_what_one_cannot(
    sim: FederationSim, people: dict[str, Signer], digest: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert sim.admitted() == []
    assert f"waits to be admitted: {digest}" in caplog.text
    assert approve(sim, digest, "alice", people["alice"]).outcome == "waiting"
    assert sim.admitted() == []
    assert approve(sim, digest, "bob", people["bob"]).outcome == "admitted"
    assert [each.dir_hash for each in sim.admitted()] == [digest]
    events = [(entry.event, entry.fields.get("by")) for entry in ledger.verify(sim.coordinator_home / "ledger.jsonl")]
    assert events == [("received", None), ("approved", "alice"), ("approved", "bob"), ("admitted", None)]


def test_without_the_rule_nothing_waits(sim: FederationSim) -> None:
    assert sim.receive(sim.contribute("site-a")[0].path)[0].outcome == "admitted"


def test_the_ledger_names_who_approved_with_which_key_what(
    sim: FederationSim, people: dict[str, Signer], digest: str
) -> None:
    approve(sim, digest, "alice", people["alice"])
    entry = ledger.verify(sim.coordinator_home / "ledger.jsonl")[-1]
    assert (entry.fields["key"], entry.fields["contribution"]) == (people["alice"].keyid, digest)
    kept = (sim.coordinator_home / "approvals" / digest / "alice.json").read_bytes()
    approval = json.loads(read_envelope_unverified(kept, APPROVAL_TYPE))
    assert (approval["by"], approval["contribution"], approval["federation"]) == ("alice", digest, sim.federation.id)


def test_one_person_approving_twice_is_one_approval(sim: FederationSim, people: dict[str, Signer], digest: str) -> None:
    for _ in range(2):
        assert approve(sim, digest, "alice", people["alice"]).outcome == "waiting"
    assert len(ledger.verify(sim.coordinator_home / "ledger.jsonl")) == 2


def test_one_key_under_two_names_is_no_rule(sim: FederationSim, people: dict[str, Signer]) -> None:
    twice = {"alice": Path("approvers/alice.pub"), "also-alice": Path("approvers/alice.pub")}
    assert refused(lambda: read_rule(sim.coordinator_home, 2, twice)) == "APPROVERS_INVALID"


def test_more_approvals_than_people_is_no_rule(sim: FederationSim, people: dict[str, Signer]) -> None:
    assert refused(lambda: read_rule(sim.coordinator_home, 1, {})) == "APPROVERS_INVALID"
    assert read_rule(sim.coordinator_home, 0, {}) == Rule()


@pytest.mark.parametrize(
    ("name", "signer", "code"),
    [
        ("alice", "bob", "APPROVER_KEY"),
        ("mallory", "bob", "APPROVER_UNKNOWN"),
        ("../alice", "alice", "APPROVER_UNKNOWN"),
        ("alice", "coordinator", "APPROVER_KEY"),
        ("alice", "site-a", "APPROVER_KEY"),
    ],
)
def test_only_an_approver_approves_with_the_own_key(
    sim: FederationSim, people: dict[str, Signer], digest: str, name: str, signer: str, code: str
) -> None:
    keys = people | {"coordinator": sim.coordinator, "site-a": sim.sites["site-a"].signer}
    before = (sim.coordinator_home / "ledger.jsonl").read_bytes()
    assert refused(lambda: approve(sim, digest, name, keys[signer])) == code
    assert not (sim.coordinator_home / "approvals").exists()
    assert (sim.coordinator_home / "ledger.jsonl").read_bytes() == before


@pytest.mark.parametrize("digest_of", [lambda d: d[:7], lambda d: "0" * 64, lambda d: "", lambda d: d.upper()])
def test_what_is_approved_waits_under_that_digest(
    sim: FederationSim, people: dict[str, Signer], digest: str, digest_of: Callable[[str], str]
) -> None:
    assert refused(lambda: approve(sim, digest_of(digest), "alice", people["alice"])) == "APPROVAL_NOT_WAITING"
    assert approve(sim, digest[:8], "alice", people["alice"]).outcome == "waiting"


def test_what_is_admitted_waits_no_more(sim: FederationSim, people: dict[str, Signer], digest: str) -> None:
    for name in ("alice", "bob"):
        approve(sim, digest, name, people[name])
    assert refused(lambda: approve(sim, digest, "carol", people["carol"])) == "APPROVAL_NOT_WAITING"


def resigned(sim: FederationSim, digest: str, signer: Signer, **changes: str) -> None:
    """Alice's approval with other words in it, signed by whom it may be."""
    path = sim.coordinator_home / "approvals" / digest / "alice.json"
    document = json.loads(read_envelope_unverified(path.read_bytes(), APPROVAL_TYPE)) | changes
    path.write_bytes(sign_envelope(dump_json(document), APPROVAL_TYPE, [signer]))


TAMPERING: dict[str, Callable[[FederationSim, dict[str, Signer], str], object]] = {
    "removed": lambda sim, people, digest: (sim.coordinator_home / "approvals" / digest / "alice.json").unlink(),
    "emptied": lambda sim, people, digest: (sim.coordinator_home / "approvals" / digest / "alice.json").write_bytes(
        b""
    ),
    "signed by another": lambda sim, people, digest: resigned(sim, digest, people["carol"]),
    "of another contribution": lambda sim, people, digest: resigned(
        sim, digest, people["alice"], contribution="0" * 64
    ),
    "of another federation": lambda sim, people, digest: resigned(
        sim, digest, people["alice"], federation="urn:uuid:00000000-0000-4000-8000-000000000009"
    ),
    "of another time": lambda sim, people, digest: resigned(sim, digest, people["alice"], at="2026-01-01T00:00:00Z"),
    "in another's name": lambda sim, people, digest: resigned(sim, digest, people["alice"], by="bob"),
}


@pytest.mark.parametrize("name", TAMPERING)
def test_an_altered_approval_does_not_count_and_can_be_given_again(
    sim: FederationSim, people: dict[str, Signer], digest: str, name: str
) -> None:
    approve(sim, digest, "alice", people["alice"])
    TAMPERING[name](sim, people, digest)
    assert approve(sim, digest, "bob", people["bob"]).outcome == "waiting"
    assert approve(sim, digest, "alice", people["alice"]).outcome == "admitted"


def test_an_approval_that_the_ledger_does_not_know_does_not_count(
    sim: FederationSim, people: dict[str, Signer], digest: str
) -> None:
    """A key that somebody used elsewhere is not enough: the approval must have been given here."""
    approvals.approve(sim.coordinator_home, sim.rule, sim.federation.id, digest, "alice", people["alice"], sim.now)
    assert approve(sim, digest, "bob", people["bob"]).outcome == "waiting"


def test_an_approver_who_was_taken_off_the_list_does_not_count(
    sim: FederationSim, people: dict[str, Signer], digest: str
) -> None:
    approve(sim, digest, "alice", people["alice"])
    sim.rule = Rule(2, {name: pem for name, pem in sim.rule.keys.items() if name != "alice"})
    assert approve(sim, digest, "bob", people["bob"]).outcome == "waiting"
    assert approve(sim, digest, "carol", people["carol"]).outcome == "admitted"


def test_what_waits_is_verified_once_more_before_it_is_approved(
    sim: FederationSim, people: dict[str, Signer], digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = sim.federation
    suspended = tuple(site.model_copy(update={"status": "suspended"}) for site in federation.sites)
    with monkeypatch.context() as patch:
        patch.setattr(FederationSim, "federation", federation.model_copy(update={"sites": suspended}))
        assert refused(lambda: approve(sim, digest, "alice", people["alice"])) == "SITE_SUSPENDED"
    path = sim.coordinator_home / "store" / digest / "adapter_config.json"
    path.chmod(0o600)
    path.write_bytes(b"{}")
    assert refused(lambda: approve(sim, digest, "alice", people["alice"])) == "FILE_CHANGED"


def test_the_time_of_receiving_counts_and_not_that_of_approving(
    sim: FederationSim, people: dict[str, Signer], digest: str
) -> None:
    received_on = sim.now
    sim.now += timedelta(days=60)  # by then the contribution itself has expired
    for name in ("alice", "bob"):
        approve(sim, digest, name, people[name])
    assert [each.received_on for each in sim.admitted()] == [received_on]


def test_what_waits_is_not_received_again_and_counts_for_order(
    sim: FederationSim, people: dict[str, Signer], digest: str, tmp_path: Path
) -> None:
    shutil.copytree(sim.sites["site-a"].outbox / "adapter", tmp_path / "first")
    newer, _ = sim.contribute("site-a")
    assert sim.receive(newer.path)[0].outcome == "waiting"
    assert sim.receive(tmp_path / "first")[0].outcome == "waiting"
    for name in ("alice", "bob"):
        approve(sim, newer.dir_hash, name, people[name])
        approve(sim, digest, name, people[name])
    assert [each.dir_hash for each in sim.admitted()] == [newer.dir_hash]


@pytest.mark.parametrize("event", ["approved", "admitted"])
def test_after_a_crash_approving_again_goes_on(
    sim: FederationSim, people: dict[str, Signer], digest: str, event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    approve(sim, digest, "alice", people["alice"])
    with monkeypatch.context() as crash:
        crash.setattr(Decisions, "record", die_before(event))
        killed(lambda: approve(sim, digest, "bob", people["bob"]))
    assert sim.admitted() == []
    assert approve(sim, digest, "bob", people["bob"]).outcome == "admitted"
    events = [entry.event for entry in ledger.verify(sim.coordinator_home / "ledger.jsonl")]
    assert events == ["received", "approved", "approved", "admitted"]


def test_after_that_crash_receiving_again_goes_on_as_well(
    sim: FederationSim, people: dict[str, Signer], digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    approve(sim, digest, "alice", people["alice"])
    with monkeypatch.context() as crash:
        crash.setattr(Decisions, "record", die_before("admitted"))
        killed(lambda: approve(sim, digest, "bob", people["bob"]))
    assert sim.receive(sim.sites["site-a"].outbox / "adapter")[0].outcome == "admitted"


def test_errors_are_of_the_right_kind(sim: FederationSim, people: dict[str, Signer], digest: str) -> None:
    with pytest.raises(ConfigError):
        approve(sim, digest, "mallory", people["alice"])
    with pytest.raises(RefusedError):
        approve(sim, digest, "alice", people["bob"])
