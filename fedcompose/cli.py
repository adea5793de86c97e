"""`fedcompose`: the library's own commands, and those of whichever roles this machine has installed."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import click
import typer

import fedcompose
from fedcompose.console import err, out, print_json
from fedcompose.errors import ConfigError, FedcomposeError, MissingError
from fedcompose.explanations import EXPLANATIONS
from fedcompose.supervision import follow_parent

DEBUG = "FEDCOMPOSE_DEBUG"
ROLES = ("client", "coordinator")
COMMANDS = ("base", "keys", "federation", "verify", "receipts", "serve", "chat", "export", "bench", "demo", "doctor")

# Waiting OpenMP threads must not spin: several processes share the cores (three sites on one laptop, a server beside a
# trainer). It has to be set before torch is imported. Nothing is ever looked up on a hub at run time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Advice of transformers to peft's authors; it would stand in every training log.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")

app = typer.Typer(
    name="fedcompose",
    help="Build one reasoning model together without pooling data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"fedcompose {fedcompose.__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Build one reasoning model together without pooling data."""


def _mount_roles() -> None:
    """Add `fedcompose client` and `fedcompose coordinator` where their distributions are installed."""
    installed = {
        point.name: point
        for point in entry_points(group="fedcompose.commands")
        if point.dist is not None and point.dist.name == f"fedcompose-{point.name}"
    }
    for role in ROLES:
        if role in installed:
            app.add_typer(installed[role].load(), name=role)
        else:
            app.command(role, hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
                _missing_role(role)
            )


def _missing_role(role: str) -> Callable[[], None]:
    def explain() -> None:
        raise ConfigError(
            "ROLE_NOT_INSTALLED",
            f"this machine has no {role} role",
            fix=f"pip install fedcompose-{role}",
        )

    return explain


def _mount_commands() -> None:
    for name in COMMANDS:
        importlib.import_module(f"fedcompose.commands.{name}").register(app)


_mount_commands()
_mount_roles()


def _unexpected(error: Exception) -> MissingError:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return MissingError(
        "UNEXPECTED",
        "something failed that should not; this is a defect of fedcompose or of this installation",
        got=f"{type(error).__name__} in {Path(last.filename).name}, line {last.lineno}",
        fix=f"set {DEBUG}=1 to see all of it (it may quote your data), and report it",
    )


def main(arguments: list[str] | None = None) -> None:
    """Run one command; the only place that turns errors into exit statuses.

    0 done, 1 refused, 2 usage or configuration, 3 environment.
    """
    follow_parent()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = app(args=arguments, standalone_mode=False, prog_name="fedcompose")
    except FedcomposeError as error:
        meaning = EXPLANATIONS.get(error.code)
        if "--json" in arguments:
            print_json({"error": error.as_dict() | {"means": meaning}})
        err.print(error.diagnostics(), markup=False, style="red")
        if meaning is not None:
            err.print(f"\n{meaning}", markup=False)
        sys.exit(error.exit_status)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        err.print("Interrupted. What was already written is kept; the same command resumes.")
        sys.exit(130)
    except Exception as error:  # the one broad net: a message of another library may quote data, so it is not printed
        if DEBUG in os.environ:
            raise
        err.print(_unexpected(error).diagnostics(), markup=False, style="red")
        sys.exit(MissingError.exit_status)
    sys.exit(status if isinstance(status, int) else 0)
