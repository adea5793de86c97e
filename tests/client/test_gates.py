from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedcompose.adapter import read_adapter
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.gates import GATES_FILE, read_gates, write_gates
from fedcompose_client.config import SiteConfig
from fedcompose_client.contribute import gates_name
from fedcompose_client.gates import learn_gates
from tests.client.small_site import make_site
from tests.federation_sim import FederationSim
from tests.tiny_experts import make_tiny_expert


@pytest.fixture
def config(tiny_base: Path, tmp_path: Path) -> SiteConfig:
    """Of a site in `tmp_path / "site"` that has an expert."""
    made = make_site(tmp_path / "site", tiny_base)
    make_tiny_expert(tiny_base, tmp_path / "site/runs/order/expert")
    return made


def test_gates_are_learned_for_every_linear_and_the_same_again(config: SiteConfig, tmp_path: Path) -> None:
    site, run = tmp_path / "site", tmp_path / "site/runs/order"
    notes: list[str] = []
    path = learn_gates(site, config, "order", lambda done, of, note: notes.append(note), steps=6)
    assert path == run / gates_name(run) and len(notes) == 6
    adapter = read_adapter(run / "expert", None)
    gates = read_gates(path.read_bytes(), adapter.config, None)
    assert sorted(gates) == list(adapter.modules())
    assert all(np.abs(gate).sum() > 0 for gate in gates.values())
    assert learn_gates(site, config, "order", lambda *_: None, steps=6).read_bytes() == path.read_bytes()


def test_an_expert_with_differential_privacy_gets_none(config: SiteConfig, tmp_path: Path) -> None:
    (tmp_path / "site/runs/order/result.json").write_text(json.dumps({"dp": {"epsilon": 8}}))
    with pytest.raises(ConfigError) as error:
        learn_gates(tmp_path / "site", config, "order", lambda *_: None)
    assert error.value.code == "GATES_NOT_PRIVATE"


def planted(sim: FederationSim, site_id: str) -> Path:
    """Random gates where `client gates` would have written them."""
    site = sim.sites[site_id]
    run = site.folder / "runs" / site.domain
    adapter, rng = read_adapter(run / "expert", None), np.random.default_rng(0)
    widths = {module: adapter.pair(module)[0].shape[1] for module in adapter.modules()}
    path = run / gates_name(run)
    path.write_bytes(write_gates({name: rng.normal(size=width).astype("<f4") for name, width in widths.items()}))
    return path


def test_gates_are_signed_with_the_expert_and_admitted_and_released(sim: FederationSim) -> None:
    path = planted(sim, "site-a")
    adapter, _ = sim.contribute("site-a")
    assert adapter.read(GATES_FILE) == path.read_bytes()
    sim.contribute("site-b")
    sim.receive()
    sim.compose()
    assert (sim.release().path / "ingredients" / "site-a" / GATES_FILE).read_bytes() == path.read_bytes()


def test_gates_of_an_earlier_expert_stay(sim: FederationSim) -> None:
    path = planted(sim, "site-a")
    path.rename(path.with_name("gates-0123456789abcdef.safetensors"))
    assert GATES_FILE not in sim.contribute("site-a")[0].digests


def test_gates_that_do_not_fit_are_not_signed(sim: FederationSim) -> None:
    planted(sim, "site-a").write_bytes(write_gates({"model.layers.0.mlp.up_proj": np.ones(7, dtype="<f4")}))
    with pytest.raises(RefusedError) as refusal:
        sim.contribute("site-a")
    assert refusal.value.code == "GATES_INVALID"
