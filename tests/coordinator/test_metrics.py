from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedcompose.call import read_own_call
from fedcompose_coordinator.jobs import jobs_of
from fedcompose_coordinator.metrics import serve_metrics
from fedcompose_coordinator.tls import make_certificates
from tests.deployed import free_port
from tests.flower_sim import FlowerSim


@pytest.fixture
def sim(tmp_path: Path) -> FlowerSim:
    sim = FlowerSim(tmp_path)
    sim.call()
    make_certificates(sim.home, ["127.0.0.1"], sim.now)
    return sim


@pytest.fixture
def address(sim: FlowerSim) -> Iterator[str]:
    port = free_port()
    stop = serve_metrics(sim.home, port)
    try:
        yield f"http://127.0.0.1:{port}/metrics"
    finally:
        stop()


def visit(address: str) -> dict[str, float]:
    """Every line of our own, without its labels' order mattering."""
    with urllib.request.urlopen(address, timeout=10) as response:  # noqa: S310
        text = response.read().decode()
    return {name: float(value) for name, value in re.findall(r"^(fedcompose_\S+) (\S+)$", text, re.MULTILINE)}


def test_numbers_are_those_of_the_files(sim: FlowerSim, address: str) -> None:
    (path,) = (sim.home / "calls").glob("*.json")
    call = read_own_call(path.read_bytes())
    first = jobs_of(sim.home, path)[0]
    first.enter("fetching", datetime.now(UTC) - timedelta(seconds=90), offer="0" * 64)
    first.tell(datetime.now(UTC) - timedelta(seconds=90), bytes=300, total=1000)
    found = visit(address)
    labels = f'call="{call.id}",domain="{first.site.domain}",site="{first.site.id}"'
    assert found[f"fedcompose_site_received_bytes{{{labels}}}"] == 300
    assert found[f"fedcompose_site_contribution_bytes{{{labels}}}"] == 1000
    assert 89 <= found[f"fedcompose_site_last_seen_seconds{{{labels}}}"] < 120
    assert sum(value for name, value in found.items() if name.startswith("fedcompose_site_state")) == len(sim.sites)
    assert any('state="fetching"' in name and f'site="{first.site.id}"' in name for name in found)


def test_what_will_expire(sim: FlowerSim, address: str) -> None:
    found = visit(address)
    days = 24 * 3600
    assert 397 * days < found["fedcompose_certificate_expires_seconds"] < 398 * days
    assert 89 * days < found["fedcompose_federation_expires_seconds"] < 90 * days
    assert found["fedcompose_ledger_entries"] == 0


def test_numbers_follow_the_files(sim: FlowerSim, address: str) -> None:
    """Negative control: a number that was read once and kept would never change."""
    before = visit(address)
    (path,) = (sim.home / "calls").glob("*.json")
    jobs_of(sim.home, path)[0].enter("missed", datetime.now(UTC))
    assert visit(address) != before


def test_only_this_machine_is_answered(sim: FlowerSim, address: str) -> None:
    port = int(address.rpartition(":")[2].partition("/")[0])
    listening = [
        line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"
    ]
    assert f"0100007F:{port:04X}" in listening
    assert f"00000000:{port:04X}" not in listening
