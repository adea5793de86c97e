"""OpenSSF's own tool and securesystemslib accept what we sign, and we accept what they sign.

They live in an environment of their own (`make interop`), named by FEDCOMPOSE_INTEROP_PYTHON: nothing of
them is needed to use fedcompose, and their many dependencies stay out of it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedcompose.errors import RefusedError
from fedcompose.files import dir_hash, folder_digests
from fedcompose.keys import NewKey, load_signer, new_key
from fedcompose.signing import SIGNATURE_FILE, public_pem_of, sign_files, verify_envelope, verify_files
from tests.attacks.federations import two_roots
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


# Random folders, several to a process, because their tool takes half a second to start.
VERIFY_ALL = """
import sys, model_signing.verifying as verifying
for folder in sys.argv[1:]:
    key = verifying.Config().use_elliptic_key_verifier(public_key=folder + ".pub")
    key.verify(folder, folder + "/model.sig")
"""
SIGN_ALL = """
import sys, model_signing.signing as signing
for folder in sys.argv[1:]:
    key = signing.Config().use_elliptic_key_signer(private_key=folder + ".key")
    key.sign(folder, folder + "/model.sig")
"""


def random_folder(folder: Path, seed: int) -> Path:
    """A few files of any size and depth, and a key on either curve beside the folder."""
    random = Random(seed)
    letters = "abcXYZ019_-."
    for _ in range(random.randint(1, 12)):
        parts = ["a" + "".join(random.choices(letters, k=random.randint(0, 12))) for _ in range(random.randint(1, 3))]
        path = folder.joinpath(*(part.strip(".") for part in parts))
        if any(parent.is_file() for parent in path.parents) or path.is_dir() or "a." in path.name:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.randbytes(random.choice((0, 1, 1000, 70_000))))
    if not any(path.is_file() for path in folder.rglob("*")):
        folder.mkdir(exist_ok=True)
        (folder / "a").write_bytes(b"a")
    private = ec.generate_private_key(random.choice((ec.SECP256R1(), ec.SECP384R1())))
    folder.with_suffix(".key").write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    folder.with_suffix(".key").chmod(0o600)
    folder.with_suffix(".pub").write_bytes(public_pem_of(private.public_key()))
    return folder


@pytest.fixture
def random_folders(tmp_path: Path) -> list[Path]:
    return [random_folder(tmp_path / f"folder-{seed}", seed) for seed in range(20)]


def test_random_folders_on_either_curve_that_we_sign(random_folders: list[Path]) -> None:
    for folder in random_folders:
        bundle = sign_files(folder.name, folder_digests(folder), load_signer(folder.with_suffix(".key")))
        (folder / SIGNATURE_FILE).write_bytes(bundle)
    accepted = run("-c", VERIFY_ALL, *random_folders)
    assert accepted.returncode == 0, accepted.stderr
    change_a_byte(random_folders[-1])
    assert run("-c", VERIFY_ALL, *random_folders).returncode != 0


def test_random_folders_on_either_curve_that_they_sign(random_folders: list[Path]) -> None:
    expected = {folder: folder_digests(folder) for folder in random_folders}
    signed = run("-c", SIGN_ALL, *random_folders)
    assert signed.returncode == 0, signed.stderr
    for folder, digests in expected.items():
        bundle, public = (folder / SIGNATURE_FILE).read_bytes(), folder.with_suffix(".pub").read_bytes()
        assert dict(verify_files(bundle, public).digests) == digests
        with pytest.raises(RefusedError):
            verify_files(bundle.replace(b"dsseEnvelope", b"dsseenvelope"), public)


VERIFY_DSSE = """
import hashlib, json, sys
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey
envelope = Envelope.from_dict(json.load(open(sys.argv[1])))
pems = [open(path).read() for path in sys.argv[2:]]
keyids = [hashlib.sha256(pem.encode()).hexdigest() for pem in pems]
keys = [SSlibKey(keyid, "ecdsa", "ecdsa-sha2-nistp256", {"public": pem}) for keyid, pem in zip(keyids, pems)]
envelope.verify(keys, len(keys))
"""

SIGN_DSSE = """
import hashlib, json, sys
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner, SSlibKey
payload, kind, *keys = sys.argv[1:]
envelope = Envelope(payload.encode(), kind, {})
for path in keys:
    pem = open(path + ".pub").read()
    keyid = hashlib.sha256(pem.encode()).hexdigest()
    public = SSlibKey(keyid, "ecdsa", "ecdsa-sha2-nistp256", {"public": pem})
    envelope.sign(CryptoSigner(load_pem_private_key(open(path + ".key", "rb").read(), None), public))
print(json.dumps(envelope.to_dict()))
"""


def test_securesystemslib_accepts_a_federation_file_that_two_roots_signed(tmp_path: Path) -> None:
    made = two_roots()
    path = tmp_path / "federation.json"
    path.write_bytes(made.current)
    keys = [tmp_path / f"{name}.pub" for name in ("root-1", "root-2", "hub")]
    for key in keys:
        key.write_bytes(made.keys[key.stem].public_pem)
    accepted = run("-c", VERIFY_DSSE, path, *keys[:2])
    assert accepted.returncode == 0, accepted.stderr
    assert run("-c", VERIFY_DSSE, path, *keys).returncode != 0  # the coordinator has not signed
    path.write_bytes(made.current.replace(b'"payload":"', b'"payload":"e30', 1))
    assert run("-c", VERIFY_DSSE, path, *keys[:2]).returncode != 0


def test_we_accept_what_securesystemslib_signs(tmp_path: Path) -> None:
    keys = [new_key(tmp_path / "keys", name, "root", None, None) for name in ("root-1", "root-2")]
    kind, payload = "application/vnd.fedcompose.test.v1+json", '{"schema": "é"}'
    signed = run("-c", SIGN_DSSE, payload, kind, *(key.private.with_suffix("") for key in keys))
    assert signed.returncode == 0, signed.stderr
    pems = {key.keyid: key.public.read_bytes() for key in keys}
    verified = verify_envelope(signed.stdout.encode(), kind, pems)
    assert (verified.payload, verified.keyids) == (payload.encode(), pems.keys())
