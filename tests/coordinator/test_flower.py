from __future__ import annotations

from pathlib import Path

import pytest

from fedcompose.wire import Status
from tests.flower_sim import FlowerSim, files_of


@pytest.fixture
def sim(tmp_path: Path) -> FlowerSim:
    return FlowerSim(tmp_path)


def test_a_call_and_two_contributions_cross_byte_for_byte(sim: FlowerSim) -> None:
    envelope = sim.call()
    assert {outcome.code for outcome in sim.run("call").values()} == {"ACCEPTED"}
    for site in sim.sites:
        sim.fill_outbox(site)
        assert list(files_of(sim.folder(site) / "calls").values()) == [envelope]
    outcomes = sim.run("collect")
    for site in sim.sites:
        assert outcomes[site].code == "ACCEPTED"
        assert outcomes[site].status == Status("ready")
        assert outcomes[site].folders == (str(sim.inbox(site) / "adapter"), str(sim.inbox(site) / "traces"))
        assert files_of(sim.inbox(site)) == files_of(sim.outbox(site))
