"""The coordinator's commands from receiving to composing, as a person types them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedcompose import ledger
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.explanations import EXPLANATIONS
from fedcompose.keys import new_key
from fedcompose.settings import fill_template
from fedcompose.traces import Trace
from fedcompose_client.firewall import write_passed
from fedcompose_coordinator.cli import app
from fedcompose_coordinator.config import CoordinatorConfig, load_config
from tests.federation_sim import FederationSim


@pytest.fixture
def home(sim: FederationSim) -> Path:
    """A coordinator's folder with settings, ready for the commands."""
    text = fill_template(
        "fedcompose_coordinator", "coordinator.toml", id="hub", base=str(sim.base.path), host="127.0.0.1",
        name="127.0.0.1", port="9443",
    )  # fmt: skip
    (sim.coordinator_home / "coordinator.toml").write_text(text)
    return sim.coordinator_home


def run(sim: FederationSim, *arguments: object, status: int = 0) -> str:
    options = ["--home", str(sim.coordinator_home)]
    if arguments[0] == "receive":
        options += ["--root-fingerprint", sim.root.keyid]
    result = CliRunner().invoke(app, [*map(str, arguments), *options], env={"COLUMNS": "40"})
    if isinstance(result.exception, RefusedError | ConfigError):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.stdout


def test_the_template_holds_the_defaults(home: Path) -> None:
    config = load_config(home)
    assert config == CoordinatorConfig(id="hub", base=config.base, key=config.key)


def test_receiving_says_everything_on_a_narrow_terminal(sim: FederationSim, home: Path) -> None:
    adapter, traces = sim.contribute("site-a")
    (traces.path / "traces.jsonl").write_bytes(b"")
    printed = run(sim, "receive", sim.sites["site-a"].outbox, status=1)
    header, first, second, *rest = (line.split() for line in printed.splitlines())
    assert header == ["outcome", "site", "kind", "digest", "folder"]
    assert first == ["admitted", "site-a", "adapter", adapter.dir_hash[:16], str(adapter.path)]
    assert second == ["FILE_CHANGED", str(traces.path)]
    assert ["FILE_CHANGED:", "traces.jsonl", "is", "not", "the", "file", "that", "was", "signed"] in rest


def test_a_replay_is_explained(sim: FederationSim, home: Path, tmp_path: Path) -> None:
    older = shutil.copytree(sim.contribute("site-a")[0].path, tmp_path / "adapter")
    run(sim, "receive", sim.contribute("site-a")[0].path)
    printed = run(sim, "receive", older, status=1)
    assert "REPLAYED: " in printed and EXPLANATIONS["REPLAYED"] in printed


def test_two_people_approve_by_command(sim: FederationSim, home: Path) -> None:
    for name in ("alice", "bob"):
        new_key(home / "approvers", name, "coordinator", None, None)
    settings = (home / "coordinator.toml").read_text().replace("approvals = 0", "approvals = 2")
    people = 'alice = "approvers/alice.pub"\nbob = "approvers/bob.pub"\n'
    (home / "coordinator.toml").write_text(settings.replace("[approvers]\n", f"[approvers]\n{people}"))
    adapter, _ = sim.contribute("site-a")
    printed = run(sim, "receive", adapter.path)
    assert f"--approve {adapter.dir_hash[:16]}" in printed and "waiting" in printed
    outcomes = []
    for name in ("alice", "bob"):
        key = home / "approvers" / f"{name}.key"
        approval = ("--approve", adapter.dir_hash[:16], "--by", name, "--key", key, "--json")
        outcomes += json.loads(run(sim, "receive", *approval))
    assert [each["outcome"] for each in outcomes] == ["waiting", "admitted"]
    assert {each["digest"] for each in outcomes} == {adapter.dir_hash}


@pytest.mark.parametrize(
    "arguments", [(), ("--approve", "0" * 64), ("x", "--by", "alice"), ("x", "--approve", "0" * 64)]
)
def test_receiving_and_approving_are_not_mixed_up(sim: FederationSim, home: Path, arguments: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        run(sim, "receive", *arguments)
    assert caught.value.code == "RECEIVE_WHAT"


def test_more_approvals_than_approvers_are_noticed_before_anything_waits(sim: FederationSim, home: Path) -> None:
    settings = (home / "coordinator.toml").read_text().replace("approvals = 0", "approvals = 1")
    (home / "coordinator.toml").write_text(settings)
    with pytest.raises(ConfigError) as caught:
        run(sim, "receive", sim.contribute("site-a")[0].path)
    assert caught.value.code == "APPROVERS_INVALID"
    assert not (home / "store").exists()


def test_a_composition_is_written_down(sim: FederationSim, home: Path) -> None:
    settings = (
        (home / "coordinator.toml").read_text().replace("steps = 60", "steps = 1").replace("batch = 12", "batch = 2")
    )
    (home / "coordinator.toml").write_text(settings)
    for site in sim.sites.values():
        trace = Trace(provenance_class="C", task="exact", question="What?", answer="this", completion="Answer: this")
        write_passed(site.folder / "runs" / site.domain, [trace])
        sim.contribute(site.id)
    run(sim, "receive", *(site.outbox for site in sim.sites.values()))
    composition: dict[str, Any] = json.loads(run(sim, "compose", "--json"))
    entry = ledger.verify(home / "ledger.jsonl")[-1]
    assert entry.event == "composed"
    assert entry.fields["experts"] == [expert["dirHash"] for expert in composition["experts"]]


def test_no_command_begins_with_a_ledger_that_does_not_hold(sim: FederationSim, home: Path) -> None:
    run(sim, "receive", sim.contribute("site-a")[0].path)
    (home / "ledger.jsonl").unlink()
    for command in ("compose", "evaluate", "release", "report"):
        with pytest.raises(RefusedError) as caught:
            run(sim, command)
        assert caught.value.code == "LEDGER_TRUNCATED"
