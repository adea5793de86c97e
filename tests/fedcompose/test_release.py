from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path

import pytest

from fedcompose.errors import RefusedError
from fedcompose.federation import trusted_federation
from fedcompose.release import ReceivedRelease, VerifiedRelease, verify_release
from tests.federation_sim import FederationSim


def verify(sim: FederationSim, path: Path, after: timedelta = timedelta(0)) -> VerifiedRelease:
    return verify_release(ReceivedRelease(path), [sim.root.keyid], sim.now + after)


def test_a_verified_release_says_who_made_it_from_what(sim: FederationSim) -> None:
    made = sim.released()
    found = verify(sim, made.path)
    assert found == made
    assert found.keyid == sim.coordinator.keyid
    assert [(expert.site, expert.domain) for expert in found.experts] == [("site-a", "clock"), ("site-b", "ordering")]
    assert found.composition["experts"][0]["dirHash"] == found.experts[0].dir_hash
    assert found.evaluation is None


def test_a_release_verifies_anywhere_and_years_later(sim: FederationSim, tmp_path: Path) -> None:
    made = sim.released()
    shutil.copytree(made.path, tmp_path / "copy")
    assert verify(sim, tmp_path / "copy", timedelta(days=2000)).dir_hash == made.dir_hash


def test_without_fingerprints_the_remembered_roots_decide(sim: FederationSim) -> None:
    made = sim.released()
    with pytest.raises(RefusedError) as refusal:
        verify_release(ReceivedRelease(made.path), None, sim.now)
    assert refusal.value.code == "TRUST_ROOT_UNKNOWN"
    trusted_federation(sim.envelope, [sim.root.keyid], sim.now)
    assert verify_release(ReceivedRelease(made.path), None, sim.now) == made


def test_a_fingerprint_of_somebody_else_is_not_enough(sim: FederationSim) -> None:
    made = sim.released()
    with pytest.raises(RefusedError) as refusal:
        verify_release(ReceivedRelease(made.path), [sim.coordinator.keyid], sim.now)
    assert refusal.value.code == "TRUST_ROOT_UNKNOWN"


def test_reading_later_notices_a_change(sim: FederationSim) -> None:
    made = sim.released()
    assert made.read("composition.json").startswith(b"{")
    (made.path / "composition.json").write_bytes(b"{}")
    with pytest.raises(RefusedError, match="not the file that was signed"):
        made.read("composition.json")


def test_experts_of_a_release_can_be_read_as_contributions(sim: FederationSim) -> None:
    made = sim.released()
    for expert in made.experts:
        assert expert.path == made.path / "ingredients" / expert.site
        assert expert.read("adapter_config.json") == (expert.path / "adapter_config.json").read_bytes()
