"""What is exported is what was released: the same bytes, the same logits, and a table that was tried."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedcompose.cli import main
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.export import choose, export_adapters, export_route_table, learn
from fedcompose.files import sha256_file
from fedcompose.model.composed import load_release
from fedcompose.model.controls import FixedRouter
from fedcompose.model.merged import export_merged
from fedcompose.release import VerifiedRelease
from tests.federation_sim import FederationSim


def test_the_adapters_are_the_signed_bytes(release: VerifiedRelease, tmp_path: Path) -> None:
    names = export_adapters(release, tmp_path / "out")

    assert names == ["attention", "experts/site-a", "experts/site-b"]
    for expert in release.experts:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert sha256_file(tmp_path / "out" / "experts" / expert.site / name) == expert.digests[name]
    told = json.loads((tmp_path / "out" / "origin.json").read_text())
    assert told["release"] == release.dir_hash and told["signed"] is False


def test_a_merged_expert_says_what_the_forced_expert_says(
    release: VerifiedRelease, talking_sim: FederationSim, tmp_path: Path
) -> None:
    composed, _ = load_release(release, dtype=torch.float32, base=talking_sim.base)
    ids = torch.arange(3, 60)[None]
    said = []
    for row, site in enumerate(["site-a", "site-b"]):
        export_merged(release, site, talking_sim.base, tmp_path / site)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / site, dtype=torch.float32)
        with torch.no_grad(), composed.routing.using(FixedRouter(row, 2)):
            said.append(plain(ids).logits)
            torch.testing.assert_close(said[-1], composed(ids).logits, rtol=1e-3, atol=1e-3)
    assert (said[0] - said[1]).abs().max() > 0.1, "two experts that say the same would not test it"


def test_merging_refuses_strangers(release: VerifiedRelease, talking_sim: FederationSim, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no expert of this name"):
        export_merged(release, "site-c", talking_sim.base, tmp_path / "out")
    other = dataclasses.replace(talking_sim.base, digest="0" * 64)
    with pytest.raises(RefusedError, match="another base"):
        export_merged(release, "site-a", other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_word_counts_for_the_group_that_says_it_more() -> None:
    scores = learn([["add 3 and 4", "add 5"], ["sort the list", "sort again"]])

    assert choose(scores, "Add 9 and 9") == 0
    assert choose(scores, "please SORT") == 1
    assert choose(scores, "nothing known") == 0
    assert choose({}, "nothing known") == 0


def test_a_route_table_is_learned_from_public_prompts_and_tried_on_others(
    release: VerifiedRelease, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        export_route_table(release, tmp_path / "table.json")
    assert caught.value.code == "ROUTE_TABLE_NO_PROMPTS"
    domains = [
        {"site": "site-b", "generator": "order_statistic", "config": {}},
        {"site": "site-a", "generator": "clock", "config": {}},
    ]
    evaluated = dataclasses.replace(release, evaluation={"domains": domains})
    table = export_route_table(evaluated, tmp_path / "table.json")

    assert json.loads((tmp_path / "table.json").read_text()) == table
    assert table["experts"] == ["site-a", "site-b"]
    assert table["accuracy"] == {site: {"right": 200, "of": 200} for site in ("site-a", "site-b")}


@pytest.mark.parametrize("options", [[], ["--peft", "--route-table"], ["--merged"], ["--peft", "--expert", "site-a"]])
def test_the_command_asks_what_to_export(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["export", "nowhere", "--out", "out", *options])
    assert end.value.code == 2
    assert "EXPORT_KIND" in capsys.readouterr().err


def test_the_command_verifies_first(
    talking_sim: FederationSim, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = talking_sim.coordinator_home / "release"
    with pytest.raises(SystemExit) as end:
        main(["export", str(folder), "--peft", "--out", str(tmp_path / "out")])
    assert end.value.code == 1
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["export", str(folder), "--peft", "--out", str(tmp_path / "out"), "--json",
              "--root-fingerprint", talking_sim.root.keyid])  # fmt: skip
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(tmp_path / "out")}
