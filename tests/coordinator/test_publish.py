from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from fedcompose import ledger
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.files import folder_digests, read_json, write_json
from fedcompose.revocations import RevokedKey, next_revocations, no_revocations
from fedcompose.trust_state import accept_revocations, trusted_federation
from fedcompose_coordinator import publish
from fedcompose_coordinator.decisions import CLOCK_TOLERANCE, Decisions
from fedcompose_coordinator.evaluation import make_parts
from tests.coordinator.test_intake import die, killed
from tests.federation_sim import FederationSim


def test_a_release_holds_what_the_sites_signed_byte_for_byte_and_no_traces(sim: FederationSim) -> None:
    release = sim.released()
    assert release.path == sim.coordinator_home / "release"
    assert [expert.site for expert in release.experts] == ["site-a", "site-b"]
    for expert in sim.experts():
        assert folder_digests(release.path / "ingredients" / expert.site) == folder_digests(expert.path)
    assert not list(release.path.rglob("traces.jsonl"))


def test_an_evaluation_goes_in_when_there_is_one_and_only_the_candidate_s_own(sim: FederationSim) -> None:
    sim.released()
    home, candidate = sim.coordinator_home, sim.coordinator_home / "candidate"
    evaluation = {"digests": {"composed": make_parts(candidate, ()).composed(candidate).digest}}
    write_json(home / "evaluation.json", evaluation)
    before = sim.release()
    assert before.evaluation == evaluation
    router = (candidate / "router.safetensors").read_bytes()
    others: tuple[tuple[bytes, Any], ...] = (
        (router[:-1] + bytes([router[-1] ^ 1]), evaluation),  # composed again, and not measured again
        (router, {"digests": {"composed": "0" * 64}}),
        (router, {"accuracy": {}}),
        (router, {"digests": []}),
        (router, []),
    )
    for weights, measured in others:
        (candidate / "router.safetensors").write_bytes(weights)
        write_json(home / "evaluation.json", measured)
        with pytest.raises(ConfigError) as error:
            sim.release()
        assert error.value.code == "EVALUATION_OTHER"
    assert folder_digests(home / "release")["provenance.json"] == before.digests["provenance.json"]


def test_nothing_is_released_from_other_experts_than_the_admitted_ones(sim: FederationSim) -> None:
    sim.released()
    before = folder_digests(sim.coordinator_home / "release")
    sim.contribute("site-a")
    sim.receive()
    with pytest.raises(ConfigError) as error:
        sim.release()
    assert error.value.code == "INGREDIENT_MISSING"
    assert folder_digests(sim.coordinator_home / "release") == before


def test_a_release_that_would_not_verify_does_not_appear(sim: FederationSim) -> None:
    for site in sim.sites:
        sim.contribute(site)
    sim.receive()
    candidate = sim.compose()
    (candidate / "router.safetensors").write_bytes(b"not weights")
    with pytest.raises(RefusedError) as refusal:
        sim.release()
    assert refusal.value.code == "SAFETENSORS_INVALID"
    assert not (sim.coordinator_home / "release").exists()


def test_only_a_coordinator_of_the_federation_releases(sim: FederationSim) -> None:
    sim.released()
    sim.coordinator = sim.sites["site-a"].signer
    with pytest.raises(RefusedError) as refusal:
        sim.release()
    assert refusal.value.code == "KEY_UNKNOWN"


def test_a_release_is_written_down_and_says_how_far_the_ledger_had_come(sim: FederationSim) -> None:
    release = sim.released()
    *before, released = ledger.verify(sim.coordinator_home / "ledger.jsonl")
    assert release.provenance.ledger == ledger.Head(entries=len(before), head=before[-1].sha256)
    assert (released.event, dict(released.fields)) == (
        "released",
        {
            "release": release.dir_hash,
            "composition": release.digests["composition.json"],
            "experts": [expert.dir_hash for expert in release.experts],
        },
    )


def test_a_release_cannot_be_made_with_the_clock_set_back(sim: FederationSim) -> None:
    release = sim.released()
    sim.now -= CLOCK_TOLERANCE + timedelta(seconds=1)
    with pytest.raises(RefusedError) as refusal:
        publish.release(
            sim.coordinator_home, sim.coordinator, sim.federation, sim.coordinator_home / "candidate",
            [replace(expert, received_on=sim.now) for expert in release.experts], sim.now,
        )  # fmt: skip
    assert refusal.value.code == "CLOCK_SET_BACK"


def test_after_a_crash_at_the_last_moment_releasing_again_goes_on(
    sim: FederationSim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line is there before the folder is: what nobody has seen may be in the ledger, but never the reverse."""
    first, record = sim.released(), Decisions.record

    def record_and_die(self: Decisions, event: str, **fields: Any) -> None:
        record(self, event, **fields)
        die()

    with monkeypatch.context() as crash:
        crash.setattr(Decisions, "record", record_and_die)
        killed(sim.release)
    assert folder_digests(first.path)["provenance.json"] == first.digests["provenance.json"]
    again = sim.release()
    entries = ledger.verify(sim.coordinator_home / "ledger.jsonl")
    releases = [entry.fields["release"] for entry in entries if entry.event == "released"]
    assert len(releases) == 3 and releases[0] == first.dir_hash and releases[2] == again.dir_hash


def test_an_accepted_revocation_list_does_not_stop_a_release_of_others(
    sim: FederationSim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list changes the federation that is in use; the file that goes into the release is as it was signed."""
    trusted_federation(sim.envelope, [sim.root.keyid], sim.now)
    for site in sim.sites:
        sim.contribute(site)
    sim.receive()
    key = RevokedKey(keyid=sim.sites["site-a"].signer.keyid, at=sim.now, reason="compromised")
    accept_revocations(next_revocations(no_revocations(sim.federation.id), [key], [], sim.root, sim.now))
    monkeypatch.setattr(FederationSim, "federation", trusted_federation(sim.envelope, None, sim.now))
    sim.compose()
    assert [expert.site for expert in sim.release().experts] == ["site-b"]


def test_the_same_inputs_at_the_same_time_give_the_same_release_but_for_its_place_in_the_ledger(
    sim: FederationSim,
) -> None:
    first, again = sim.released(), sim.release()
    differ = {name for name, digest in first.digests.items() if again.digests[name] != digest}
    assert differ == {"provenance.json"}


def test_a_merge_is_not_released(sim: FederationSim) -> None:
    sim.released()
    candidate = sim.coordinator_home / "candidate"
    write_json(candidate / "composition.json", {**read_json(candidate / "composition.json"), "router": None})
    with pytest.raises(ConfigError) as error:
        sim.release()
    assert error.value.code == "CANDIDATE_NO_ROUTER"
