from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcompose.cli import main
from tests.federation_sim import FederationSim

# Importing any of these while verifying ends the process with an error.
GUARD = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "peft", "trl", "flwr"}:
            sys.exit(f"imported {name}")
sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def call(*arguments: Any) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(str(ended.value.code or 0)), captured.out + captured.err

    return call


def test_verifies_a_release_by_a_root_fingerprint_alone(
    sim: FederationSim, run: Callable[..., tuple[int, str]]
) -> None:
    release = sim.released()
    status, text = run("verify", release.path, "--root-fingerprint", sim.root.keyid)
    assert status == 0
    for said in ("hub", "site-a · clock", "site-b · ordering", release.dir_hash):
        assert said in text


def test_a_stranger_s_root_is_no_reason_to_trust(sim: FederationSim, run: Callable[..., tuple[int, str]]) -> None:
    release = sim.released()
    assert run("verify", release.path)[0] == 1
    status, text = run("verify", release.path, "--root-fingerprint", sim.coordinator.keyid)
    assert status == 1 and "TRUST_ROOT_UNKNOWN" in text


def test_roots_are_remembered_with_the_federation_file(sim: FederationSim, run: Callable[..., tuple[int, str]]) -> None:
    release = sim.released()
    file = sim.coordinator_home / "federation.json"
    assert run("verify", release.path, "--federation", file, "--root-fingerprint", sim.root.keyid)[0] == 0
    assert run("verify", release.path)[0] == 0


def test_verifies_an_outbox_whole(sim: FederationSim, run: Callable[..., tuple[int, str]]) -> None:
    sim.contribute("site-a")
    outbox, file = sim.sites["site-a"].outbox, sim.coordinator_home / "federation.json"
    status, text = run("verify", outbox, "--federation", file, "--root-fingerprint", sim.root.keyid, "--json")
    assert status == 0
    folders = json.loads(text)["folders"]
    assert [folder["kind"] for folder in folders] == ["adapter", "traces"]
    assert folders[0]["numbers"] == {"base_accuracy": 0.7123, "rlvr_accuracy": 0.7123, "test_count": 200}


def test_a_contribution_needs_a_federation_file(
    sim: FederationSim, run: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sim.contribute("site-a")
    monkeypatch.chdir(tmp_path)
    status, text = run("verify", sim.sites["site-a"].outbox)
    assert status == 2 and "FEDERATION_MISSING" in text


def test_a_refusal_is_one_json_document_with_its_code(sim: FederationSim, run: Callable[..., tuple[int, str]]) -> None:
    release = sim.released()
    with (release.path / "router.safetensors").open("ab") as stream:
        stream.write(b"x")
    status, text = run("verify", release.path, "--root-fingerprint", sim.root.keyid, "--json")
    assert status == 1
    assert '"code": "FILE_CHANGED"' in text


def test_inspect_says_so_when_nothing_was_verified(sim: FederationSim, run: Callable[..., tuple[int, str]]) -> None:
    release = sim.released()
    status, text = run("inspect", release.path)
    assert status == 0 and "UNVERIFIED" in text and "site-b" in text
    status, text = run("inspect", release.path, "--root-fingerprint", sim.root.keyid)
    assert status == 0 and "UNVERIFIED" not in text and "rlvr_accuracy 0.7123" in text


def test_inspect_refuses_what_was_tampered_with(sim: FederationSim, run: Callable[..., tuple[int, str]]) -> None:
    release = sim.released()
    (release.path / "evaluation.json").write_text("{}")
    status, text = run("inspect", release.path, "--root-fingerprint", sim.root.keyid)
    assert status == 1 and "FILE_UNSIGNED" in text


def guarded(*arguments: Any) -> subprocess.CompletedProcess[str]:
    program = f"{GUARD}\nfrom fedcompose.cli import main\nmain(sys.argv[1:])"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)


def test_verifying_imports_no_model_code(sim: FederationSim) -> None:
    release = sim.released()
    verified = guarded("verify", release.path, "--root-fingerprint", sim.root.keyid)
    assert verified.returncode == 0, verified.stderr
    inspected = guarded("inspect", release.path, "--root-fingerprint", sim.root.keyid)
    assert inspected.returncode == 0, inspected.stderr
    outbox, file = sim.sites["site-a"].outbox, sim.coordinator_home / "federation.json"
    checked = guarded("verify", outbox, "--federation", file, "--root-fingerprint", sim.root.keyid)
    assert checked.returncode == 0, checked.stderr


def test_the_import_guard_itself_works() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", f"{GUARD}\nimport torch"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1 and "imported torch" in ended.stderr
