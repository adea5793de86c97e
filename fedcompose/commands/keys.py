"""`fedcompose keys`: make a signing key, and show what a key file holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fedcompose.console import AsJson, err, next_steps, out, print_json
from fedcompose.errors import ConfigError
from fedcompose.files import read_limited
from fedcompose.keys import (
    MAX_KEY_FILE_BYTES,
    PASSPHRASE_FILE_VARIABLE,
    Role,
    given_passphrase,
    load_signer,
    new_key,
    read_enrolment,
)
from fedcompose.signing import keyid_of, load_public_key

app = typer.Typer(no_args_is_help=True, help="Signing keys: one per site, coordinator and root.")

PassphraseFile = Annotated[
    Path | None,
    typer.Option(help=f"Read the passphrase from this file and do not ask; {PASSPHRASE_FILE_VARIABLE} names one too."),
]


def register(app_: typer.Typer) -> None:
    """Add the commands of this module to `app_`."""
    app_.add_typer(app, name="keys")


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Whose key it is, e.g. site-a: the id in the federation file.")],
    role: Annotated[Role, typer.Option(help="What the key is for.")],
    domain: Annotated[str | None, typer.Option(help="The site's domain, e.g. math. Only for a site.")] = None,
    folder: Annotated[Path, typer.Option("--out", help="Where the key's three files go.")] = Path("keys"),
    no_passphrase: Annotated[
        bool, typer.Option("--no-passphrase", help="Leave the private key unprotected but for its file mode.")
    ] = False,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Make a signing key and the request to enrol it.

    Example: fedcompose keys new site-a --role site --domain math
    """
    if no_passphrase and passphrase_file:
        raise ConfigError("KEY_OPTIONS", "--no-passphrase and --passphrase-file exclude each other")
    passphrase = None if no_passphrase else given_passphrase(passphrase_file, _ask_twice)
    key = new_key(folder, name, role, domain, passphrase)
    if as_json:
        paths = {"private": str(key.private), "public": str(key.public), "enrolment": str(key.enrolment)}
        print_json({"keyid": key.keyid, "role": role, "id": name, "domain": domain} | paths)
        return
    out.print(
        f"Fingerprint {key.keyid}\n"
        f"  {key.private}  private: never leaves this machine\n"
        f"  {key.public}  public\n"
        f"  {key.enrolment}  the request to be enrolled{'' if role == 'root' else ': send it to a root'}",
        markup=False,
    )
    if role == "root":
        next_steps(f"fedcompose federation init --name NAME --root-key {key.private} --base smollm2-135m")
    else:
        next_steps(f"fedcompose federation enroll {key.enrolment} --root-key ROOT.key   (done by a root)")


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A .pub, .enroll.json or .key file.")],
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Show a key's fingerprint and, from an enrolment, who asks for what.

    Example: fedcompose keys show keys/site-a.pub
    """
    shown = _describe(file, passphrase_file)
    if as_json:
        print_json(shown)
        return
    for field, value in shown.items():
        if value is not None:
            out.print(f"{field:<12} {value}", markup=False)


def _describe(file: Path, passphrase_file: Path | None) -> dict[str, Any]:
    data = read_limited(file, MAX_KEY_FILE_BYTES)
    if data.startswith(b"{"):
        enrolment = read_enrolment(data)
        public_pem = enrolment.public_key.encode()
        about = {"id": enrolment.id, "role": enrolment.role, "domain": enrolment.domain, "proof": "valid"}
    else:
        public_pem = data if data.startswith(b"-----BEGIN PUBLIC") else load_signer(file, passphrase_file).public_pem
        about = {}
    return {"fingerprint": keyid_of(public_pem), "curve": load_public_key(public_pem).curve.name, **about}


def _ask_twice() -> str:
    if not sys.stdin.isatty():
        raise ConfigError(
            "PASSPHRASE_NEEDED",
            "a new key is protected by a passphrase, and there is nobody to ask for it",
            fix="give --passphrase-file FILE; or --no-passphrase, where the file's mode is protection enough",
        )
    err.print("The passphrase protects the private key on this disk. It cannot be recovered.")
    answer: str = typer.prompt("Passphrase", hide_input=True, confirmation_prompt=True, err=True)
    return answer
