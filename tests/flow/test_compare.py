"""`fedcompose coordinator evaluate --seeds`, from signed contributions to the three files, and again after a change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedcompose.cli import app
from fedcompose.files import write_atomic
from fedcompose.tasks import generator_task, get_task, training
from fedcompose.traces import Trace
from fedcompose.trust_state import trusted_federation
from fedcompose_client.firewall import write_passed
from tests.federation_sim import FederationSim

GENERATORS = {"site-a": "clock", "site-b": "logic"}
SETTINGS = """
id = "hub"
base = "{base}"
key = "keys/hub.key"

[compose]
steps = 2
batch = 4
mixed_lessons = 4

[evaluate]
prompts_per_domain = 10
max_new_tokens = 6

[domains.clock]
site = "site-a"
generator = "clock"

[domains.ordering]
site = "site-b"
generator = "logic"
"""


@pytest.fixture
def home(sim: FederationSim) -> Path:
    """A coordinator's folder with two admitted experts and traces whose answers are right."""
    for site_id, site in sim.sites.items():
        task = get_task(generator_task(GENERATORS[site_id]))
        traces = [
            Trace(provenance_class="B", task=task.name, generator=GENERATORS[site_id], config={},
                  seed=example.origin.seed, completion=task.target(example))
            for example in training(GENERATORS[site_id], {}, 12) if example.origin
        ]  # fmt: skip
        write_passed(site.folder / "runs" / site.domain, traces)
        sim.contribute(site_id)
    sim.receive()
    trusted_federation(sim.envelope, [sim.root.keyid], sim.now)
    write_atomic(sim.coordinator_home / "coordinator.toml", SETTINGS.format(base=sim.base.path).encode())
    return sim.coordinator_home


def evaluate(home: Path, *options: str) -> str:
    result = CliRunner().invoke(app, ["coordinator", "evaluate", "--home", str(home), *options])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.mark.slow
def test_methods_and_seeds_are_composed_measured_and_shown(home: Path) -> None:
    said = evaluate(home, "--seeds", "2", "--methods", "hard")
    found = json.loads((home / "comparison.json").read_text())
    assert found["seeds"] == [0, 1] and found["first"] == "hard" and "| **hard** |" in said
    assert {"hard", "hard-off", "prompt", "prompt-on", "attention_only", "oracle"} <= set(found["methods"])
    assert found["methods"]["hard"]["cost"]["composing"]["peak_bytes"] > 10**8
    assert found["methods"]["hard"]["mixed"]["correct"]["n"] == 10
    assert found["blast_radius"]["same_tokens"] == found["blast_radius"]["tokens"] > 0
    assert (home / "comparison.html").is_file() and (home / "comparison.md").read_text() in said
    cells = {path: path.stat().st_mtime_ns for path in (home / "evaluation" / "cells").iterdir()}
    shared = {method: len(row["accuracy_mean"]["seeds"]) for method, row in found["methods"].items()}
    assert set(shared.values()) == {2} and len(cells) < 2 * 3 * len(found["methods"])

    evaluate(home, "--seeds", "1", "--methods", "hard")  # nothing of it is new
    assert {path: path.stat().st_mtime_ns for path in (home / "evaluation" / "cells").iterdir()} == cells
    composed = (home / "candidates" / "hard-0" / "composition.json").stat().st_mtime_ns
    settings = home / "coordinator.toml"
    settings.write_text(settings.read_text().replace("steps = 2", "steps = 3"))
    evaluate(home, "--seeds", "1", "--methods", "hard")
    assert (home / "candidates" / "hard-0" / "composition.json").stat().st_mtime_ns != composed
    lessons = json.loads((home / "candidates" / "hard-0" / "composition.json").read_text())["training"]["lessons"]
    assert lessons["two domains"] == 4
