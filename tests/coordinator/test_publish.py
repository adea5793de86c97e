from __future__ import annotations

from datetime import timedelta

import pytest

from fedcompose.errors import ConfigError, RefusedError
from fedcompose.files import folder_digests, read_json, write_json
from tests.federation_sim import FederationSim


def test_a_release_holds_what_the_sites_signed_byte_for_byte_and_no_traces(sim: FederationSim) -> None:
    release = sim.released()
    assert release.path == sim.coordinator_home / "release"
    assert [expert.site for expert in release.experts] == ["site-a", "site-b"]
    for expert in sim.experts():
        assert folder_digests(release.path / "ingredients" / expert.site) == folder_digests(expert.path)
    assert not list(release.path.rglob("traces.jsonl"))


def test_an_evaluation_goes_in_when_there_is_one(sim: FederationSim) -> None:
    write_json(sim.coordinator_home / "evaluation.json", {"accuracy": {"composed": {"clock": 0.9}}})
    release = sim.released()
    assert release.evaluation == {"accuracy": {"composed": {"clock": 0.9}}}


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


def test_the_same_inputs_at_the_same_time_give_the_same_release(sim: FederationSim) -> None:
    first = sim.released()
    again = sim.release()
    sim.now += timedelta(seconds=1)
    assert first.dir_hash == again.dir_hash != sim.release().dir_hash


def test_a_merge_is_not_released(sim: FederationSim) -> None:
    sim.released()
    candidate = sim.coordinator_home / "candidate"
    write_json(candidate / "composition.json", {**read_json(candidate / "composition.json"), "router": None})
    with pytest.raises(ConfigError) as error:
        sim.release()
    assert error.value.code == "CANDIDATE_NO_ROUTER"
