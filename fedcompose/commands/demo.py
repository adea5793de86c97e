"""`fedcompose demo`: watch three sites and a coordinator build, sign and verify a release."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live
from rich.table import Table

from fedcompose.console import AsJson, accuracy_table, err, next_steps, out, print_json

REFRESH_S = 0.5
PLAIN_EVERY_S = 20.0  # between two states where there is no terminal


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    app.command()(demo)


def demo(
    folder: Annotated[
        Path, typer.Option("--out", help="Where everything goes; go on with an interrupted demo.")
    ] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A smaller run of a few minutes.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Another seed: other data, other training.")] = 0,
    base: Annotated[str, typer.Option(help="Base model: alias, folder or hub id.")] = "smollm2-135m",
    as_json: AsJson = False,
) -> None:
    """Run the whole flow on this machine: train, sign, verify, compose, evaluate, release.

    Example: fedcompose demo --out demo
    """
    from fedcompose.demo import Demo, run_demo

    run = Demo(folder, seed, quick, base, on_start=lambda step, command: err.print(f"$ {command}", markup=False))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(run_demo, run)
        if err.is_terminal:
            with Live(console=err, refresh_per_second=2, transient=True) as live:
                while not waiting.done():
                    live.update(_state(run.running))
                    time.sleep(REFRESH_S)
        else:
            next_state = time.monotonic() + PLAIN_EVERY_S
            while not waiting.done():
                if time.monotonic() > next_state:
                    err.print(_state(run.running))
                    next_state += PLAIN_EVERY_S
                time.sleep(REFRESH_S)
    report = waiting.result()
    if as_json:
        print_json(report)
        return
    out.print(accuracy_table(report["accuracy"]))
    out.print(f"\nReport  {folder / 'report.html'}", markup=False)
    next_steps(f"fedcompose verify {folder / 'release'}", f"fedcompose serve {folder / 'release'}")


def _state(running: dict[str, tuple[Path, float]]) -> Table:
    """One line per running step: the last thing it said, and for how long it has been running."""
    table = Table.grid(padding=(0, 2))
    for step, (log, started) in sorted(running.items()):
        table.add_row(step, f"{time.monotonic() - started:.0f} s", _last_line(log))
    return table


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:80]
