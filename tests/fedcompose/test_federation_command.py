"""`fedcompose federation`, typed on several machines: files go from hand to hand, nothing else does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from fedcompose.cli import app, main
from fedcompose.drafts import amend
from fedcompose.errors import FedcomposeError
from fedcompose.federation_file import read_federation
from fedcompose.files import dir_hash, folder_digests
from fedcompose.keys import NewKey, load_signer, new_key
from fedcompose.signing import SIGNATURE_FILE, keyid_of, sign_files
from fedcompose.trust_state import accepted_federation


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a test outlives none


BASE = ["--base", f"tiny={'b' * 64}"]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str) -> str:
    """The code with which a command ends."""
    with pytest.raises(FedcomposeError) as caught:
        CliRunner().invoke(app, [*arguments], catch_exceptions=False)
    return caught.value.code


@dataclass(frozen=True)
class Machine:
    """Somebody's computer: a folder to work in, and what it believes."""

    folder: Path
    use: Callable[[], None]

    def run(self, *arguments: str) -> str:
        self.use()
        return run(*arguments)

    def refused(self, *arguments: str) -> str:
        self.use()
        return refused(*arguments)

    def receive(self, name: str, sender: Machine) -> None:
        shutil.copy(sender.folder / name, self.folder / name)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Machine]:
    def make(owner: str) -> Machine:
        folder = tmp_path / owner
        folder.mkdir()

        def use() -> None:
            monkeypatch.setenv("FEDCOMPOSE_HOME", str(folder / "home"))
            monkeypatch.chdir(folder)

        return Machine(folder, use)

    return make


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root's folder with a fresh federation and a site that wants to join."""
    monkeypatch.chdir(tmp_path)
    new_key(Path("keys"), "root", "root", None, None)
    new_key(Path("keys"), "site-a", "site", "math", None)
    run("federation", "init", "--name", "Demo [1]", "--root-key", "keys/root.key", *BASE)
    return tmp_path


ROOT_KEY = ("--root-key", "keys/root.key")


# --- one root -------------------------------------------------------------------------------------


def test_the_commands_begin_enrol_and_show(folder: Path) -> None:
    said = run("federation", "enroll", "keys/site-a.enroll.json", *ROOT_KEY)
    assert "version 2" in said
    shown = run("federation", "show")
    for text in ("Demo [1]", load_signer("keys/root.key").keyid, "site-a", "math", "b" * 64, "expires"):
        assert text in shown
    assert "accepted on this machine" in shown
    assert json.loads(run("federation", "show", "--json"))["version"] == 2


def test_nothing_that_show_prints_is_cut_or_broken_at_eighty_columns(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run("federation", "enroll", "keys/site-a.enroll.json", *ROOT_KEY)
    run("federation", "withdraw", "site-a", *ROOT_KEY)
    (folder / "policy.txt").write_text("public prompts only")
    run("federation", "policy", "policy.txt", *ROOT_KEY)
    shown = run("federation", "show")
    assert max(len(line) for line in shown.splitlines()) <= 80
    for name in ("root", "site-a"):
        assert shown.count(keyid_of((folder / "keys" / f"{name}.pub").read_bytes())) >= 1
    assert "policy.txt" in shown


def test_show_warns_where_nothing_is_known(folder: Path, private_home: Path) -> None:
    (private_home / "trust-state.json").unlink()
    assert "compare the root fingerprints" in run("federation", "show")


def test_init_does_not_overwrite(folder: Path) -> None:
    before = (folder / "federation.json").read_bytes()
    assert refused("federation", "init", "--name", "X", *ROOT_KEY, *BASE) == "FEDERATION_EXISTS"
    assert (folder / "federation.json").read_bytes() == before


def test_how_many_of_several_roots_must_sign_is_not_guessed(folder: Path) -> None:
    new_key(Path("keys"), "bob", "root", None, None)
    arguments = ["--name", "X", *ROOT_KEY, *BASE, "--out", "second.json", "--root", "keys/bob.enroll.json"]
    assert refused("federation", "init", *arguments) == "THRESHOLD_MISSING"


def test_enrolling_into_an_old_copy_leaves_it_as_it_was(folder: Path) -> None:
    file = folder / "federation.json"
    old = file.read_bytes()
    run("federation", "enroll", "keys/site-a.enroll.json", *ROOT_KEY)
    new_key(Path("keys"), "site-b", "site", "code", None)
    file.write_bytes(old)
    assert refused("federation", "enroll", "keys/site-b.enroll.json", *ROOT_KEY) == "FEDERATION_ROLLBACK"
    assert file.read_bytes() == old


def test_a_version_that_this_machine_cannot_accept_is_not_left_behind(folder: Path) -> None:
    """Another file of the next version was made elsewhere with the same root key, and accepted here."""
    file = folder / "federation.json"
    mine = file.read_bytes()
    root, now = load_signer("keys/root.key"), datetime.now(UTC)
    (folder / "other.json").write_bytes(amend(mine, lambda document: document.update(name="Other"), root, now))
    run("federation", "accept", "other.json")
    assert refused("federation", "renew", *ROOT_KEY) == "FEDERATION_ROLLBACK"
    assert file.read_bytes() == mine


def test_a_base_may_be_a_folder(folder: Path) -> None:
    base = folder / "own-base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "llama"}')
    save_file({"weight": np.zeros(2, dtype=np.float32)}, base / "model.safetensors")
    arguments = ["--name", "X", *ROOT_KEY, "--base", str(base), "--out", "second.json"]
    listed = json.loads(run("federation", "init", *arguments, "--json"))["base_models"]
    assert [(entry["name"], len(entry["dirHash"])) for entry in listed] == [("own-base", 64)]
    run("federation", "bases", "--add", f"other={'c' * 64}", "--remove", "tiny", *ROOT_KEY)
    assert [entry["name"] for entry in json.loads(run("federation", "show", "--json"))["base_models"]] == ["other"]


def test_the_policy_is_bound_by_its_digest(folder: Path) -> None:
    (folder / "policy.txt").write_text("public prompts only")
    run("federation", "policy", "policy.txt", *ROOT_KEY)
    assert "is 'policy.txt', here" in run("federation", "show")
    (folder / "policy.txt").write_text("anything goes")
    assert "its document is not in this folder" in run("federation", "show")


def test_a_site_changes_its_key_and_the_root_takes_the_new_one(folder: Path) -> None:
    run("federation", "enroll", "keys/site-a.enroll.json", *ROOT_KEY)
    run("keys", "rotate", "keys/site-a.enroll.json", "--no-passphrase")
    run("federation", "rotate", "keys/site-a-2.enroll.json", *ROOT_KEY)
    federation, _ = read_federation((folder / "federation.json").read_bytes())
    now = datetime.now(UTC)
    for key in ("keys/site-a.key", "keys/site-a-2.key"):
        assert federation.site_key(load_signer(key).keyid, now)[0].id == "site-a"
    later = now + timedelta(days=15)
    assert federation.site_key(load_signer("keys/site-a-2.key").keyid, later)
    with pytest.raises(FedcomposeError):
        federation.site_key(load_signer("keys/site-a.key").keyid, later)


def test_a_site_is_suspended_reinstated_and_revoked(folder: Path) -> None:
    run("federation", "enroll", "keys/site-a.enroll.json", *ROOT_KEY)
    assert "SUSPENDED" in run("federation", "suspend", "site-a", *ROOT_KEY) + run("federation", "show")
    run("federation", "reinstate", "site-a", *ROOT_KEY)
    assert "SUSPENDED" not in run("federation", "show")
    run("federation", "revoke", "site-a", "--reason", "compromised", "--at", "2026-01-02", *ROOT_KEY)
    assert "REVOKED (compromised) from 2026-01-02T00:00:00Z" in run("federation", "show")


@pytest.mark.parametrize("at", ["yesterday", "2026-13-01", "2026-11-20T09:00:00", "2099-01-01"])
def test_a_time_that_is_none_or_lies_ahead_is_refused(folder: Path, at: str) -> None:
    run("federation", "enroll", "keys/site-a.enroll.json", *ROOT_KEY)
    for command in ("revoke", "withdraw"):
        arguments = ["federation", command, "site-a", "--reason", "compromised", "--at", at, *ROOT_KEY]
        assert refused(*arguments) == "TIME_INVALID"


# --- several roots, several machines --------------------------------------------------------------


@dataclass(frozen=True)
class Roots:
    """Three roots, of whom two must sign, each at an own machine; the first version is accepted on all."""

    ann: Machine
    bob: Machine
    eve: Machine
    fingerprints: list[str]

    @property
    def all(self) -> list[Machine]:
        return [self.ann, self.bob, self.eve]


def fingerprint_options(*keyids: str) -> list[str]:
    return [text for keyid in keyids for text in ("--root-fingerprint", keyid)]


@pytest.fixture
def three(machine: Callable[[str], Machine]) -> Roots:
    ann, bob, eve = machines = [machine(name) for name in ("ann", "bob", "eve")]
    keyids = []
    for each in machines:
        each.run("keys", "new", each.folder.name, "--role", "root", "--no-passphrase")
        keyids.append(keyid_of((each.folder / "keys" / f"{each.folder.name}.pub").read_bytes()))
    others = [
        text for each in (bob, eve) for text in ("--root", str(each.folder / f"keys/{each.folder.name}.enroll.json"))
    ]
    ann.run("federation", "init", "--name", "Demo", "--root-key", "keys/ann.key", *others, "--threshold", "2", *BASE)
    assert not (ann.folder / "federation.json").exists()
    bob.receive("federation.draft.json", ann)
    bob.run("federation", "sign", "federation.draft.json", "--root-key", "keys/bob.key", "--yes")
    for each in (ann, eve):
        each.receive("federation.json", bob)
        each.run("federation", "accept", "federation.json", *fingerprint_options(*keyids[:2]))
    return Roots(ann, bob, eve, keyids)


def test_several_roots_make_and_change_a_federation_without_a_network(
    three: Roots, machine: Callable[[str], Machine]
) -> None:
    ann, bob, eve = three.all
    new_key(ann.folder / "inbox", "site-a", "site", "math", None)
    said = ann.run("federation", "enroll", "inbox/site-a.enroll.json", "--root-key", "keys/ann.key")
    assert "DRAFT of version 2" in said
    assert "1 more: bob, eve" in said
    ann.run("federation", "suspend", "site-a", "--root-key", "keys/ann.key")  # into the same draft

    eve.receive("federation.draft.json", ann)
    shown = eve.run("federation", "show", "federation.draft.json")
    assert "DRAFT, believed by nobody" in shown
    assert "+ site site-a" in shown
    said = eve.run("federation", "sign", "federation.draft.json", "--root-key", "keys/eve.key", "--yes")
    assert "version 2" in said
    assert not (eve.folder / "federation.draft.json").exists()

    member = machine("member")
    for each in (ann, bob, member):
        each.receive("federation.json", eve)
    assert "+ site site-a" in ann.run("federation", "accept", "federation.json")
    bob.run("federation", "accept", "federation.json")
    assert member.refused("federation", "accept", "federation.json") == "TRUST_ROOT_UNKNOWN"
    one, two = fingerprint_options(three.fingerprints[0]), fingerprint_options(*three.fingerprints[::2])
    assert member.refused("federation", "accept", "federation.json", *one) == "TRUST_ROOT_UNKNOWN"
    member.run("federation", "accept", "federation.json", *two)


def test_a_draft_is_not_accepted_anywhere(three: Roots) -> None:
    ann, bob, _ = three.all
    ann.run("federation", "renew", "--root-key", "keys/ann.key")
    for each in (ann, bob):
        each.receive("federation.draft.json", ann) if each is bob else None
        assert each.refused("federation", "accept", "federation.draft.json") == "FEDERATION_THRESHOLD"
    assert json.loads(bob.run("federation", "show", "--json"))["version"] == 1


def test_nobody_signs_unread(three: Roots) -> None:
    ann, bob, _ = three.all
    ann.run("federation", "renew", "--root-key", "keys/ann.key")
    bob.receive("federation.draft.json", ann)
    arguments = ["federation", "sign", "federation.draft.json", "--root-key", "keys/bob.key"]
    before = (bob.folder / "federation.draft.json").read_bytes()
    assert bob.refused(*arguments) == "SIGN_UNREAD"
    assert (bob.folder / "federation.draft.json").read_bytes() == before


def test_a_stranger_and_a_root_of_nothing_accepted_do_not_sign(three: Roots, machine: Callable[[str], Machine]) -> None:
    ann, bob, _ = three.all
    ann.run("federation", "renew", "--root-key", "keys/ann.key")
    bob.receive("federation.draft.json", ann)
    new_key(bob.folder / "keys", "mallory", "root", None, None)
    arguments = ["federation", "sign", "federation.draft.json", "--yes", "--root-key"]
    assert bob.refused(*arguments, "keys/mallory.key") == "FEDERATION_SIGNERS"
    fresh = machine("fresh")
    fresh.receive("federation.draft.json", ann)
    assert fresh.refused(*arguments, str(bob.folder / "keys/bob.key")) == "FEDERATION_GAP"


def test_roots_change_with_the_signatures_of_old_and_new(three: Roots) -> None:
    ann, bob, eve = three.all
    ann.run("keys", "rotate", "keys/ann.enroll.json", "--no-passphrase")
    ann.run("federation", "rotate", "keys/ann-2.enroll.json", "--root-key", "keys/ann.key")
    ann.run("federation", "roots", "--remove", "eve", "--root-key", "keys/ann.key")
    bob.receive("federation.draft.json", ann)
    said = bob.run("federation", "sign", "federation.draft.json", "--root-key", "keys/bob.key", "--yes")
    assert "1 more of the new roots: ann" in said  # bob and the old key of ann are enough of the old ones
    assert not (bob.folder / "federation.json").samefile(bob.folder / "federation.draft.json")
    ann.receive("federation.draft.json", bob)
    ann.run("federation", "sign", "federation.draft.json", "--root-key", "keys/ann-2.key", "--yes")
    for each in (bob, eve):
        each.receive("federation.json", ann)
        each.run("federation", "accept", "federation.json")
    assert eve.refused("federation", "renew", "--root-key", "keys/eve.key") == "FEDERATION_SIGNERS"
    assert "1 more: bob" in ann.run("federation", "renew", "--root-key", "keys/ann-2.key")


def test_a_machine_that_missed_the_change_of_roots_accepts_the_versions_in_their_order(three: Roots) -> None:
    ann, bob, eve = three.all
    for number, left in ((2, "eve"), (3, None)):
        change = ["roots", "--remove", left] if left else ["renew"]
        ann.run("federation", *change, "--root-key", "keys/ann.key")
        bob.receive("federation.draft.json", ann)
        bob.run("federation", "sign", "federation.draft.json", "--root-key", "keys/bob.key", "--yes")
        ann.receive("federation.json", bob)
        ann.run("federation", "accept", "federation.json")
        shutil.copy(ann.folder / "federation.json", eve.folder / f"v{number}.json")
    assert eve.refused("federation", "accept", "v3.json", "v2.json") == "FEDERATION_ROLLBACK"
    eve.run("federation", "accept", "v2.json", "v3.json")
    assert eve.refused("federation", "accept", "v2.json") == "FEDERATION_ROLLBACK"


# --- withdrawing ----------------------------------------------------------------------------------


def test_one_root_withdraws_a_site_and_every_machine_heeds_it(three: Roots) -> None:
    ann, bob, eve = three.all
    site = new_key(ann.folder / "inbox", "site-a", "site", "math", None)
    ann.run("federation", "enroll", "inbox/site-a.enroll.json", "--root-key", "keys/ann.key")
    bob.receive("federation.draft.json", ann)
    bob.run("federation", "sign", "federation.draft.json", "--root-key", "keys/bob.key", "--yes")
    for each in (ann, eve):
        each.receive("federation.json", bob)
        each.run("federation", "accept", "federation.json")

    eve.run("federation", "withdraw", "site-a", "--root-key", "keys/eve.key")
    bob.receive("revocations.json", eve)
    assert site.keyid in bob.run("federation", "accept", "revocations.json")
    identity = read_federation((bob.folder / "federation.json").read_bytes())[0].id
    now = datetime.now(UTC) + timedelta(seconds=1)
    for each, withdrawn in ((bob, True), (eve, True), (ann, False)):
        each.use()
        federation = accepted_federation(identity)
        assert federation is not None
        if withdrawn:
            with pytest.raises(FedcomposeError, match="revoked"):
                federation.site_key(site.keyid, now)
        else:
            assert federation.site_key(site.keyid, now)  # the list has not reached ann yet


def test_a_list_is_not_replayed_and_says_nothing_twice(folder: Path) -> None:
    run("federation", "enroll", "keys/site-a.enroll.json", *ROOT_KEY)
    run("federation", "withdraw", "site-a", "--reason", "rotated", *ROOT_KEY)
    shutil.copy("revocations.json", "first.json")
    run("federation", "withdraw", "site-a", *ROOT_KEY)  # compromised, after all
    assert refused("federation", "accept", "first.json") == "REVOCATIONS_ROLLBACK"
    assert refused("federation", "withdraw", "site-a", *ROOT_KEY) == "FEDERATION_INPUT"


def test_only_a_root_withdraws_and_only_what_is_there(folder: Path) -> None:
    run("federation", "enroll", "keys/site-a.enroll.json", *ROOT_KEY)
    new_key(Path("keys"), "mallory", "root", None, None)
    assert refused("federation", "withdraw", "site-a", "--root-key", "keys/mallory.key") == "FEDERATION_SIGNERS"
    for nothing in ("site-b", "0" * 64, "root"):
        assert refused("federation", "withdraw", nothing, *ROOT_KEY) == "FEDERATION_INPUT"
    assert not Path("revocations.json").exists()


def signed_folder(folder: Path, key: NewKey) -> str:
    """A folder with a signature over one file; returns its dirHash."""
    folder.mkdir()
    (folder / "composition.json").write_text("{}")
    digests = folder_digests(folder)
    (folder / SIGNATURE_FILE).write_bytes(sign_files("release", digests, load_signer(key.private)))
    return dir_hash(digests)


def test_a_withdrawn_release_is_named_by_what_the_coordinator_signed(folder: Path) -> None:
    hub = new_key(Path("keys"), "hub", "coordinator", None, None)
    run("federation", "enroll", str(hub.enrolment), *ROOT_KEY)
    released = signed_folder(folder / "release", hub)
    signed_folder(folder / "other", new_key(Path("keys"), "mallory", "coordinator", None, None))
    (folder / "release" / "composition.json").write_text("altered since")
    said: dict[str, Any] = json.loads(run("federation", "withdraw", "release", *ROOT_KEY, "--json"))
    assert [entry["dirHash"] for entry in said["releases"]] == [released]
    assert refused("federation", "withdraw", "other", *ROOT_KEY) == "KEY_UNKNOWN"
    assert refused("federation", "withdraw", "keys", *ROOT_KEY) == "FILE_MISSING"


def test_a_member_is_meant_before_a_folder_of_its_name(folder: Path) -> None:
    run("federation", "enroll", "keys/site-a.enroll.json", *ROOT_KEY)
    (folder / "site-a").mkdir()
    assert json.loads(run("federation", "withdraw", "site-a", *ROOT_KEY, "--json"))["keys"]


def test_the_exit_status_of_a_refusal_is_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("federation", "renew", *ROOT_KEY)
    Path("old.json").write_bytes(Path("federation.json").read_bytes())
    run("federation", "renew", *ROOT_KEY)
    with pytest.raises(SystemExit) as stopped:
        main(["federation", "accept", "old.json"])
    assert stopped.value.code == 1
    assert "FEDERATION_ROLLBACK" in capsys.readouterr().err
