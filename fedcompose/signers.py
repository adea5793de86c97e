"""Keys that another program holds: a smart card, a hardware module, a key management service.

Wherever a command or a settings file asks for a private key, these stand in the place of a file's name:

    exec:PUBLIC.pub COMMAND ARGUMENT...   the command reads what is to be signed from standard input, and writes an
                                          ECDSA signature (DER) to standard output
    NAME:ANYTHING                         a signer of an installed package: entry point NAME of the group
                                          fedcompose.signers, a function that makes a `signing.Signer` out of ANYTHING

For example, a key on a stick that only openssl ever opens:

    exec:keys/root.pub openssl dgst -sha256 -sign /media/stick/root.pem

The command is started without a shell. Whatever comes back is verified with the public key before anybody uses it, so
that a wrong slot, a wrong hash or an error page is noticed here and not by those who receive it.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from fedcompose.errors import ConfigError, MissingError, RefusedError
from fedcompose.files import read_limited
from fedcompose.signing import Signer, check_signature, keyid_of, load_public_key

ENTRY_POINTS = "fedcompose.signers"
SIGN_TIMEOUT_S = 120  # long enough to type a PIN or touch a token
MAX_PUBLIC_KEY_BYTES = 4096
MAX_SIGNATURE_BYTES = 256  # a P-384 signature in DER has at most 104

_REFERENCE = re.compile(r"([a-z][a-z0-9_-]+):(.+)", re.DOTALL)


@dataclass(frozen=True)
class OutsideSigner:
    """A key that another program holds. Satisfies `signing.Signer`."""

    name: str
    public_pem: bytes
    _sign: Callable[[bytes], bytes] = field(repr=False)

    @property
    def keyid(self) -> str:
        return keyid_of(self.public_pem)

    def sign(self, data: bytes) -> bytes:
        """A signature that was verified.

        Raises: ConfigError: `SIGNER_FAILED`, `SIGNER_WRONG`. MissingError: `SIGNER_MISSING`.
        """
        signature = self._sign(data)
        try:
            if not isinstance(signature, bytes) or len(signature) > MAX_SIGNATURE_BYTES:
                raise RefusedError("SIGNATURE_INVALID", "not a signature")
            check_signature(self.public_pem, signature, data)
        except RefusedError as error:
            raise ConfigError(
                "SIGNER_WRONG",
                f"what {self.name} returned is not a signature by its public key",
                expected=f"an ECDSA signature in DER by key {self.keyid}, over SHA-256 (P-256) or SHA-384 (P-384)",
                fix="check which key and which hash it uses",
            ) from error
        return signature


def outside_signer(reference: str, folder: Path) -> Signer | None:
    """The signer that `exec:...` or `NAME:...` means; None for the name of a file.

    Relative names start in `folder`. A file whose own name looks like this is written `./NAME:...`.

    Raises: ConfigError: `SIGNER_REFERENCE`, `SIGNER_UNKNOWN`, `SIGNER_BROKEN`, `KEY_MISSING`.
    """
    parts = _REFERENCE.fullmatch(reference)
    if parts is None:
        return None
    return _command_signer(parts[2], folder) if parts[1] == "exec" else _plugin_signer(parts[1], parts[2])


def _command_signer(words: str, folder: Path) -> OutsideSigner:
    try:
        public, *command = shlex.split(words)
    except ValueError:
        public, command = "", []
    if not command:
        raise ConfigError(
            "SIGNER_REFERENCE",
            "an exec: key names a public key file and a command",
            expected="exec:PUBLIC.pub COMMAND ARGUMENT...",
        )
    name = Path(command[0]).name
    return OutsideSigner(name, _public_pem(folder / public), lambda data: _run(command, data, folder))


def _run(command: list[str], data: bytes, folder: Path) -> bytes:
    """What the command writes; its messages and its questions for a PIN go to the terminal."""
    try:
        done = subprocess.run(
            command, input=data, stdout=subprocess.PIPE, timeout=SIGN_TIMEOUT_S, cwd=folder, check=False
        )
    except OSError as error:
        raise MissingError("SIGNER_MISSING", f"cannot start {command[0]!a}", got=error.strerror) from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError("SIGNER_FAILED", f"{command[0]!a} did not sign within {SIGN_TIMEOUT_S} s") from error
    if done.returncode != 0:
        raise ConfigError("SIGNER_FAILED", f"{command[0]!a} did not sign", got=f"exit status {done.returncode}")
    return done.stdout


def _public_pem(path: Path) -> bytes:
    try:
        public_pem = read_limited(path, MAX_PUBLIC_KEY_BYTES)
        load_public_key(public_pem)
    except (ConfigError, RefusedError) as error:
        raise ConfigError(
            "KEY_MISSING",
            f"{path} is not the public key of an exec: key",
            got=error.what,
            fix="write it with the token's own tool, or with `openssl ec -pubout`",
        ) from error
    return public_pem


def _plugin_signer(name: str, argument: str) -> OutsideSigner:
    points = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name not in points:
        raise ConfigError(
            "SIGNER_UNKNOWN",
            f"no installed package offers a signer {name!a}",
            expected=f"one of {', '.join(sorted(points)) or 'exec'}, or the name of a key file",
            fix=f"install the package (entry point {ENTRY_POINTS}); a file of such a name is written ./{name}:...",
        )
    try:
        signer: Signer = points[name].load()(argument)
        public_pem = signer.public_pem
        load_public_key(public_pem)
    except Exception as error:  # a package of somebody else: its message may quote a PIN
        raise _broken(points[name], error) from error
    return OutsideSigner(name, public_pem, lambda data: _ask(points[name], signer, data))


def _ask(point: EntryPoint, signer: Signer, data: bytes) -> bytes:
    try:
        return signer.sign(data)
    except Exception as error:
        raise ConfigError("SIGNER_FAILED", f"{point.name} did not sign", got=type(error).__name__) from error


def _broken(point: EntryPoint, error: Exception) -> ConfigError:
    return ConfigError(
        "SIGNER_BROKEN",
        f"the installed signer {point.name!a} cannot be used",
        expected=f"{point.value} to make a signer with a P-256 or P-384 public key",
        got=type(error).__name__,
        fix=f"correct or uninstall the package {point.dist.name if point.dist else 'that provides it'}",
    )
