"""`fedcompose coordinator ledger`: look at what was decided, and check that nothing of it was changed since."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.table import Table

from fedcompose import ledger
from fedcompose.console import AsJson, out, print_json, print_whole
from fedcompose.document import format_time
from fedcompose.errors import ConfigError
from fedcompose.files import MAX_JSON_BYTES, read_limited
from fedcompose.ledger import Entry, Head
from fedcompose.provenance import PROVENANCE_FILE
from fedcompose.statement import parse_release_provenance
from fedcompose_coordinator.decisions import LEDGER_FILE, held_heads

SHOWN_CHARS = 16  # of a digest

app = typer.Typer(no_args_is_help=True, help="The record of what this coordinator decided.")
Home = Annotated[Path, typer.Option("--home", help="The coordinator's folder, where coordinator.toml is.")]


@app.command()
def verify(
    home: Home = Path(),
    head: Annotated[
        list[str] | None, typer.Option(help="ENTRIES:SHA256, as somebody else has kept it. Repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check the chain, and that it holds every head that calls, the release and you know of; name the first bad entry.

    Example: fedcompose coordinator ledger verify --home hub
    """
    held = held_heads(home) | _released(home) | {f"--head {each}": _head(each) for each in head or []}
    entries = ledger.verify(home / LEDGER_FILE, held)
    found = Head(entries=len(entries), head=entries[-1].sha256) if entries else ledger.EMPTY
    if as_json:
        print_json({"entries": found.entries, "head": found.head, "held": sorted(held)})
        return
    out.print(f"Verified {found.entries} entries and {len(held)} heads held elsewhere", markup=False)
    out.print(f"Head {found.entries}:{found.head}", markup=False)


@app.command()
def show(home: Home = Path(), as_json: AsJson = False) -> None:
    """List every decision, oldest first, once the chain was checked.

    Example: fedcompose coordinator ledger show --home hub
    """
    entries = ledger.verify(home / LEDGER_FILE, held_heads(home))
    if as_json:
        print_json([{"n": e.n, "at": format_time(e.at), "event": e.event, **e.fields} for e in entries])
        return
    table = Table("", "when", "what", "", box=None)
    for entry in entries:
        table.add_row(str(entry.n), format_time(entry.at), entry.event, _details(entry))
    print_whole(table)


def _details(entry: Entry) -> str:
    return "  ".join(f"{name} {_shortened(value)}" for name, value in sorted(entry.fields.items()))


def _shortened(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shortened, value))
    return str(value)[:SHOWN_CHARS] if len(str(value)) == len(ledger.EMPTY.head) else str(value)


def _released(home: Path) -> dict[str, Head]:
    """The head in the provenance of the release that lies here, if there is one."""
    path = home / "release" / PROVENANCE_FILE
    if not path.is_file():
        return {}
    claims = parse_release_provenance(read_limited(path, MAX_JSON_BYTES))
    return {"whoever has the release": claims.ledger} if claims.ledger else {}


def _head(text: str) -> Head:
    entries, _, digest = text.partition(":")
    try:
        return Head(entries=int(entries), head=digest)
    except (ValueError, ValidationError) as error:
        raise ConfigError("HEAD_INVALID", f"{text[:100]!a} is not a head of a ledger", expected="17:SHA256") from error
