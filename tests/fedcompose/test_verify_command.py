from __future__ import annotations

import base64
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
from fedcompose.document import format_time
from fedcompose.drafts import amend
from fedcompose.explanations import EXPLANATIONS
from fedcompose.federation import Revocation
from fedcompose.federation_file import FEDERATION_TYPE
from fedcompose.files import folder_digests, sha256_hex, write_json
from fedcompose.revocations import RevokedKey, next_revocations, no_revocations
from fedcompose.signing import sign_envelope, sign_files
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


NEXT_YEAR, YEAR_AFTER = (format_time(datetime.now(UTC) + timedelta(days=days)) for days in (365, 730))
BEFORE, AGO = format_time(datetime.now(UTC) - HOUR), "2026-01-01T00:00:00Z"
OTHER = "urn:uuid:6b0c0000-0000-4000-8000-000000000002"

REFUSALS: dict[str, tuple[Callable[[FederationSim, Path], None], Callable[[dict[str, Any]], None], str, str]] = {
    # what happened: to the contribution, to the federation file, the code, and words of the error
    "two sites swap keys": (
        swapped, untouched, "SITE_MISMATCH", "the key of site site-b signed what claims to come from site site-a"
    ),
    "an expired key": (
        untouched, key_of_site_a(not_before=AGO, not_after=BEFORE), "KEY_EXPIRED", "the key of site site-a had expired"
    ),
    "a key of tomorrow": (
        untouched, key_of_site_a(not_before=NEXT_YEAR, not_after=YEAR_AFTER), "KEY_EXPIRED", "did not count yet"
    ),
    "a rotated key": (
        untouched, key_of_site_a(revoked={"at": BEFORE, "reason": "rotated"}), "KEY_REVOKED",
        "another key took its place\n  expected  a time before",
    ),
    "a compromised key": (
        untouched, key_of_site_a(revoked={"at": BEFORE, "reason": "compromised"}), "KEY_REVOKED",
        "do not use this; ask its owner, by phone or in person",
    ),
    "a frozen federation file": (
        untouched, lambda document: document.update(issued=AGO, expires=BEFORE), "FEDERATION_EXPIRED",
        "version 5 of the federation file has expired",
    ),
    "the wrong federation": (
        untouched, lambda document: document.update(federation=OTHER), "FEDERATION_MISMATCH",
        "signed for another federation than 'Test'",
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


def is_explained(refused: tuple[int, str], code: str, *words: str) -> None:
    """The code, then what was expected and found, then what it means."""
    status, text = refused
    assert status == 1 and text.startswith(f"{code}: ") and text.endswith(f"\n\n{EXPLANATIONS[code]}\n")
    assert all(each in text for each in words), text


def test_a_rolled_back_federation_file_is_explained(made: FederationSim, file: Path, release: Path, run: Run) -> None:
    accept(made, lambda document: document)
    words = (
        "expected  version 5 or later\n  got       version 4",
        "ask a root or the coordinator for the current file",
    )
    is_explained(run("verify", file), "FEDERATION_ROLLBACK", *words)
    is_explained(run("federation", "accept", file), "FEDERATION_ROLLBACK", *words)
    is_explained(run("verify", release, "--federation", file), "FEDERATION_ROLLBACK", *words)


def test_a_federation_file_that_is_shown_until_it_expires_is_explained(
    made: FederationSim, run: Run, tmp_path: Path
) -> None:
    """What this machine accepted expires while nobody brings a newer one."""
    before = made.now - timedelta(days=100)
    old = later(made, lambda document: document.update(issued=format_time(before), expires=BEFORE))
    trusted_federation(old, [made.root.keyid], before)
    is_explained(
        run("verify", made.sites["site-a"].outbox), "FEDERATION_EXPIRED", f"a time before {BEFORE}", "or check this"
    )


def test_keys_that_two_sites_swapped_in_the_federation_file_are_explained(
    made: FederationSim, run: Run, tmp_path: Path
) -> None:
    trusted_federation(made.envelope, [made.root.keyid], made.now)
    payload = base64.b64decode(json.loads(made.envelope)["payload"])
    document = json.loads(payload)
    document |= {"version": document["version"] + 1, "previous": sha256_hex(payload)}
    first, second = document["sites"]
    first["keys"], second["keys"] = second["keys"], first["keys"]
    swap = tmp_path / "swapped.json"
    swap.write_bytes(sign_envelope(json.dumps(document).encode(), FEDERATION_TYPE, [made.root]))
    words = ("a key was given to another holder", "to stay with site site-b", "got       site site-a")
    is_explained(run("federation", "accept", swap), "FEDERATION_KEY_MOVED", *words)


def test_a_clock_set_back_is_explained(made: FederationSim, file: Path, run: Run, private_home: Path) -> None:
    trusted_federation(made.envelope, [made.root.keyid], made.now + timedelta(days=5))
    words = ("this machine's clock is behind: it has been later before", "set the clock; if it is right")
    is_explained(run("federation", "accept", file), "CLOCK_BEHIND", *words)
    is_explained(run("verify", made.sites["site-a"].outbox, "--federation", file), "CLOCK_BEHIND", *words)


def test_a_contribution_that_is_sent_again_is_explained(sim: FederationSim, run: Run, tmp_path: Path) -> None:
    """To the coordinator, which alone remembers what came before."""
    trusted_federation(sim.envelope, [sim.root.keyid], sim.now)
    settings = f'id = "hub"\nbase = "{sim.base.path}"\nkey = "keys/hub.key"\n'
    (sim.coordinator_home / "coordinator.toml").write_text(settings)
    sim.contribute("site-a")
    old = shutil.copytree(sim.sites["site-a"].outbox / "adapter", tmp_path / "old")
    (old / "README.md").unlink(missing_ok=True)
    sim.contribute("site-a")
    assert run("coordinator", "receive", "--home", sim.coordinator_home, sim.sites["site-a"].outbox)[0] == 0
    status, text = run("coordinator", "receive", "--home", sim.coordinator_home, old)
    assert status == 1 and "REPLAYED: site site-a sent a contribution that is older than one received before" in text
    assert "expected  a sequence number above" in text and EXPLANATIONS["REPLAYED"] in text


# --- what is no signed folder ---------------------------------------------------------------------


def test_says_what_is_wrong_with_the_path(made: FederationSim, release: Path, run: Run, tmp_path: Path) -> None:
    for command in ("verify", "inspect"):
        status, text = run(command, tmp_path / "nowhere")
        assert status == 2 and text.startswith(f"FOLDER_MISSING: {tmp_path / 'nowhere'} is not a readable folder")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    is_explained(run("verify", tmp_path / "other"), "CONTRIBUTION_UNKNOWN", "the folder is not a contribution")
    status, text = run("inspect", release / "federation.json")
    assert status == 2 and "is a file" in text and "fedcompose federation show FILE" in text


def test_says_which_command_is_for_another_file(made: FederationSim, release: Path, run: Run, tmp_path: Path) -> None:
    entry = RevokedKey(keyid=made.coordinator.keyid, at=made.now, reason="rotated")
    listed = tmp_path / "revocations.json"
    listed.write_bytes(next_revocations(no_revocations(made.federation.id), [entry], [], made.root, made.now))
    is_explained(
        run("verify", listed), "ENVELOPE_TYPE", "is no federation file", "vnd.fedcompose.revocations.v1+json",
        "from then on applied, by: fedcompose federation accept FILE",
    )  # fmt: skip
    for name in ("composition.json", "router.safetensors"):
        is_explained(run("verify", release / name), "ENVELOPE_SHAPE", "is no federation file", "name its folder")


def test_verifies_an_outbox_by_the_folder_above_its_domain(made: FederationSim, file: Path, run: Run) -> None:
    above = made.sites["site-a"].outbox.parent
    status, text = run("verify", above, "--federation", file, "--root-fingerprint", made.root.keyid)
    assert status == 0 and text.count("Verified as of now") == 2


def test_an_unknown_federation_is_explained_with_what_to_do(made: FederationSim, release: Path, run: Run) -> None:
    words = ("give them: --root-fingerprint FINGERPRINT", "`fedcompose federation accept FILE` with them")
    is_explained(run("verify", release), "TRUST_ROOT_UNKNOWN", *words)


def test_a_memory_of_another_version_is_named_with_the_way_out(
    made: FederationSim, release: Path, file: Path, run: Run, private_home: Path
) -> None:
    trusted_federation(made.envelope, [made.root.keyid], made.now)
    state = private_home / "trust-state.json"
    document = json.loads(state.read_bytes())
    for remembered in document["federations"].values():
        del remembered["seen"], remembered["history"]
    write_json(state, document)
    status, text = run("verify", release)
    assert status == 2 and text.startswith(f"TRUST_STATE_INVALID: {state} is damaged, or another version of fedcompose")
    assert "move it away, and accept the newest federation file and revocation list once more" in text
    state.rename(private_home / "moved")
    assert run("federation", "accept", file, "--root-fingerprint", made.root.keyid)[0] == 0
    assert run("verify", release)[0] == 0


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
