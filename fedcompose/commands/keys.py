"""`fedcompose keys`: make a signing key, make the one that follows it, and show what a key file holds."""

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
    Enrolment,
    Role,
    adopt_key,
    given_passphrase,
    load_signer,
    new_key,
    read_enrolment,
)
from fedcompose.signing import Signer, keyid_of, load_public_key

HELP = """Signing keys: one per site, coordinator and root.

`keys new` makes three files. NAME.key is private and never leaves its machine,
NAME.pub is public, and NAME.enroll.json is the request to be listed in the
federation file: it proves that its sender holds the private key. Nobody
believes a key before the roots have listed it. A site also gets
NAME.node.key, by which the coordinator knows its connection. It signs nothing.

A key counts for a year. Before it ends: keys rotate. If somebody else may have
got hold of it, tell a root at once, who withdraws it: federation withdraw.

A key need not be a file. Wherever a command or a settings file asks for a
private key, this works too:

  "exec:PUBLIC.pub COMMAND ARGUMENT..."

The command (of a smart card, a hardware module, a key service) reads what is
to be signed from standard input and writes an ECDSA signature in DER to
standard output; it is verified before it is used. With a key on a stick:

  "exec:keys/root.pub openssl dgst -sha256 -sign /media/stick/root.pem"

Installed packages may add further kinds, "NAME:..." (entry points of the group
fedcompose.signers).
"""

app = typer.Typer(no_args_is_help=True, help=HELP, short_help="Signing keys: one per site, coordinator and root.")

PassphraseFile = Annotated[
    Path | None,
    typer.Option(help=f"Read the passphrase from this file and do not ask; {PASSPHRASE_FILE_VARIABLE} names one too."),
]
NoPassphrase = Annotated[
    bool, typer.Option("--no-passphrase", help="Leave the private key unprotected but for its file mode.")
]
HeldElsewhere = Annotated[
    str | None,
    typer.Option(
        "--signer",
        metavar="KEY",
        help='Make no key: take this one, which another program holds. "exec:PUBLIC.pub COMMAND..." or "NAME:...".',
    ),
]


def register(app_: typer.Typer) -> None:
    """Add the commands of this module to `app_`."""
    app_.add_typer(app, name="keys")


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Whose key it is, e.g. site-a: the id in the federation file.")],
    role: Annotated[Role, typer.Option(help="What the key is for.")],
    domain: Annotated[str | None, typer.Option(help="The site's domain, e.g. math. Only for a site.")] = None,
    folder: Annotated[Path, typer.Option("--out", help="Where the key's files go.")] = Path("keys"),
    no_passphrase: NoPassphrase = False,
    passphrase_file: PassphraseFile = None,
    signer: HeldElsewhere = None,
    as_json: AsJson = False,
) -> None:
    """Make a signing key and the request to enrol it.

    Example: fedcompose keys new site-a --role site --domain math
    """
    made = _make(folder, name, role, domain, no_passphrase, passphrase_file, signer, old=None)
    if as_json:
        print_json(made | {"role": role, "id": name, "domain": domain})
        return
    _print_made(made, role)
    if role == "root":
        key = made.get("private") or "KEY"
        next_steps(
            f"fedcompose federation init --name NAME --root-key {key} --base smollm2-135m",
            f"or, if another root begins the federation, send {made['enrolment']} to it",
        )
    else:
        next_steps(f"fedcompose federation enroll {made['enrolment']} --root-key ROOT.key   (done by a root)")


@app.command()
def rotate(
    enrolment: Annotated[Path, typer.Argument(help="The .enroll.json of the key that is to be replaced.")],
    key: Annotated[
        str | None, typer.Option(metavar="KEY", help="That private key; by default the .key file beside it.")
    ] = None,
    no_passphrase: NoPassphrase = False,
    passphrase_file: PassphraseFile = None,
    signer: HeldElsewhere = None,
    as_json: AsJson = False,
) -> None:
    """Make the key that takes over from an older one, with a request that both keys sign.

    Three steps, by two people. (1) You run this, and send the new .enroll.json
    to a root; the new files lie beside the old ones, as NAME-2. (2) The root runs
    `fedcompose federation rotate`, and everybody gets the new federation file.
    (3) You name the new key in your settings. For two weeks both keys count, then
    only the new one. What the old key signed before stays good. A passphrase file
    serves for both keys.

    If the old key is lost nobody can hand over: a root revokes it, and you make
    another with `keys new`.

    Example: fedcompose keys rotate keys/site-a.enroll.json
    """
    asked = read_enrolment(read_limited(enrolment, MAX_KEY_FILE_BYTES))
    old = load_signer(key or str(_beside(enrolment)), passphrase_file)
    _check_same_key(asked, old)
    made = _make(enrolment.parent, asked.id, asked.role, asked.domain, no_passphrase, passphrase_file, signer, old=old)
    if as_json:
        print_json(made | {"role": asked.role, "id": asked.id, "domain": asked.domain, "replaces": old.keyid})
        return
    _print_made(made, asked.role)
    next_steps(f"fedcompose federation rotate {made['enrolment']} --root-key ROOT.key   (done by a root)")


@app.command()
def show(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A .pub, .enroll.json or .key file, or another key.")],
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


def _make(
    folder: Path,
    name: str,
    role: Role,
    domain: str | None,
    no_passphrase: bool,
    passphrase_file: Path | None,
    held_elsewhere: str | None,
    old: Signer | None,
) -> dict[str, str]:
    """A new key, or one that another program holds, with its enrolment: the fingerprint and the paths."""
    if held_elsewhere is not None:
        signer = load_signer(held_elsewhere, passphrase_file)
        public, enrolment = adopt_key(folder, name, role, domain, signer, old)
        return {"keyid": signer.keyid, "public": str(public), "enrolment": str(enrolment)}
    if no_passphrase and passphrase_file and old is None:
        raise ConfigError("KEY_OPTIONS", "--no-passphrase and --passphrase-file exclude each other")
    passphrase = None if no_passphrase else given_passphrase(passphrase_file, _ask_twice)
    made = new_key(folder, name, role, domain, passphrase, old)
    paths = {"private": str(made.private), "public": str(made.public), "enrolment": str(made.enrolment)}
    node = {"node": str(made.node)} if made.node else {}
    return {"keyid": made.keyid} | paths | node


def _print_made(made: dict[str, str], role: Role) -> None:
    out.print(f"Fingerprint {made['keyid']}", markup=False)
    if "private" in made:
        out.print(f"  {made['private']}  private: never leaves this machine", markup=False)
    if "node" in made:
        out.print(f"  {made['node']}  private too: opens the connection to the coordinator", markup=False)
    out.print(f"  {made['public']}  public", markup=False)
    to_whom = "" if role == "root" else ": send it to a root"
    out.print(f"  {made['enrolment']}  the request to be enrolled{to_whom}", markup=False)


def _beside(enrolment: Path) -> Path:
    return enrolment.with_name(enrolment.name.removesuffix(".enroll.json") + ".key")


def _check_same_key(asked: Enrolment, old: Signer) -> None:
    if old.public_pem != asked.public_key.encode():
        raise ConfigError(
            "KEY_OTHER",
            "the private key is not the one of this enrolment",
            expected=f"key {keyid_of(asked.public_key.encode())}",
            got=f"key {old.keyid}",
            fix="name the private key that is to be replaced: --key KEY",
        )


def _describe(file: str, passphrase_file: Path | None) -> dict[str, Any]:
    data = read_limited(Path(file), MAX_KEY_FILE_BYTES) if Path(file).is_file() else b""
    if data.startswith(b"{"):
        enrolment = read_enrolment(data)
        public_pem = enrolment.public_key.encode()
        about = {
            "id": enrolment.id,
            "role": enrolment.role,
            "domain": enrolment.domain,
            "replaces": enrolment.replaces,
            "proof": "valid",
        }
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
