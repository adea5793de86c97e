"""`fedcompose federation`: begin a federation, enrol its members, show who belongs."""

from __future__ import annotations

import re
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from fedcompose.commands.keys import PassphraseFile
from fedcompose.console import AsJson, next_steps, out, print_json
from fedcompose.errors import ConfigError, FedcomposeError
from fedcompose.federation import (
    Federation,
    Key,
    create_federation,
    enrol,
    format_time,
    pinned,
    read_federation,
    trusted_federation,
)
from fedcompose.files import MAX_JSON_BYTES, read_limited, write_atomic
from fedcompose.keys import load_signer

app = typer.Typer(no_args_is_help=True, help="The federation file: who belongs, with which keys, on which base.")

RootKey = Annotated[Path, typer.Option(help="The root's private key.")]
File = Annotated[Path, typer.Option("--federation", help="The federation file.")]
DEFAULT_FILE = Path("federation.json")
UNWRAPPED = 1000  # columns: a terminal may wrap a fingerprint, a table must not shorten it


def register(app_: typer.Typer) -> None:
    """Add the commands of this module to `app_`."""
    app_.add_typer(app, name="federation")


@app.command()
def init(
    name: Annotated[str, typer.Option(help="What people call the federation.")],
    root_key: RootKey,
    base: Annotated[
        list[str],
        typer.Option(help="A base to build on: an alias, folder or hub id that is here, or NAME=DIRHASH. Repeatable."),
    ],
    file: Annotated[Path, typer.Option("--out", help="The federation file to write.")] = DEFAULT_FILE,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Begin a federation: its first file, signed by its root.

    Example: fedcompose federation init --name "Three hospitals" --root-key keys/root.key --base smollm2-135m
    """
    if file.exists():
        raise ConfigError("FEDERATION_EXISTS", f"{file} exists already", fix="choose another --out")
    bases = dict(_base(ref) for ref in base)
    root = load_signer(root_key, passphrase_file)
    now = datetime.now(UTC)
    envelope = create_federation(name, root, root_key.stem, bases, f"urn:uuid:{uuid.uuid4()}", now)
    write_atomic(file, envelope)
    federation = trusted_federation(envelope, [root.keyid], now)
    if as_json:
        print_json(_as_dict(federation))
        return
    out.print(f"Federation {federation.name} begins in {file}.\nRoot fingerprint {root.keyid}", markup=False)
    out.print("Give that fingerprint to every member on the phone or in person, not with the file.")
    next_steps(f"fedcompose federation enroll SITE.enroll.json --root-key {root_key} --federation {file}")


@app.command()
def enroll(
    enrolment: Annotated[Path, typer.Argument(metavar="FILE", help="A member's .enroll.json.")],
    root_key: RootKey,
    file: File = DEFAULT_FILE,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Take a site or coordinator into the federation: a new version of its file.

    First compare the fingerprint (`fedcompose keys show FILE`) with its owner, on the phone or in person.

    Example: fedcompose federation enroll site-a.enroll.json --root-key keys/root.key
    """
    envelope, request = _read(file), read_limited(enrolment, MAX_JSON_BYTES)
    root = load_signer(root_key, passphrase_file)
    now = datetime.now(UTC)
    renewed = enrol(envelope, request, root, now)
    write_atomic(file, renewed)
    try:
        federation = trusted_federation(renewed, [root.keyid], now)
    except FedcomposeError:  # say, the file was an old copy: a later version was signed before
        write_atomic(file, envelope)
        raise
    if as_json:
        print_json(_as_dict(federation))
        return
    members = [each.id for each in federation.coordinators] + [each.id for each in federation.sites]
    out.print(
        f"{file} is now version {federation.version}, good until {format_time(federation.expires)}.\n"
        f"Members: {', '.join(members)}",
        markup=False,
    )
    next_steps(f"fedcompose federation show {file}", f"send {file} to every member")


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="The federation file.")] = DEFAULT_FILE, as_json: AsJson = False
) -> None:
    """Show who belongs to a federation, with which keys, on which base.

    Example: fedcompose federation show
    """
    federation, signed = read_federation(_read(file))
    if as_json:
        print_json(_as_dict(federation) | {"signed_by": sorted(signed)})
        return
    now = datetime.now(UTC)
    expired = " (EXPIRED)" if now >= federation.expires else ""
    out.print(
        f"{federation.name}\n"
        f"  id       {federation.id}\n"
        f"  version  {federation.version}, issued {format_time(federation.issued)}\n"
        f"  expires  {format_time(federation.expires)}{expired}\n"
        f"  trust    {_trust(federation, signed)}\n",
        markup=False,
    )
    for table in (_roots(federation, signed), _members(federation, now), _bases(federation)):
        out.print(table, width=UNWRAPPED, crop=False)
        out.print()


def _read(file: Path) -> bytes:
    return read_limited(file, MAX_JSON_BYTES)


def _base(ref: str) -> tuple[str, str]:
    """Name and dirHash of a base, given as NAME=DIRHASH or as something that lies on this machine."""
    given = re.fullmatch(r"(.+)=([0-9a-f]{64})", ref)
    if given:
        return given[1], given[2]
    from fedcompose.bases import resolve_base

    base = resolve_base(ref)
    return base.name, base.digest


def _as_dict(federation: Federation) -> dict[str, Any]:
    return federation.model_dump(mode="json", by_alias=True)


def _trust(federation: Federation, signed: frozenset[str]) -> str:
    pin = pinned(federation.id)
    if pin is None:
        return "not known on this machine: compare the root fingerprints with their owners"
    if len(signed & set(pin.roots)) < pin.threshold:
        return "NOT SIGNED by the roots that this machine knows"
    if federation.version < pin.version:
        return f"OLD: this machine has seen version {pin.version}"
    return "signed by roots that this machine knows"


def _roots(federation: Federation, signed: frozenset[str]) -> Table:
    table = _table(
        f"Roots ({federation.threshold} of {len(federation.roots)} must sign)",
        "name",
        "signed",
        "fingerprint",
    )
    for root in federation.roots:
        table.add_row(escape(root.name), "yes" if root.keyid in signed else "no", root.keyid)
    return table


def _members(federation: Federation, now: datetime) -> Table:
    table = _table("Members", "id", "role", "domain", "may send", "key", "until", "state")
    for coordinator in federation.coordinators:
        for key in coordinator.keys:
            table.add_row(coordinator.id, "coordinator", "", "", *_key(key), _state(key, now))
    for site in federation.sites:
        for key in site.keys:
            state = _state(key, now) if site.status == "active" else site.status
            table.add_row(site.id, "site", site.domain, ", ".join(site.may), *_key(key), state)
    return table


def _bases(federation: Federation) -> Table:
    table = _table("Base models", "name", "dirHash")
    for base in federation.base_models:
        table.add_row(escape(base.name), base.dir_hash)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _key(key: Key) -> tuple[str, str]:
    return key.keyid[:12], f"{key.not_after:%Y-%m-%d}"


def _state(key: Key, now: datetime) -> str:
    if key.revoked is not None and now >= key.revoked.at:
        return "revoked"
    return "active" if key.not_before <= now < key.not_after else "not in its time"
