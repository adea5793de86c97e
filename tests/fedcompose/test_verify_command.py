from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import fedcompose
from fedcompose.amendments import revoke_keys, set_status
from fedcompose.cli import main
from fedcompose.drafts import amend
from fedcompose.explanations import EXPLANATIONS
from fedcompose.federation import Revocation, format_time
from fedcompose.files import folder_digests, write_json
from fedcompose.signing import sign_files
from fedcompose.trust_state import trusted_federation
from tests.federation_sim import FederationSim, make_federation

Run = Callable[..., tuple[int, str]]
HOUR = timedelta(hours=1)

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
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: Any) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(str(ended.value.code or 0)), captured.out + captured.err

    return call


@pytest.fixture(scope="module")
def made(tiny_base: Path, random_experts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> FederationSim:
    """A federation with contributions and a release, for tests that leave them as they are."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDCOMPOSE_HOME", str(folder / "home"))
        sim = make_federation(folder / "federation", tiny_base, random_experts)
        sim.released()
    return sim


@pytest.fixture
def release(made: FederationSim) -> Path:
    return made.coordinator_home / "release"


@pytest.fixture
def file(made: FederationSim) -> Path:
    return made.coordinator_home / "federation.json"


def later(sim: FederationSim, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The next version of the federation file."""
    return amend(sim.envelope, lambda document: change(document) and None, sim.root, sim.now)


def accept(sim: FederationSim, change: Callable[[dict[str, Any]], object]) -> None:
    trusted_federation(sim.envelope, [sim.root.keyid], sim.now)
    trusted_federation(later(sim, change), None, sim.now)


def test_prints_the_chain_from_the_roots_to_the_experts(made: FederationSim, release: Path, run: Run) -> None:
    status, text = run("verify", release, "--root-fingerprint", made.root.keyid)
    assert status == 0
    said = ["✓ roots", "root (1 of 1, 1 needed)", "✓ federation file", "version 4", "✓ coordinator", "hub", "14 files"]
    said += ["✓ base", "✓ expert 0", "site-a · clock", "same base; dirHash", "✓ expert 1"]
    said += ["site-b · ordering", "when it was made", "No signature shows", "training happened as stated"]
    place = 0
    for words in said:
        assert words in text[place:], words
        place = text.index(words, place)


def test_the_chain_is_there_for_machines_too(made: FederationSim, release: Path, run: Run) -> None:
    status, text = run("verify", release, "--root-fingerprint", made.root.keyid, "--json")
    assert status == 0
    (folder,) = json.loads(text)["folders"]
    checks = ["roots", "federation file", "coordinator", "files", "base", "expert 0", "expert 1", "router", "ledger"]
    assert [link["check"] for link in folder["chain"]] == checks
    assert folder["dir_hash"] in folder["verdict"]
    assert (folder["warnings"], len(folder["not_shown"])) == ([], 4)


def test_a_stranger_s_root_is_no_reason_to_trust(made: FederationSim, release: Path, run: Run) -> None:
    assert run("verify", release)[0] == 1
    status, text = run("verify", release, "--root-fingerprint", made.coordinator.keyid)
    assert status == 1 and "TRUST_ROOT_UNKNOWN" in text


def test_a_fingerprint_is_used_and_a_federation_file_is_remembered(
    made: FederationSim, release: Path, file: Path, run: Run
) -> None:
    assert run("verify", release, "--root-fingerprint", made.root.keyid)[0] == 0
    assert run("verify", release)[0] == 1
    assert run("verify", release, "--federation", file, "--root-fingerprint", made.root.keyid)[0] == 0
    assert run("verify", release)[0] == 0


def test_verifies_an_outbox_whole(made: FederationSim, file: Path, run: Run) -> None:
    outbox = made.sites["site-a"].outbox
    status, text = run("verify", outbox, "--federation", file, "--root-fingerprint", made.root.keyid, "--json")
    assert status == 0
    folders = json.loads(text)["folders"]
    assert [folder["kind"] for folder in folders] == ["adapter", "traces"]
    assert folders[0]["numbers"] == {"base_accuracy": 0.7123, "rlvr_accuracy": 0.7123, "test_count": 200}


def test_a_contribution_needs_a_federation_file_or_an_accepted_one(
    made: FederationSim, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, text = run("verify", made.sites["site-a"].outbox)
    assert status == 2 and "FEDERATION_MISSING" in text
    trusted_federation(made.envelope, [made.root.keyid], made.now)
    assert run("verify", made.sites["site-a"].outbox)[0] == 0


def test_a_federation_file_is_checked_and_not_accepted(
    made: FederationSim, file: Path, run: Run, private_home: Path, tmp_path: Path
) -> None:
    assert "TRUST_ROOT_UNKNOWN" in run("verify", file)[1]
    status, text = run("verify", file, "--root-fingerprint", made.root.keyid)
    assert status == 0 and "has accepted none yet" in text and "root (1 of 1, 1 needed)" in text
    assert not list(private_home.iterdir())
    trusted_federation(made.envelope, [made.root.keyid], made.now)
    newer = tmp_path / "newer.json"
    newer.write_bytes(later(made, lambda document: set_status(document, "site-b", "suspended")))
    status, text = run("verify", newer)
    assert status == 0 and "has accepted version 4" in text


def test_now_asks_the_newest_file_and_at_composition_warns(made: FederationSim, release: Path, run: Run) -> None:
    status, text = run("verify", release, "--now", "--root-fingerprint", made.root.keyid)
    assert status == 0 and "Verified as of now, by version 4" in text
    accept(made, lambda document: set_status(document, "site-b", "suspended"))
    status, text = run("verify", release, "--now")
    assert status == 1 and "SITE_SUSPENDED" in text
    status, text = run("verify", release)
    assert status == 0 and "! version 5 of the federation file" in text and "(SITE_SUSPENDED)" in text


def test_a_replaced_key_and_a_stolen_one_are_told_apart(made: FederationSim, release: Path, run: Run) -> None:
    site_a, site_b = (made.sites[name].signer.keyid for name in ("site-a", "site-b"))

    def revoke(document: dict[str, Any]) -> None:
        revoke_keys(document, [site_a], Revocation(at=made.now + HOUR, reason="rotated"))
        revoke_keys(document, [site_b], Revocation(at=made.now + HOUR, reason="compromised"))

    accept(made, revoke)
    status, text = run("verify", release)
    assert status == 0
    assert re.search(r"site-a · clock .* has a successor since", text)
    assert f"! the key {site_b[:12]} of site site-b is reported compromised" in text


# --- refusals, in words ---------------------------------------------------------------------------


def swapped(sim: FederationSim, folder: Path) -> None:
    """Site b's key under what site a made."""
    (folder / "model.sig").unlink()
    (folder / "model.sig").write_bytes(sign_files("adapter", folder_digests(folder), sim.sites["site-b"].signer))


def dated(hours: int) -> Callable[[FederationSim, Path], None]:
    """Made at another time, by the site's clock."""

    def change(sim: FederationSim, folder: Path) -> None:
        statement = json.loads((folder / "provenance.json").read_bytes())
        finished = format_time(datetime.now(UTC) + timedelta(hours=hours))
        statement["predicate"]["runDetails"]["metadata"]["finishedOn"] = finished
        write_json(folder / "provenance.json", statement)
        (folder / "model.sig").unlink()
        (folder / "model.sig").write_bytes(sign_files("adapter", folder_digests(folder), sim.sites["site-a"].signer))

    return change


def key_of_site_a(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["sites"][0]["keys"][0].update(fields)


def untouched(*_: Any) -> None:
    """No change."""


BEFORE, AGO = format_time(datetime.now(UTC) - HOUR), "2026-01-01T00:00:00Z"
OTHER = "urn:uuid:6b0c0000-0000-4000-8000-000000000002"

REFUSALS: dict[str, tuple[Callable[[FederationSim, Path], None], Callable[[dict[str, Any]], None], str, str]] = {
    # what happened: to the contribution, to the federation file, the code, and words of the error
    "two sites swap keys": (swapped, untouched, "SITE_MISMATCH", "claims another site than its signer"),
    "an expired key": (
        untouched, key_of_site_a(not_before=AGO, not_after=BEFORE), "KEY_EXPIRED", "did not count at that time"
    ),
    "a rotated key": (
        untouched, key_of_site_a(revoked={"at": BEFORE, "reason": "rotated"}), "KEY_REVOKED",
        "another key took its place",
    ),
    "a compromised key": (
        untouched, key_of_site_a(revoked={"at": BEFORE, "reason": "compromised"}), "KEY_REVOKED",
        "somebody else may hold it",
    ),
    "a frozen federation file": (
        untouched, lambda document: document.update(issued=AGO, expires=BEFORE), "FEDERATION_EXPIRED", "has expired"
    ),
    "the wrong federation": (
        untouched, lambda document: document.update(federation=OTHER), "FEDERATION_MISMATCH", "another federation"
    ),
    "a clock set back": (dated(hours=24), untouched, "CONTRIBUTION_FROM_FUTURE", "later than it was received"),
    "nothing": (dated(hours=0), untouched, "", "Verified as of now"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSALS)
def test_each_refusal_is_explained(made: FederationSim, run: Run, tmp_path: Path, what: str) -> None:
    """`nothing` is the control."""
    spoil, change, code, words = REFUSALS[what]
    folder = shutil.copytree(made.sites["site-a"].outbox / "adapter", tmp_path / "adapter")
    spoil(made, folder)
    (tmp_path / "federation.json").write_bytes(later(made, change))
    status, text = run(
        "verify", folder, "--federation", tmp_path / "federation.json", "--root-fingerprint", made.root.keyid
    )
    assert status == (1 if code else 0)
    assert words in text
    if code:
        assert text.startswith(f"{code}: ") and EXPLANATIONS[code] in text


def test_a_rolled_back_federation_file_is_explained(made: FederationSim, file: Path, run: Run) -> None:
    accept(made, lambda document: document)
    status, text = run("verify", file)
    assert status == 1 and text.startswith("FEDERATION_ROLLBACK: ") and EXPLANATIONS["FEDERATION_ROLLBACK"] in text


def test_the_file_given_must_be_of_the_release_s_federation(
    made: FederationSim, release: Path, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "other.json").write_bytes(later(made, lambda document: document.update(federation=OTHER)))
    trusted_federation(made.envelope, [made.root.keyid], made.now)
    arguments = ("verify", release, "--federation", tmp_path / "other.json", "--root-fingerprint", made.root.keyid)
    status, text = run(*arguments)
    assert status == 1 and "FEDERATION_MISMATCH" in text


def test_every_code_that_verifying_raises_is_explained() -> None:
    """Read from the source, so that a new check cannot be forgotten."""
    names = (
        "adapter",
        "contribution",
        "federation",
        "files",
        "folder",
        "gates",
        "provenance",
        "release",
        "revocations",
        "traces",
    )
    raised = set()
    for name in (*names, "signing", "trust_state"):
        source = (Path(fedcompose.__file__).parent / f"{name}.py").read_text()
        raised |= set(re.findall(r'RefusedError\(\s*"([A-Z_]+)"', source))
    assert "KEY_REVOKED" in raised
    assert not raised - EXPLANATIONS.keys()


def test_a_refusal_is_one_json_document_with_its_code(
    made: FederationSim, release: Path, run: Run, tmp_path: Path
) -> None:
    copy = shutil.copytree(release, tmp_path / "release")
    with (copy / "router.safetensors").open("ab") as stream:
        stream.write(b"x")
    status, text = run("verify", copy, "--root-fingerprint", made.root.keyid, "--json")
    assert status == 1
    error = json.JSONDecoder().raw_decode(text)[0]["error"]
    assert (error["code"], error["means"]) == ("FILE_CHANGED", EXPLANATIONS["FILE_CHANGED"])


def test_inspect_says_so_when_nothing_was_verified(made: FederationSim, release: Path, run: Run) -> None:
    status, text = run("inspect", release)
    assert status == 0 and "UNVERIFIED" in text and "site-b" in text
    status, text = run("inspect", release, "--root-fingerprint", made.root.keyid)
    assert status == 0 and "UNVERIFIED" not in text and "rlvr_accuracy 0.7123" in text


def test_inspect_refuses_what_was_tampered_with(made: FederationSim, release: Path, run: Run, tmp_path: Path) -> None:
    copy = shutil.copytree(release, tmp_path / "release")
    (copy / "evaluation.json").write_text("{}")
    status, text = run("inspect", copy, "--root-fingerprint", made.root.keyid)
    assert status == 1 and "FILE_UNSIGNED" in text


def guarded(*arguments: Any) -> subprocess.CompletedProcess[str]:
    program = f"{GUARD}\nfrom fedcompose.cli import main\nmain(sys.argv[1:])"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)


def test_verifying_imports_no_model_code(made: FederationSim, release: Path, file: Path) -> None:
    verified = guarded("verify", release, "--root-fingerprint", made.root.keyid)
    assert verified.returncode == 0, verified.stderr
    inspected = guarded("inspect", release, "--root-fingerprint", made.root.keyid)
    assert inspected.returncode == 0, inspected.stderr
    outbox = made.sites["site-a"].outbox
    checked = guarded("verify", outbox, "--federation", file, "--root-fingerprint", made.root.keyid)
    assert checked.returncode == 0, checked.stderr


def test_the_import_guard_itself_works() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", f"{GUARD}\nimport torch"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1 and "imported torch" in ended.stderr
