"""Make, protect and load a signing key: P-256, in a file that OpenSSL opens too.

Input: an identity (`site-a`, a site) and a passphrase. Output: three files, `site-a.key` (private, stays
here), `site-a.pub` and `site-a.enroll.json` (both to be handed to whoever keeps the federation file). A site also gets
`site-a.node.key`, by which its connection to the coordinator is known and nothing is signed. The
enrolment is signed with the new key, which proves that whoever asks to be enrolled holds it; one that takes over from
an older key is signed with that key as well. For a key that another program holds (`signers.py`) there are the last
two files only.

A protected key is PKCS#8 with scrypt and AES-256 (`pkcs8.py`). Signing keys serve no other purpose: transport has
its own.
"""

from __future__ import annotations

import getpass
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Annotated, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedcompose.errors import ConfigError, RefusedError
from fedcompose.files import disk_errors, dump_json, parse_json, write_atomic
from fedcompose.pkcs8 import protected_pem
from fedcompose.signers import outside_signer
from fedcompose.signing import (
    Signer,
    keyid_of,
    load_public_key,
    public_pem_of,
    read_envelope_unverified,
    sign_envelope,
    signature_hash,
    verify_envelope,
)

ENROLMENT_TYPE = "application/vnd.fedcompose.enrolment.v1+json"
PASSPHRASE_FILE_VARIABLE = "FEDCOMPOSE_PASSPHRASE_FILE"  # noqa: S105 - names a variable that names a file

MAX_KEY_FILE_BYTES = 16_384
MAX_PASSPHRASE_BYTES = 1024

Role = Literal["site", "coordinator", "root"]
Keyid = Annotated[str, Field(pattern=r"^[0-9a-f]{64}\z")]
# Names of sites, coordinators, roots and domains end up in file names and on terminals.
Identifier = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}\z")]


def _transport_key(text: str) -> str:
    """A public key on P-384, which Flower takes, and which the signing keys that we make are not on."""
    try:
        curve = load_public_key(text.encode("ascii", "replace")).curve.name
    except RefusedError as error:
        raise ValueError(error.what) from error
    if curve != "secp384r1":
        raise ValueError("a node key is on P-384")
    return text


# The public key of a site's connection, in PEM form.
NodeKey = Annotated[str, AfterValidator(_transport_key)]


class Enrolment(BaseModel):
    """What a new key asks for: to be known as `id`, in this role."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_: Literal["fedcompose/enrolment/v1"] = Field(alias="schema")
    id: Identifier
    role: Role
    domain: Identifier | None = None
    public_key: str
    node_key: NodeKey | None = None  # of a site's connection; it signs nothing
    replaces: Keyid | None = None  # the key that this one takes over from; its holder signed the enrolment too

    @model_validator(mode="after")
    def _only_sites_have_a_domain(self) -> Enrolment:
        if (self.domain is not None) != (self.role == "site"):
            raise ValueError("a site has a domain, and nobody else has one")
        if self.node_key is not None and self.role != "site":
            raise ValueError("only a site has a node key")
        return self


@dataclass(frozen=True)
class FileSigner:
    """A private key read from a file. Satisfies `signing.Signer`."""

    keyid: str
    public_pem: bytes
    _key: ec.EllipticCurvePrivateKey = field(repr=False)

    def sign(self, data: bytes) -> bytes:
        """ECDSA without a random number that could fail: the same bytes give the same signature."""
        algorithm = ec.ECDSA(signature_hash(self._key.public_key()), deterministic_signing=True)
        return self._key.sign(data, algorithm)


@dataclass(frozen=True)
class NewKey:
    """Where a new key was written, and the fingerprint to read out on the phone."""

    keyid: str
    private: Path
    public: Path
    enrolment: Path
    node: Path | None  # the private key of a site's connection


def new_key(
    folder: Path, holder: str, role: Role, domain: str | None, passphrase: bytes | None, old: Signer | None = None
) -> NewKey:
    """Make a key for `holder` in `folder`; without a passphrase only the file's mode protects it.

    A key that takes over from an `old` one lies beside it, as `site-a-2`.

    Raises: ConfigError: `KEY_NAME`, `KEY_EXISTS` (a key is never overwritten), `KEY_FOLDER_OPEN`.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    signer, node_key = _signer(key), _new_node_key(role)
    request = _new_enrolment(holder, role, domain, signer, node_key, old)
    private, node, public, enrolment = _unused(folder, holder, numbered=old is not None)
    _private_folder(folder)
    try:
        with disk_errors(folder):
            _write_private(private, _private_pem(key, passphrase))
            _write_node_key(node, node_key)
        write_atomic(public, signer.public_pem)
        write_atomic(enrolment, request)
    except BaseException:  # nobody has seen this key yet, and half of it is of no use
        for path in (private, node, public):
            path.unlink(missing_ok=True)
        raise
    return NewKey(signer.keyid, private, public, enrolment, node if node_key else None)


def adopt_key(
    folder: Path, holder: str, role: Role, domain: str | None, signer: Signer, old: Signer | None = None
) -> tuple[Path, Path]:
    """Write the public file and the enrolment of a key that exists already, say in a hardware module.

    A site's node key is made all the same: it only opens the connection.

    Raises: ConfigError: `KEY_NAME`, `KEY_EXISTS`, `KEY_FOLDER_OPEN`.
    """
    node_key = _new_node_key(role)
    request = _new_enrolment(holder, role, domain, signer, node_key, old)
    _, node, public, enrolment = _unused(folder, holder, numbered=old is not None)
    _private_folder(folder)
    with disk_errors(folder):
        _write_node_key(node, node_key)
    write_atomic(public, signer.public_pem)
    write_atomic(enrolment, request)
    return public, enrolment


def _unused(folder: Path, holder: str, *, numbered: bool) -> tuple[Path, Path, Path, Path]:
    """The names of a key's files; `numbered` ones beside older keys: -2, -3 and so on."""
    for number in count(2):
        stem = f"{holder}-{number}" if numbered else holder
        private, node, public, enrolment = (
            folder / f"{stem}.{ending}" for ending in ("key", "node.key", "pub", "enroll.json")
        )
        taken = [path for path in (private, node, public, enrolment) if os.path.lexists(path)]
        if not taken:
            return private, node, public, enrolment
        if not numbered:
            raise ConfigError(
                "KEY_EXISTS",
                f"{taken[0]} exists",
                fix="choose another name or folder; for a new key in the place of this one: fedcompose keys rotate",
            )
    raise AssertionError("numbers end")


def read_enrolment(envelope: bytes) -> Enrolment:
    """An enrolment whose sender holds the private key that it names.

    Raises: RefusedError: `ENROLMENT_INVALID`, or an `ENVELOPE_*` or `KEY_UNUSABLE` code when the proof fails.
    """
    claimed = _parse_enrolment(read_envelope_unverified(envelope, ENROLMENT_TYPE))
    public_pem = public_key_bytes(claimed.public_key)
    verified = verify_envelope(envelope, ENROLMENT_TYPE, {keyid_of(public_pem): public_pem})
    return _parse_enrolment(verified.payload)


def check_handed_over(envelope: bytes, old_public_pem: bytes) -> None:
    """The holder of the older key signed this enrolment too.

    Raises: RefusedError: `ENVELOPE_KEY`, `ENVELOPE_INVALID`.
    """
    verify_envelope(envelope, ENROLMENT_TYPE, {keyid_of(old_public_pem): old_public_pem})


def public_key_bytes(text: str) -> bytes:
    """The bytes of a public key that a JSON document carries as text, known to be a usable key.

    Raises: RefusedError: `KEY_UNUSABLE`.
    """
    public_pem = text.encode("ascii", "replace")  # what is not ASCII is not canonical PEM and fails the next line
    load_public_key(public_pem)
    return public_pem


def load_signer(key: str | Path, passphrase_file: Path | None = None, *, folder: Path = Path()) -> Signer:
    """The key in a file, or one that another program holds: `exec:...` or `NAME:...`, see `signers.py`.

    Relative names start in `folder`. A protected file takes its passphrase as `given_passphrase` says.

    Raises: ConfigError: `KEY_MISSING`, `KEY_EXPOSED` (others may read the file), `KEY_UNREADABLE`,
        `PASSPHRASE_*`, `SIGNER_*`.
    """
    return outside_signer(str(key), folder) or _load_file(folder / key, passphrase_file)


def needs_passphrase(key: str | Path, folder: Path = Path()) -> bool:
    """Whether the key is a file that a passphrase protects.

    Raises: ConfigError: `KEY_MISSING`, `KEY_EXPOSED`.
    """
    return outside_signer(str(key), folder) is None and _is_protected(_read_private(folder / key))


def _is_protected(pem: bytes) -> bool:
    return b"ENCRYPTED" in pem.split(b"\n", 1)[0]


def _load_file(path: Path, passphrase_file: Path | None) -> FileSigner:
    pem = _read_private(path)
    protected = _is_protected(pem)
    passphrase = None
    if protected:
        passphrase = given_passphrase(passphrase_file, lambda: _ask(f"Passphrase of {path.name}: "))
    try:
        key = serialization.load_pem_private_key(pem, passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        if protected:
            raise ConfigError("PASSPHRASE_WRONG", f"the passphrase does not open {path}") from error
        raise ConfigError("KEY_UNREADABLE", f"{path} is not a private key in PEM form") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in ("secp256r1", "secp384r1"):
        raise ConfigError("KEY_UNREADABLE", f"{path} is another kind of key", expected="ECDSA on P-256 or P-384")
    return _signer(key)


def given_passphrase(passphrase_file: Path | None, ask: Callable[[], str]) -> bytes:
    """The passphrase from a file (an option, or FEDCOMPOSE_PASSPHRASE_FILE), or else from a person.

    A file is the weaker choice: whoever reads it and the key has both. A command line never carries one.

    Raises: ConfigError: `PASSPHRASE_UNREADABLE`, `PASSPHRASE_EMPTY`.
    """
    named = os.environ.get(PASSPHRASE_FILE_VARIABLE)
    path = passphrase_file or (Path(named) if named else None)
    if path is None:
        passphrase = ask().encode()
    else:
        try:
            with path.open("rb") as stream:
                passphrase = stream.read(MAX_PASSPHRASE_BYTES).rstrip(b"\r\n")
        except OSError as error:
            raise ConfigError("PASSPHRASE_UNREADABLE", f"cannot read {path}", got=error.strerror) from error
    if not passphrase:
        raise ConfigError("PASSPHRASE_EMPTY", "the passphrase is empty")
    return passphrase


def _ask(prompt: str) -> str:
    if not sys.stdin.isatty():
        raise ConfigError(
            "PASSPHRASE_NEEDED",
            "this key needs a passphrase, and there is nobody to ask for it",
            fix=f"name a file that holds it: --passphrase-file FILE, or {PASSPHRASE_FILE_VARIABLE}=FILE",
        )
    return getpass.getpass(prompt)


def _signer(key: ec.EllipticCurvePrivateKey) -> FileSigner:
    public_pem = public_pem_of(key.public_key())
    return FileSigner(keyid_of(public_pem), public_pem, key)


def _new_node_key(role: Role) -> ec.EllipticCurvePrivateKey | None:
    return ec.generate_private_key(ec.SECP384R1()) if role == "site" else None


def _new_enrolment(
    holder: str,
    role: Role,
    domain: str | None,
    signer: Signer,
    node_key: ec.EllipticCurvePrivateKey | None,
    old: Signer | None,
) -> bytes:
    """The signed enrolment of a new key; the key that it takes over from signs as well."""
    try:
        enrolment = Enrolment(
            schema="fedcompose/enrolment/v1",
            id=holder,
            role=role,
            domain=domain,
            public_key=signer.public_pem.decode(),
            node_key=public_pem_of(node_key.public_key()).decode() if node_key else None,
            replaces=old.keyid if old else None,
        )
    except ValidationError as error:
        raise ConfigError(
            "KEY_NAME",
            f"cannot make a key for this {role}",
            expected="names of small letters, digits, - and _; a domain for a site, and for nobody else",
            got="; ".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors()),
        ) from error
    document = dump_json(enrolment.model_dump(by_alias=True, exclude_none=True))
    return sign_envelope(document, ENROLMENT_TYPE, [signer, old] if old else [signer])


def _parse_enrolment(payload: bytes) -> Enrolment:
    try:
        return Enrolment.model_validate(parse_json(payload, "the enrolment"))
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise RefusedError("ENROLMENT_INVALID", "not an enrolment of this version", got=reason) from error


# --- the private file -----------------------------------------------------------------------------


def _private_folder(folder: Path) -> None:
    """Make `folder` for its owner alone, or make sure that nobody else can put files into an existing one."""
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError("KEY_FOLDER_OPEN", f"others may write into {folder}", fix=f"chmod 700 {folder}")


def _write_private(path: Path, pem: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(pem)
        stream.flush()
        os.fsync(stream.fileno())


def _write_node_key(path: Path, key: ec.EllipticCurvePrivateKey | None) -> None:
    """In the form that Flower reads; unprotected, because the connection has to come back without a person."""
    if key is not None:
        plain, openssh = serialization.NoEncryption(), serialization.PrivateFormat.OpenSSH
        _write_private(path, key.private_bytes(serialization.Encoding.PEM, openssh, plain))


def read_node_key(path: Path) -> tuple[bytes, str]:
    """The private bytes of a site's node key, as they stand in its file, and its public half in PEM form.

    Raises: ConfigError: `KEY_MISSING`, `KEY_EXPOSED`, `KEY_UNREADABLE`.
    """
    private = _read_private(path)
    try:
        key = serialization.load_ssh_private_key(private, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError("KEY_UNREADABLE", f"{path} is not a private key in OpenSSH form") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp384r1":
        raise ConfigError("KEY_UNREADABLE", f"{path} is another kind of key", expected="ECDSA on P-384")
    return private, public_pem_of(key.public_key()).decode()


def _read_private(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(
            "KEY_MISSING",
            f"cannot read the key {path}",
            got=error.strerror,
            fix="name another file, or make a key: fedcompose keys new --help",
        ) from error
    with os.fdopen(descriptor, "rb") as stream:
        if os.fstat(descriptor).st_mode & 0o077:
            raise ConfigError("KEY_EXPOSED", f"others may use the private key {path}", fix=f"chmod 600 {path}")
        return stream.read(MAX_KEY_FILE_BYTES)


def _private_pem(key: ec.EllipticCurvePrivateKey, passphrase: bytes | None) -> bytes:
    plain, pkcs8 = serialization.NoEncryption(), serialization.PrivateFormat.PKCS8
    if passphrase is None:
        return key.private_bytes(serialization.Encoding.PEM, pkcs8, plain)
    return protected_pem(key.private_bytes(serialization.Encoding.DER, pkcs8, plain), passphrase)
