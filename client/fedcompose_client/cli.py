"""`fedcompose client`."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True, help="Commands of a client.")


@app.callback()
def _role() -> None:
    pass
