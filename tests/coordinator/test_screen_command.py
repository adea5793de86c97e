"""`fedcompose coordinator screen` over a federation in which one site copied another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedcompose import ledger
from fedcompose.files import write_atomic
from fedcompose.trust_state import trusted_federation
from fedcompose_client.firewall import write_passed
from fedcompose_coordinator.cli import app
from fedcompose_coordinator.membership import members
from tests.federation_sim import SITES, FederationSim, make_federation, make_random_expert, make_traces

SETTINGS = """
id = "hub"
base = "{base}"
key = "keys/hub.key"
[compose]
steps = 2
batch = 4
[evaluate]
prompts_per_domain = 10
max_new_tokens = 8
"""
DOMAINS = """
[domains.clock]
site = "site-a"
generator = "clock"
[domains.ordering]
site = "site-b"
generator = "logic"
"""


def prepared(sim: FederationSim, domains: str = "") -> FederationSim:
    """Everything received, and the coordinator's settings."""
    for site in sim.sites:
        sim.contribute(site)
        sim.receive(sim.sites[site].outbox)
    trusted_federation(sim.envelope, [sim.root.keyid], sim.now)
    settings = SETTINGS.format(base=sim.base.path) + domains
    write_atomic(sim.coordinator_home / "coordinator.toml", settings.encode())
    return sim


def run(sim: FederationSim, *arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "--home", str(sim.coordinator_home)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def sites(sim: FederationSim) -> set[str]:
    return {each.site for each in members(sim.coordinator_home, sim.admitted())}


def found_in(sim: FederationSim) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((sim.coordinator_home / "screening.json").read_text())
    return found


@pytest.fixture
def three(tmp_path: Path, tiny_base: Path, random_experts: dict[str, Path], sim: FederationSim) -> FederationSim:
    """The third site's expert is the first one's."""
    return prepared(make_federation(tmp_path / "three", tiny_base, random_experts, {**SITES, "site-c": "copies"}))


def test_a_site_that_is_found_is_left_out_until_somebody_lets_it_in(three: FederationSim) -> None:
    said = run(three, "screen")
    assert [(each["site"], each["code"], each["other"]) for each in found_in(three)["findings"]] == [
        ("site-c", "CLONE", "site-a")
    ]
    assert "Quarantined: site-c" in said and sites(three) == {"site-a", "site-b"}
    entry = ledger.verify(three.coordinator_home / "ledger.jsonl")[-1]
    digest = next(e.dir_hash for e in three.admitted() if e.site == "site-c" and e.kind == "adapter")
    assert entry.event == "quarantined" and entry.fields == {"contribution": digest, "reasons": ["CLONE"]}
    lines = len(ledger.verify(three.coordinator_home / "ledger.jsonl"))
    assert json.loads(run(three, "screen", "--json"))["findings"] == []  # who is out is not looked at again
    assert len(ledger.verify(three.coordinator_home / "ledger.jsonl")) == lines


def test_clean_experts_stay(
    tmp_path: Path, tiny_base: Path, random_experts: dict[str, Path], sim: FederationSim
) -> None:
    experts = {**random_experts, "site-c": make_random_expert(tiny_base, tmp_path / "third", seed=5)}
    clean = prepared(make_federation(tmp_path / "clean", tiny_base, experts, {**SITES, "site-c": "copies"}))
    assert "Quarantined" not in run(clean, "screen")
    assert found_in(clean)["checks"] == ["weights"] and sites(clean) == {"site-a", "site-b", "site-c"}


@pytest.mark.slow
def test_with_domains_and_an_evaluated_candidate_all_four_checks_are_made(sim: FederationSim) -> None:
    for site, generator in (("site-a", "clock"), ("site-b", "logic")):
        write_passed(sim.sites[site].folder / "runs" / sim.sites[site].domain, make_traces(12, generator))
    prepared(sim, DOMAINS)
    run(sim, "compose")
    run(sim, "evaluate")
    run(sim, "screen")
    assert found_in(sim)["checks"] == ["weights", "triggers", "routing", "absence"]
    assert {path.name for path in (sim.coordinator_home / "without").iterdir()} == {"site-a", "site-b"}
    sim.contribute("site-a")
    sim.receive(sim.sites["site-a"].outbox)
    run(sim, "screen")  # the candidate is made of older experts
    assert found_in(sim)["checks"] == ["weights", "triggers"]
    run(sim, "compose", "--seed", "1")
    run(sim, "screen")  # what was measured was measured on another candidate
    assert found_in(sim)["checks"] == ["weights", "triggers"]
