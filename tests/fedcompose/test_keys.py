"""Private keys stay private, enrolments prove possession."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from typer.testing import CliRunner

from fedcompose.cli import app, main
from fedcompose.errors import ConfigError, FedcomposeError, RefusedError
from fedcompose.keys import (
    ENROLMENT_TYPE,
    NewKey,
    check_handed_over,
    load_signer,
    new_key,
    read_enrolment,
    read_node_key,
)
from fedcompose.signing import Signer, check_signature, keyid_of, sign_envelope

PASSPHRASE = b"correct horse"


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(FedcomposeError) as caught:
        call()
    return caught.value.code


def site_key(folder: Path, passphrase: bytes | None = None) -> NewKey:
    return new_key(folder / "keys", "site-a", "site", "math", passphrase)


@pytest.fixture
def passphrase_file(tmp_path: Path) -> Path:
    path = tmp_path / "passphrase"
    path.write_bytes(PASSPHRASE + b"\n")
    return path


def test_a_new_key_signs_what_its_public_file_verifies(tmp_path: Path) -> None:
    key = site_key(tmp_path)
    signer = load_signer(key.private)
    check_signature(key.public.read_bytes(), signer.sign(b"data"), b"data")
    assert signer.keyid == key.keyid == keyid_of(key.public.read_bytes())


def test_signatures_are_deterministic(tmp_path: Path) -> None:
    signer = load_signer(site_key(tmp_path).private)
    assert signer.sign(b"data") == signer.sign(b"data") != signer.sign(b"date")


def test_only_the_owner_may_read_the_private_file(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        key = site_key(tmp_path)
    finally:
        os.umask(old)
    assert key.private.stat().st_mode & 0o777 == 0o600
    assert key.private.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601])
def test_refuses_a_private_file_that_others_may_use(tmp_path: Path, mode: int) -> None:
    key = site_key(tmp_path)
    key.private.chmod(mode)
    assert code_of(lambda: load_signer(key.private)) == "KEY_EXPOSED"


def test_refuses_a_folder_into_which_others_may_write(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys").chmod(0o777)
    assert code_of(lambda: site_key(tmp_path)) == "KEY_FOLDER_OPEN"
    assert list((tmp_path / "keys").iterdir()) == []


@pytest.mark.parametrize("ending", ["key", "pub", "enroll.json"])
def test_never_overwrites_a_key(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "keys" / f"site-a.{ending}"
    path.parent.mkdir()
    path.symlink_to("nowhere")
    assert code_of(lambda: site_key(tmp_path)) == "KEY_EXISTS"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_leaves_no_half_key_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedcompose.keys.write_atomic", full_disk)
    with pytest.raises(OSError, match="No space"):
        site_key(tmp_path)
    assert list((tmp_path / "keys").iterdir()) == []


# --- passphrases ----------------------------------------------------------------------------------


def test_a_passphrase_protects_the_key(tmp_path: Path, passphrase_file: Path) -> None:
    key = site_key(tmp_path, PASSPHRASE)
    assert load_signer(key.private, passphrase_file).keyid == key.keyid
    wrong = tmp_path / "wrong"
    wrong.write_bytes(b"another")
    assert code_of(lambda: load_signer(key.private, wrong)) == "PASSPHRASE_WRONG"
    assert b"ENCRYPTED" in key.private.read_bytes()


def test_the_passphrase_file_may_be_named_by_a_variable(
    tmp_path: Path, passphrase_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = site_key(tmp_path, PASSPHRASE)
    assert code_of(lambda: load_signer(key.private)) == "PASSPHRASE_NEEDED"
    monkeypatch.setenv("FEDCOMPOSE_PASSPHRASE_FILE", str(passphrase_file))
    assert load_signer(key.private).keyid == key.keyid


def test_refuses_an_absent_or_empty_passphrase_file(tmp_path: Path) -> None:
    key = site_key(tmp_path, PASSPHRASE)
    empty = tmp_path / "empty"
    assert code_of(lambda: load_signer(key.private, empty)) == "PASSPHRASE_UNREADABLE"
    empty.write_bytes(b"\n")
    assert code_of(lambda: load_signer(key.private, empty)) == "PASSPHRASE_EMPTY"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
def test_openssl_opens_a_protected_key(tmp_path: Path, passphrase_file: Path) -> None:
    key = site_key(tmp_path, PASSPHRASE)
    command = ["openssl", "pkey", "-in", str(key.private), "-passin", f"file:{passphrase_file}", "-pubout"]
    assert subprocess.run(command, capture_output=True, check=True).stdout == key.public.read_bytes()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
@pytest.mark.parametrize("curve", ["prime256v1", "secp384r1"])
def test_opens_a_key_that_openssl_made(tmp_path: Path, curve: str) -> None:
    path = tmp_path / "own.key"
    command = ["openssl", "ecparam", "-name", curve, "-genkey", "-noout", "-out", str(path)]
    subprocess.run(command, capture_output=True, check=True)
    path.chmod(0o600)
    signer = load_signer(path)
    check_signature(signer.public_pem, signer.sign(b"data"), b"data")


def pkcs8(key: Any) -> bytes:
    pem: bytes = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return pem


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense",
        pkcs8(ed25519.Ed25519PrivateKey.from_private_bytes(b"5" * 32)),
        pkcs8(ec.derive_private_key(5, ec.SECP521R1())),
    ],
    ids=["empty", "nonsense", "Ed25519", "P-521"],
)
def test_refuses_other_private_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.key"
    path.write_bytes(content)
    path.chmod(0o600)
    assert code_of(lambda: load_signer(path)) == "KEY_UNREADABLE"
    path.unlink()
    assert code_of(lambda: load_signer(path)) == "KEY_MISSING"


def test_a_signer_does_not_show_its_key(tmp_path: Path) -> None:
    key = site_key(tmp_path)
    signer = load_signer(key.private)
    body = key.private.read_text().splitlines()[1:-1]
    number = signer._key.private_numbers().private_value
    shown = f"{signer!r} {signer} {[signer]}"
    key.private.write_text(key.private.read_text().replace("END", "END OF"))
    with pytest.raises(ConfigError) as damaged:
        load_signer(key.private)
    shown += damaged.value.diagnostics() + str(damaged.value)
    assert not [secret for secret in ("_key=", str(number), f"{number:x}", *body) if secret in shown]


# --- enrolment ------------------------------------------------------------------------------------


def enrolment_by(signer: Signer, **changes: Any) -> bytes:
    document = {
        "schema": "fedcompose/enrolment/v1",
        "id": "site-a",
        "role": "site",
        "domain": "math",
        "public_key": signer.public_pem.decode(),
    } | changes
    return sign_envelope(json.dumps(document).encode(), ENROLMENT_TYPE, [signer])


def test_an_enrolment_says_who_asks_for_what(tmp_path: Path) -> None:
    key = site_key(tmp_path)
    enrolment = read_enrolment(key.enrolment.read_bytes())
    assert (enrolment.id, enrolment.role, enrolment.domain) == ("site-a", "site", "math")
    assert enrolment.public_key.encode() == key.public.read_bytes()
    assert key.private.read_bytes() not in key.enrolment.read_bytes()


def test_nobody_enrols_a_key_that_they_do_not_hold(tmp_path: Path) -> None:
    mine = load_signer(site_key(tmp_path / "mine").private)
    theirs = load_signer(site_key(tmp_path / "theirs").private)
    stolen = enrolment_by(mine, public_key=theirs.public_pem.decode())
    assert code_of(lambda: read_enrolment(stolen)) == "ENVELOPE_KEY"


def test_refuses_a_changed_enrolment(tmp_path: Path) -> None:
    envelope = json.loads(site_key(tmp_path).enrolment.read_bytes())
    payload = base64.b64decode(envelope["payload"]).replace(b"site-a", b"site-b")
    envelope["payload"] = base64.b64encode(payload).decode()
    assert code_of(lambda: read_enrolment(json.dumps(envelope).encode())) == "ENVELOPE_INVALID"


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "../x"},
        {"id": "Site"},
        {"id": "site-a\n"},
        {"role": "admin"},
        {"role": "coordinator"},
        {"domain": None},
        {"schema": "fedcompose/enrolment/v2"},
        {"extra": 1},
    ],
)
def test_refuses_an_enrolment_of_another_form(tmp_path: Path, changes: dict[str, Any]) -> None:
    signer = load_signer(site_key(tmp_path).private)
    assert read_enrolment(enrolment_by(signer)).id == "site-a"
    assert code_of(lambda: read_enrolment(enrolment_by(signer, **changes))) == "ENROLMENT_INVALID"


def test_a_key_that_takes_over_is_asked_for_by_both_keys_and_lies_beside_the_old_one(tmp_path: Path) -> None:
    old = site_key(tmp_path)
    signer = load_signer(old.private)
    second = new_key(tmp_path / "keys", "site-a", "site", "math", None, old=signer)
    third = new_key(tmp_path / "keys", "site-a", "site", "math", None, old=load_signer(second.private))
    assert (second.private.name, third.enrolment.name) == ("site-a-2.key", "site-a-3.enroll.json")
    request = second.enrolment.read_bytes()
    assert read_enrolment(request).replaces == old.keyid
    check_handed_over(request, old.public.read_bytes())
    assert code_of(lambda: check_handed_over(request, third.public.read_bytes())) == "ENVELOPE_KEY"


@pytest.mark.parametrize("key", ["", "ключ", "-----BEGIN PUBLIC KEY-----\n"])
def test_refuses_an_enrolment_without_a_usable_key(tmp_path: Path, key: str) -> None:
    envelope = enrolment_by(load_signer(site_key(tmp_path).private), public_key=key)
    with pytest.raises(RefusedError) as caught:
        read_enrolment(envelope)
    assert caught.value.code == "KEY_UNUSABLE"


@pytest.mark.parametrize(
    ("name", "role", "domain"),
    [
        ("site-a", "site", None),
        ("hub", "coordinator", "math"),
        ("Site", "site", "math"),
        ("a/b", "root", None),
    ],
)
def test_makes_no_key_for_an_impossible_member(tmp_path: Path, name: str, role: Any, domain: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        new_key(tmp_path / "keys", name, role, domain, None)
    assert caught.value.code == "KEY_NAME"
    assert not (tmp_path / "keys").exists()


# --- commands -------------------------------------------------------------------------------------


def run(*arguments: str, stdin: str = "") -> str:
    result = CliRunner().invoke(app, [*arguments], input=stdin, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_prints_the_fingerprint_the_files_and_the_next_step(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    said = run("keys", "new", "site-a", "--role", "site", "--domain", "math", "--out", str(folder), "--no-passphrase")
    assert keyid_of((folder / "site-a.pub").read_bytes()) in said
    assert str(folder / "site-a.key") in said
    assert f"fedcompose federation enroll {folder / 'site-a.enroll.json'}" in said


def test_the_command_shows_every_kind_of_key_file(tmp_path: Path, passphrase_file: Path) -> None:
    key = site_key(tmp_path, PASSPHRASE)
    for path in (key.public, key.enrolment, key.private):
        shown = json.loads(run("keys", "show", str(path), "--passphrase-file", str(passphrase_file), "--json"))
        assert shown["fingerprint"] == key.keyid
    assert "role         site" in run("keys", "show", str(key.enrolment))


def test_the_command_does_not_make_an_unprotected_key_by_accident(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["keys", "new", "hub", "--role", "coordinator", "--out", str(tmp_path / "keys")])
    assert stopped.value.code == 2
    assert "PASSPHRASE_NEEDED" in capsys.readouterr().err
    assert not (tmp_path / "keys").exists()


def test_the_command_makes_the_key_that_takes_over(tmp_path: Path, passphrase_file: Path) -> None:
    old = site_key(tmp_path, PASSPHRASE)
    told = json.loads(
        run("keys", "rotate", str(old.enrolment), "--passphrase-file", str(passphrase_file), "--json"),
    )
    assert (told["replaces"], told["private"]) == (old.keyid, str(old.private.with_name("site-a-2.key")))
    assert load_signer(told["private"], passphrase_file).keyid == told["keyid"] != old.keyid
    assert f"replaces     {old.keyid}" in run("keys", "show", told["enrolment"])


def test_the_command_hands_over_from_no_other_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine, other = site_key(tmp_path / "mine"), site_key(tmp_path / "other")
    with pytest.raises(SystemExit) as stopped:
        main(["keys", "rotate", str(mine.enrolment), "--key", str(other.private), "--no-passphrase"])
    assert stopped.value.code == 2
    assert "KEY_OTHER" in capsys.readouterr().err
    assert len(list(mine.private.parent.iterdir())) == 4


# --- node keys ------------------------------------------------------------------------------------


def test_a_site_gets_a_key_for_its_connection_that_its_enrolment_names(tmp_path: Path) -> None:
    key = site_key(tmp_path, PASSPHRASE)
    assert key.node is not None and key.node.stat().st_mode & 0o777 == 0o600
    private, public = read_node_key(key.node)
    assert read_enrolment(key.enrolment.read_bytes()).node_key == public
    assert private.startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----")
    assert public.encode() != key.public.read_bytes()


@pytest.mark.parametrize("role", ["root", "coordinator"])
def test_nobody_else_gets_one(tmp_path: Path, role: Any) -> None:
    key = new_key(tmp_path / "keys", "hub", role, None, None)
    assert key.node is None
    assert read_enrolment(key.enrolment.read_bytes()).node_key is None
    assert not list((tmp_path / "keys").glob("*.node.key"))


@pytest.mark.parametrize("node_key", ["", "ecdsa-sha2-nistp384 AAAA", "P-256"])
def test_an_enrolment_with_another_kind_of_node_key_is_refused(tmp_path: Path, node_key: str) -> None:
    signer = load_signer(site_key(tmp_path).private)
    given = signer.public_pem.decode() if node_key == "P-256" else node_key
    document = {"schema": "fedcompose/enrolment/v1", "id": "site-a", "role": "site", "domain": "math"}
    document |= {"public_key": signer.public_pem.decode(), "node_key": given}
    envelope = sign_envelope(json.dumps(document).encode(), ENROLMENT_TYPE, [signer])
    assert code_of(lambda: read_enrolment(envelope)) == "ENROLMENT_INVALID"


def test_a_node_key_that_others_may_read_is_not_used(tmp_path: Path) -> None:
    key = site_key(tmp_path)
    assert key.node is not None
    key.node.chmod(0o640)
    assert code_of(lambda: read_node_key(key.node or tmp_path)) == "KEY_EXPOSED"
