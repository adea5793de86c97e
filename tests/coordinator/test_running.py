"""What a person at the coordinator types while a call is under way: watching, carrying by hand, inviting anew."""

from __future__ import annotations

import json
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedcompose.errors import ConfigError
from fedcompose.invitation import read_invitation
from fedcompose_client.cli import app as client
from fedcompose_client.jobs import jobs
from fedcompose_coordinator import commands_running, tls
from fedcompose_coordinator.cli import app as coordinator
from fedcompose_coordinator.jobs import call_paths, jobs_of
from tests.flower_sim import FlowerSim


@pytest.fixture
def sim(tmp_path: Path) -> FlowerSim:
    return FlowerSim(tmp_path)


def run(app: object, *arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])  # type: ignore[arg-type]
    if result.exception is not None:
        raise result.exception
    return result.stdout


def shown(sim: FlowerSim, *options: str) -> dict[str, str]:
    found = json.loads(run(coordinator, "status", *options, "--json", "--home", sim.home))
    return {site["site"]: site["state"] for site in found["sites"]}


def test_watching_ends_when_every_site_is_at_an_end(sim: FlowerSim, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --watch, the negative control, the command shows what is and ends."""
    monkeypatch.setattr(commands_running, "WATCH_EVERY_S", 0.01)
    sim.call()
    first, second = jobs_of(sim.home, call_paths(sim.home)[-1])
    first.enter("refused", sim.now)
    assert shown(sim) == {"site-a": "refused", "site-b": "called"}

    def happen() -> None:
        for state in ("asked", "training", "ready", "admitted"):
            time.sleep(0.1)
            second.enter(state, sim.now)

    site = threading.Thread(target=happen)
    site.start()
    assert shown(sim, "--watch") == {"site-a": "refused", "site-b": "admitted"}
    site.join()


def test_watching_ends_for_sites_whose_time_is_over(sim: FlowerSim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands_running, "WATCH_EVERY_S", 0.1)
    sim.call(deadline=datetime.now(UTC) + timedelta(seconds=2))
    assert shown(sim, "--watch") == {"site-a": "missed", "site-b": "missed"}


def test_there_is_nothing_to_watch_before_a_call(sim: FlowerSim) -> None:
    assert shown(sim, "--watch") == {}


def test_the_newest_call_is_carried_by_hand(sim: FlowerSim, tmp_path: Path) -> None:
    stick = tmp_path / "stick" / "call.json"
    with pytest.raises(ConfigError) as refused:
        run(coordinator, "export-call", "--out", stick, "--home", sim.home)
    assert refused.value.code == "CALL_MISSING"
    sim.call(now=sim.now - timedelta(hours=1))
    newest = sim.call()
    run(coordinator, "export-call", "--out", stick, "--home", sim.home)
    assert stick.read_bytes() == newest
    for _ in range(2):  # a stick may be put in twice
        run(client, "import-call", stick, "--site", sim.folder("site-a"))
    (job,) = jobs(sim.folder("site-a"))
    assert (job.state, job.envelope) == ("asked", newest)
    assert jobs(sim.folder("site-b")) == []


def test_an_invitation_brings_a_new_certificate_only_when_it_is_time(
    sim: FlowerSim, monkeypatch: pytest.MonkeyPatch
) -> None:
    def invited() -> tuple[bool, str]:
        said = json.loads(run(coordinator, "invite", "--json", "--home", sim.home))
        envelope = Path(said["path"]).read_bytes()
        return said["new_certificate"], read_invitation(envelope, sim.federation, datetime.now(UTC)).ca_certificate

    is_new, first = invited()
    assert is_new
    assert invited() == (False, first)
    monkeypatch.setattr(tls, "VALIDITY", tls.RENEWAL - timedelta(days=1))
    tls.make_certificates(sim.home, ["127.0.0.1"], datetime.now(UTC))
    is_new, second = invited()
    assert is_new
    assert second != first
