"""`fedcompose doctor`: look over this machine before somebody has to look for a fault."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from fedcompose.console import AsJson, out, print_json
from fedcompose.doctor import Finding, examine
from fedcompose.errors import MissingError

SIGNS = {"ok": ("ok  ", "green"), "note": ("note", "yellow"), "bad": ("bad ", "red")}


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    app.command()(doctor)


def doctor(
    site: Annotated[Path | None, typer.Option(help="A site's folder; this one, where site.toml is here.")] = None,
    home: Annotated[Path | None, typer.Option(help="A coordinator's folder; likewise.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check versions, base, keys, clock, disk, the line to the coordinator and leftover processes; change nothing.

    One line each, with what to do. Exit status 3 if anything is bad; what is only worth a note does not count.

    Example: fedcompose doctor --site clinic
    """
    if site is None and home is None:
        site, home = (Path() if Path(name).is_file() else None for name in ("site.toml", "coordinator.toml"))
    found = examine(site, home, datetime.now(UTC))
    if as_json:
        print_json([asdict(each) for each in found])
    else:
        for each in found:
            _print(each)
    if any(each.state == "bad" for each in found):
        raise typer.Exit(MissingError.exit_status)


def _print(finding: Finding) -> None:
    sign, colour = SIGNS[finding.state]
    out.print(sign, style=colour, end=" ")
    out.print(f"{finding.check}: {finding.found}{f'. Do: {finding.fix}' if finding.fix else ''}", markup=False)
