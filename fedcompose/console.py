"""How commands speak: tables and next steps for people on stdout, one JSON document for machines with `--json`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


def print_json(value: Any) -> None:
    """One JSON document on stdout, and nothing else."""
    typer.echo(json.dumps(value, indent=2, sort_keys=True, allow_nan=False))


def next_steps(*commands: str) -> None:
    """The commands a person most likely wants now."""
    out.print()
    for number, command in enumerate(commands):
        out.print(("Next:  " if number == 0 else "       ") + command, markup=False)


def progress_bars() -> Progress:
    """Progress with a count, elapsed time and time left, on stderr so that stdout stays clean."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=err,
    )
