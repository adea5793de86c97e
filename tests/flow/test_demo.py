"""The demo's own part: running commands, remembering what is done, and saying what went wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedcompose.bases import cache_dir
from fedcompose.demo import SCENARIOS, Demo, found_federation, with_settings
from fedcompose.errors import MissingError
from fedcompose.files import folder_digests
from fedcompose.tasks import held_out, training
from fedcompose_coordinator.config import load_config as load_coordinator


def new_demo(folder: Path) -> Demo:
    (folder / "logs").mkdir()
    return Demo(folder)


def test_a_finished_step_is_not_run_again(tmp_path: Path) -> None:
    demo = new_demo(tmp_path)
    arguments = ("keys", "new", "root", "--role", "root", "--no-passphrase", "--out", tmp_path / "keys")
    demo.step("root-key", *arguments)
    first = (tmp_path / "keys/root.pub").read_bytes()
    demo.step("root-key", *arguments)  # the command itself would refuse to overwrite a key
    assert (tmp_path / "keys/root.pub").read_bytes() == first
    assert not demo.running


def test_a_failed_step_says_what_the_command_said_and_is_run_again(tmp_path: Path) -> None:
    demo = new_demo(tmp_path)
    for _ in range(2):
        with pytest.raises(MissingError) as caught:
            demo.step("show", "federation", "show", tmp_path / "nothing.json")
        assert caught.value.code == "DEMO_STEP_FAILED"
        assert "nothing.json" in (caught.value.got or "")


def test_founding_the_federation_again_changes_nothing(tmp_path: Path, tiny_base: Path) -> None:
    demo = new_demo(tmp_path)
    demo.base = str(tiny_base)
    found_federation(demo)
    first = folder_digests(tmp_path)
    assert load_coordinator(tmp_path / "coordinator").domains.keys() == {each.domain for each in SCENARIOS}
    (tmp_path / "logs" / "call.done").unlink()  # as if it had been interrupted just before the end
    found_federation(demo)
    again = folder_digests(tmp_path)
    assert {name for name in again if again[name] != first.get(name)} <= {
        name for name in again if "calls/" in name or name.startswith("logs/call") or name.endswith("/egress.jsonl")
    } | {"coordinator/ledger.jsonl", "coordinator/state.json"}


def test_a_setting_is_changed_once_and_must_exist() -> None:
    assert with_settings("seed = 0  # a\n[x]\nseed = 1\n", {"seed": 7}) == "seed = 7  # a\n[x]\nseed = 1\n"
    with pytest.raises(ValueError, match="no setting"):
        with_settings("seed = 0\n", {"steps": 7})


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.site)
def test_what_a_site_trains_on_is_never_evaluated(scenario: object) -> None:
    assert isinstance(scenario, type(SCENARIOS[0]))
    trained = {row.question for row in training(scenario.generator, scenario.config, 1500)}
    measured = {row.question for row in held_out(scenario.generator, scenario.config, 200)}
    assert len(trained) == 1500 and len(measured) == 200 and not trained & measured


@pytest.mark.slow
def test_the_quick_demo_ends_with_a_report_and_a_release(tmp_path: Path, private_home: Path) -> None:
    pulled = Path.home() / ".fedcompose" / "bases" / "smollm2-135m"
    if pulled.is_dir():
        shutil.copytree(pulled, cache_dir() / "smollm2-135m")
    subprocess.run([sys.executable, "-m", "fedcompose", "demo", "--quick", "--out", tmp_path / "demo"], check=True)
    report = json.loads((tmp_path / "demo/report.json").read_text())
    methods = {"base", "composed", "uniform", "random_router", "attention_only", "best_single"}
    assert methods | {f"expert:{scenario.site}" for scenario in SCENARIOS} == set(report["accuracy"])
    assert set(report["retention"]) == {scenario.domain for scenario in SCENARIOS}
    assert (tmp_path / "demo/report.html").is_file() and (tmp_path / "demo/release/model.sig").is_file()
