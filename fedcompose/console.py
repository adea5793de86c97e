"""How commands speak: tables and next steps for people on stdout, one JSON document for machines with `--json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

NO_LIMIT = 10_000  # columns; a terminal breaks longer lines, and nothing is left out
CONTROLS = ("uniform", "random_router", "attention_only", "best_single")
LINE_EVERY_S = 5.0  # between two progress lines where there is no terminal

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


def print_json(value: Any) -> None:
    """One JSON document on stdout, and nothing else."""
    typer.echo(json.dumps(value, indent=2, sort_keys=True, allow_nan=False))


def print_whole(table: Table) -> None:
    """A table as wide as its content: paths and digests are there to be copied, so none is cut to fit."""
    Console(highlight=False, soft_wrap=True, width=NO_LIMIT).print(table)


def next_steps(*commands: str) -> None:
    """The commands a person most likely wants now."""
    out.print()
    for number, command in enumerate(commands):
        out.print(("Next:  " if number == 0 else "       ") + command, markup=False)


def accuracy_table(accuracy: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Methods × domains with 95 % intervals; `accuracy[method][domain]` as in `report.json`."""
    domains = list(accuracy["base"])
    table = Table("accuracy", *domains, "mean", box=None)
    experts = [method for method in accuracy if method.startswith("expert:")]
    for method in ("base", *experts, *CONTROLS, "composed"):
        if method in accuracy:
            cells = [accuracy[method][domain] for domain in domains]
            shown = [f"{cell['value']:.2f} [dim]{cell['low']:.2f}–{cell['high']:.2f}[/dim]" for cell in cells]
            mean = sum(cell["value"] for cell in cells) / len(cells)
            table.add_row(method, *shown, f"{mean:.2f}", style="bold" if method == "composed" else None)
    return table


def progress_bars() -> Progress:
    """Progress with a count, elapsed time and time left, on stderr so that stdout stays clean."""
    return _LineProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=err,
    )


class _LineProgress(Progress):
    """Bars on a terminal; elsewhere, in a log or a pipe, one plain line every few seconds."""

    _next_line_s = 0.0

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        now = self.get_time()
        if self.console.is_terminal or now < self._next_line_s:
            return
        self._next_line_s = now + LINE_EVERY_S
        task = self._tasks[task_id]
        left = f", {task.time_remaining:.0f} s left" if task.time_remaining else ""
        total = f"/{task.total:.0f}" if task.total else ""
        self.console.print(
            f"{task.description} {task.completed:.0f}{total}{left} {task.fields.get('note', '')}".rstrip()
        )
