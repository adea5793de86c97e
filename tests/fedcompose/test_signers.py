"""Keys that another program holds: what comes back is verified, and nothing is run through a shell."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedcompose import signers
from fedcompose.cli import app
from fedcompose.drafts import create_federation
from fedcompose.errors import MissingError
from fedcompose.federation_file import read_federation
from fedcompose.keys import NewKey, load_signer, new_key
from fedcompose.signers import OutsideSigner
from fedcompose.signing import check_signature
from tests.federation_files import BASES, NOW, URN, code_of

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")


@pytest.fixture
def key(tmp_path: Path) -> NewKey:
    return new_key(tmp_path / "keys", "root", "root", None, None)


def openssl(key: NewKey, digest: str = "-sha256") -> str:
    """The key as openssl alone uses it."""
    return f"exec:{key.public} openssl dgst {digest} -sign {key.private}"


def script(folder: Path, body: str) -> str:
    """A command that does something else than signing."""
    path = folder / "tool.py"
    path.write_text(f"import sys\ndata = sys.stdin.buffer.read()\n{body}\n")
    return f"{sys.executable} {path}"


def test_a_command_signs_and_what_it_returns_verifies(key: NewKey) -> None:
    signer = load_signer(openssl(key))
    assert signer.keyid == key.keyid
    check_signature(key.public.read_bytes(), signer.sign(b"data"), b"data")


def test_a_command_may_hold_a_p384_key(tmp_path: Path) -> None:
    private, public = tmp_path / "p384.key", tmp_path / "p384.pub"
    make = ["openssl", "ecparam", "-name", "secp384r1", "-genkey", "-noout", "-out", str(private)]
    subprocess.run(make, capture_output=True, check=True)
    subprocess.run(
        ["openssl", "ec", "-in", str(private), "-pubout", "-out", str(public)], capture_output=True, check=True
    )
    signer = load_signer(f"exec:{public} openssl dgst -sha384 -sign {private}")
    check_signature(public.read_bytes(), signer.sign(b"data"), b"data")


def test_a_federation_begins_with_a_key_that_this_program_never_reads(key: NewKey) -> None:
    federation, signed = read_federation(create_federation("Demo", load_signer(openssl(key)), "root", BASES, URN, NOW))
    assert signed == {key.keyid} == {root.keyid for root in federation.roots}


def test_another_hash_or_another_key_is_noticed_before_anybody_sees_it(key: NewKey, tmp_path: Path) -> None:
    other = new_key(tmp_path / "other", "root", "root", None, None)
    wrong_key = f"exec:{key.public} openssl dgst -sha256 -sign {other.private}"
    for reference in (openssl(key, "-sha384"), wrong_key):
        assert code_of(lambda it=reference: load_signer(it).sign(b"data")) == "SIGNER_WRONG"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("", "SIGNER_WRONG"),
        ("print('please insert card')", "SIGNER_WRONG"),
        ("sys.stdout.buffer.write(b'0' * 100_000)", "SIGNER_WRONG"),
        ("sys.exit(3)", "SIGNER_FAILED"),
    ],
    ids=["nothing", "a message", "a flood", "an error"],
)
def test_anything_but_a_signature_is_refused(key: NewKey, tmp_path: Path, body: str, code: str) -> None:
    signer = load_signer(f"exec:{key.public} {script(tmp_path, body)}")
    assert code_of(lambda: signer.sign(b"data")) == code


def test_a_command_that_hangs_is_given_up(key: NewKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signers, "SIGN_TIMEOUT_S", 0.2)
    signer = load_signer(f"exec:{key.public} {script(tmp_path, 'import time; time.sleep(60)')}")
    assert code_of(lambda: signer.sign(b"data")) == "SIGNER_FAILED"


def test_no_shell_reads_the_command(key: NewKey, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    signer = load_signer(
        f"exec:{key.public} openssl dgst -sha256 -sign {key.private} ; touch {marker} $(touch {marker})"
    )
    code_of(lambda: signer.sign(b"data"))
    assert not marker.exists()


def test_relative_names_start_in_the_folder_of_the_settings(key: NewKey) -> None:
    folder = key.private.parent
    assert load_signer("root.key", folder=folder).keyid == key.keyid
    signer = load_signer("exec:root.pub openssl dgst -sha256 -sign root.key", folder=folder)
    check_signature(key.public.read_bytes(), signer.sign(b"data"), b"data")


@pytest.mark.parametrize(
    ("reference", "code"),
    [
        ("exec:", "KEY_MISSING"),
        ("exec:only.pub", "SIGNER_REFERENCE"),
        ("exec:'unclosed openssl", "SIGNER_REFERENCE"),
        ("exec:absent.pub openssl dgst", "KEY_MISSING"),
        ("exec:keys/root.key openssl dgst", "KEY_MISSING"),
        ("nobody-offers-this:x", "SIGNER_UNKNOWN"),
        ("keys/absent.key", "KEY_MISSING"),
    ],
)
def test_refuses_other_references(
    key: NewKey, tmp_path: Path, reference: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert code_of(lambda: load_signer(reference)) == code


def test_a_command_that_is_not_installed_is_said_to_be_missing(key: NewKey) -> None:
    with pytest.raises(MissingError) as caught:
        load_signer(f"exec:{key.public} no-such-tool-here --sign").sign(b"data")
    assert caught.value.code == "SIGNER_MISSING"


# --- installed packages ---------------------------------------------------------------------------

PACKAGE = """
from pathlib import Path
from fedcompose.keys import load_signer

def good(argument):
    return load_signer(Path(argument))

def broken(argument):
    raise RuntimeError("PIN 1234 is wrong")

class Mute:
    def __init__(self, argument):
        self.public_pem = Path(argument).with_suffix(".pub").read_bytes()
        self.keyid = "0" * 64
    def sign(self, data):
        raise RuntimeError("PIN 1234 is wrong")
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that offers signers: a real one, in a folder of the import path."""
    site = tmp_path / "site-packages"
    information = site / "demo_tokens-1.0.dist-info"
    information.mkdir(parents=True)
    (site / "demo_tokens.py").write_text(PACKAGE)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: demo-tokens\nVersion: 1.0\n")
    points = "good = demo_tokens:good\nbroken = demo_tokens:broken\nmute = demo_tokens:Mute\n"
    (information / "entry_points.txt").write_text(f"[fedcompose.signers]\n{points}")
    monkeypatch.syspath_prepend(str(site))


@pytest.mark.usefixtures("package")
def test_an_installed_package_adds_a_kind_of_key(key: NewKey) -> None:
    signer = load_signer(f"good:{key.private}")
    assert isinstance(signer, OutsideSigner)
    assert signer.keyid == key.keyid
    check_signature(key.public.read_bytes(), signer.sign(b"data"), b"data")


@pytest.mark.usefixtures("package")
def test_a_package_that_fails_is_named_and_its_message_is_not_repeated(key: NewKey) -> None:
    with pytest.raises(Exception, match="cannot be used") as broken:
        load_signer(f"broken:{key.private}")
    assert "1234" not in str(vars(broken.value))
    mute = load_signer(f"mute:{key.private}")
    assert mute.keyid == key.keyid  # not what the package says
    assert code_of(lambda: mute.sign(b"data")) == "SIGNER_FAILED"


@pytest.mark.usefixtures("package")
def test_a_file_may_have_a_name_like_a_signer(key: NewKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(key.private, tmp_path / "good:x")
    assert load_signer("./good:x").keyid == key.keyid


# --- everywhere a private key is asked for --------------------------------------------------------


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_root_whose_key_is_elsewhere_enrols_a_site(
    key: NewKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    elsewhere = "exec:keys/root.pub openssl dgst -sha256 -sign keys/root.key"
    name = ["--name", "Demo", "--base", f"tiny={'b' * 64}"]
    run("federation", "init", *name, "--root-key", elsewhere, "--root", "keys/root.enroll.json")
    site = new_key(tmp_path / "keys", "site-a", "site", "math", None)
    run("federation", "enroll", str(site.enrolment), "--root-key", elsewhere)
    federation, signed = read_federation((tmp_path / "federation.json").read_bytes())
    assert (federation.roots[0].name, signed) == ("root", {key.keyid})
    assert federation.site_key(site.keyid, datetime.now(UTC))


def test_a_key_that_exists_elsewhere_asks_to_be_enrolled(key: NewKey, tmp_path: Path) -> None:
    told = json.loads(
        run("keys", "new", "hub", "--role", "coordinator", "--signer", openssl(key), "--out", str(tmp_path), "--json")
    )
    assert told["keyid"] == key.keyid
    assert "private" not in told
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["hub.enroll.json", "hub.pub"]
    assert f"fingerprint  {key.keyid}" in run("keys", "show", told["enrolment"])
    assert f"fingerprint  {key.keyid}" in run("keys", "show", openssl(key))


def test_the_settings_of_a_role_may_name_a_key_that_is_elsewhere(key: NewKey, tmp_path: Path) -> None:
    from fedcompose_coordinator.config import CONFIG_NAME, load_config

    reference = "exec:keys/root.pub openssl dgst -sha256 -sign keys//root.key"
    (tmp_path / CONFIG_NAME).write_text(f'id = "hub"\nbase = "tiny"\nkey = "{reference}"\n')
    config = load_config(tmp_path)
    assert config.key == reference
    assert load_signer(config.key, folder=tmp_path).sign(os.urandom(8))
