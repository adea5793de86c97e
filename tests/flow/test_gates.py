"""Gates from the sites' own rows to who speaks in a release, by the commands that people type, without any trace."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

import fedcompose
from fedcompose.adapter import CONFIG_FILE, parse_config
from fedcompose.cli import main
from fedcompose.gates import GATES_FILE, read_gates
from fedcompose.settings import fill_template
from tests.client.small_site import TRAINING
from tests.federation_sim import FederationSim, SimSite

SHORT = TRAINING | {"warm_up_steps": 2, "steps": 1, "samples_per_prompt": 2, "max_new_tokens": 6}
ALPHABETS = {"site-a": "0123456", "site-b": "stuvwxy"}


def typed(*command: object, code: int = 0) -> str:
    """What a command prints."""
    with redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as ended:
        main(list(map(str, command)))
    assert ended.value.code == code
    return said.getvalue()


def settle(sim: FederationSim, site: SimSite) -> None:
    """A site with rows and settings, and nothing learned."""
    shutil.rmtree(site.folder / "runs")
    letters = ALPHABETS[site.id]
    rows = [{"question": a + b, "answer": "yes" if a < b else "no"} for a in letters for b in letters]
    (site.folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = [f'id = "{site.id}"', f'base = "{sim.base.path}"', f'key = "keys/{site.id}.key"']
    lines += [f"[domains.{site.domain}]", 'file = "rows.jsonl"', 'task = "yes_no"', f"[domains.{site.domain}.training]"]
    lines += [f"{name} = {value}" for name, value in SHORT.items()]
    (site.folder / "site.toml").write_text("\n".join(lines))


def contribute(sim: FederationSim, site: SimSite) -> None:
    """Train, learn gates, sign."""
    settle(sim, site)
    for step in ("train", "gates"):
        typed("client", step, "--site", site.folder, "--domain", site.domain)
    given = ("--root-fingerprint", sim.root.keyid)
    typed("client", "contribute", "--site", site.folder, "--domain", site.domain, *given)
    assert not (site.outbox / "traces").exists()


def receive(sim: FederationSim) -> Path:
    """The coordinator's folder with everything admitted."""
    home = sim.coordinator_home
    names = {"id": "hub", "base": str(sim.base.path), "host": "127.0.0.1", "name": "127.0.0.1", "port": "9443"}
    (home / "coordinator.toml").write_text(fill_template("fedcompose_coordinator", "coordinator.toml", **names))
    outboxes = [site.outbox for site in sim.sites.values()]
    typed("coordinator", "receive", "--home", home, "--root-fingerprint", sim.root.keyid, *outboxes)
    return home


def test_gates_that_sites_learned_decide_who_speaks_in_a_release(sim: FederationSim) -> None:
    for site in sim.sites.values():
        contribute(sim, site)
    home = receive(sim)
    compose = ("coordinator", "compose", "--home", home, "--method", "phatgoose-sites", "--json")
    composition = json.loads(typed(*compose))
    assert composition["method"] == "phatgoose-sites" and "lessons" not in composition["training"]
    typed("coordinator", "release", "--home", home)
    model, tokenizer = fedcompose.load(home / "release", base=sim.base.path)
    folders = [home / "release" / "ingredients" / expert["site"] for expert in composition["experts"]]
    shipped = [
        read_gates((folder / GATES_FILE).read_bytes(), parse_config((folder / CONFIG_FILE).read_bytes()), None)
        for folder in folders
    ]
    for point, weights in zip(model.routing.points, model.router.scorer.weights, strict=True):
        for gates, weight in zip(shipped, weights, strict=True):
            torch.testing.assert_close(weight, torch.tensor(gates[point.name]))
    chosen = speakers(model, tokenizer, "".join(ALPHABETS.values()))
    assert chosen == {0, 1}, "by their gates both experts speak"


def speakers(model: Any, tokenizer: Any, text: str) -> set[int]:
    """The first choices that the router made about a text."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    with model.routing.recording() as record, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return {int(each) for call in record.calls for decision in call.values() for each in decision.choice.flatten()}


def test_without_the_gates_of_every_site_nothing_is_composed(sim: FederationSim) -> None:
    """Control: the command does not learn gates of its own."""
    for site_id in sim.sites:
        sim.contribute(site_id)
    home = receive(sim)
    typed("coordinator", "compose", "--home", home, "--method", "phatgoose-sites", code=2)
    assert not (home / "candidate").exists()
