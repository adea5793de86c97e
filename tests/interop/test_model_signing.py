"""OpenSSF's own tool and securesystemslib accept what we sign, and we accept what they sign.

They live in an environment of their own (`make interop`), named by FEDCOMPOSE_INTEROP_PYTHON: nothing of
them is needed to use fedcompose, and their many dependencies stay out of it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedcompose.errors import RefusedError
from fedcompose.federation import create_federation
from fedcompose.files import dir_hash, folder_digests
from fedcompose.keys import NewKey, load_signer, new_key
from fedcompose.signing import SIGNATURE_FILE, sign_files, verify_files
from tests.federation_sim import FederationSim

PYTHON = os.environ.get("FEDCOMPOSE_INTEROP_PYTHON")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="FEDCOMPOSE_INTEROP_PYTHON names no Python with model-signing (`make interop` makes one)"
)

FLAT = ("adapter_config.json", "adapter_model.safetensors", "provenance.json")
# The two orders in use disagree exactly here: "site-a-b/" sorts before "site-a/" by code point, after it by
# path part.
RELEASE = (
    "composition.json",
    "router.safetensors",
    *(f"ingredients/{site}/{name}" for site in ("site-a", "site-a-b") for name in (*FLAT, SIGNATURE_FILE)),
)


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(PYTHON), *map(str, arguments)], capture_output=True, text=True, check=False)


def tool(action: str, folder: Path, *options: str | Path) -> subprocess.CompletedProcess[str]:
    command = ("-m", "model_signing", action, "key", folder, "--signature", folder / SIGNATURE_FILE)
    return run(*command, *options)


@pytest.fixture
def key(tmp_path: Path) -> NewKey:
    return new_key(tmp_path / "keys", "site-a", "site", "math", None)


@pytest.fixture(params=[FLAT, RELEASE], ids=["flat", "release"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for number, name in enumerate(request.param):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]) * 100)
    return folder


def sign(folder: Path, key: NewKey) -> None:
    bundle = sign_files(folder.name, folder_digests(folder), load_signer(key.private))
    (folder / SIGNATURE_FILE).write_bytes(bundle)


def test_their_tool_accepts_our_signature(folder: Path, key: NewKey) -> None:
    sign(folder, key)
    result = tool("verify", folder, "--public_key", key.public)
    assert result.returncode == 0, result.stdout + result.stderr


def change_a_byte(folder: Path) -> None:
    path = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SIGNATURE_FILE)[0]
    path.write_bytes(b"\xff" + path.read_bytes()[1:])


def add_a_file(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"x")


def remove_a_file(folder: Path) -> None:
    next(folder.rglob("*.safetensors")).unlink()


@pytest.mark.parametrize("tamper", [change_a_byte, add_a_file, remove_a_file])
def test_their_tool_refuses_a_changed_folder(folder: Path, key: NewKey, tamper: Callable[[Path], None]) -> None:
    sign(folder, key)
    tamper(folder)
    assert tool("verify", folder, "--public_key", key.public).returncode != 0


def test_their_library_accepts_our_signature_without_being_told_what_to_ignore(folder: Path, key: NewKey) -> None:
    sign(folder, key)
    script = (
        "import sys, model_signing.verifying as v;"
        "v.Config().use_elliptic_key_verifier(public_key=sys.argv[1]).verify(sys.argv[2], sys.argv[3])"
    )
    result = run("-c", script, key.public, folder, folder / SIGNATURE_FILE)
    assert result.returncode == 0, result.stderr


def test_we_accept_their_signature(folder: Path, key: NewKey) -> None:
    expected = folder_digests(folder)
    result = tool("sign", folder, "--private_key", key.private)
    assert result.returncode == 0, result.stdout + result.stderr
    signed = verify_files((folder / SIGNATURE_FILE).read_bytes(), key.public.read_bytes())
    assert dict(signed.digests) == expected
    assert dir_hash(signed.digests) == dir_hash(expected)


def test_we_refuse_their_signature_under_another_key(folder: Path, key: NewKey, tmp_path: Path) -> None:
    assert tool("sign", folder, "--private_key", key.private).returncode == 0
    other = new_key(tmp_path / "keys", "site-b", "site", "math", None)
    with pytest.raises(RefusedError) as caught:
        verify_files((folder / SIGNATURE_FILE).read_bytes(), other.public.read_bytes())
    assert caught.value.code == "SIGNATURE_KEY"


def test_their_tool_accepts_a_real_contribution_and_a_real_release(sim: FederationSim, tmp_path: Path) -> None:
    site = sim.sites["site-a"]
    release = sim.released().path
    for folder, signer in (
        (site.outbox / "adapter", site.signer),
        (release, sim.coordinator),
        (release / "ingredients" / "site-a", site.signer),
    ):
        public = tmp_path / "signer.pub"
        public.write_bytes(signer.public_pem)
        result = tool("verify", folder, "--public_key", public)
        assert result.returncode == 0, f"{folder}: {result.stdout}{result.stderr}"


DSSE = """
import sys, json
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey
envelope = Envelope.from_dict(json.load(open(sys.argv[1])))
pem = open(sys.argv[2]).read()
keyid = next(iter(envelope.signatures))
key = SSlibKey(keyid, "ecdsa", "ecdsa-sha2-nistp256", {"public": pem})
envelope.verify([key], 1)
"""


def test_securesystemslib_accepts_our_federation_file(key: NewKey, tmp_path: Path) -> None:
    now, urn = datetime(2026, 11, 20, tzinfo=UTC), "urn:uuid:6b0c0000-0000-4000-8000-000000000000"
    path = tmp_path / "federation.json"
    path.write_bytes(create_federation("Demo", load_signer(key.private), "root", {}, urn, now))
    accepted = run("-c", DSSE, path, key.public)
    assert accepted.returncode == 0, accepted.stderr
    other = new_key(tmp_path / "keys", "other", "root", None, None)
    assert run("-c", DSSE, path, other.public).returncode != 0
