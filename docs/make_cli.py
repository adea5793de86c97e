"""Write `docs/cli.md`: the `--help` of every command, as the installed program prints it.

`make docs` writes the file; `make check` runs this with `--check` and fails when the file is stale.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# The page must not depend on who generates it: a fixed width, no colour, nothing of this person's folders.
os.environ.update(COLUMNS="100", TERMINAL_WIDTH="100", NO_COLOR="1", TERM="dumb")
os.environ.update(_TYPER_FORCE_DISABLE_TERMINAL="1", FEDCOMPOSE_HOME="~/.fedcompose")
os.environ.pop("FORCE_COLOR", None)

import click
import typer.main
from typer.testing import CliRunner

from fedcompose.cli import app

PAGE = Path(__file__).parent / "cli.md"
INTRODUCTION = """# Commands

Generated from `--help` by `make docs`; do not edit.

Exit status: 0 done, 1 refused, 2 usage or configuration, 3 environment. An error says what was
expected, what was found and what to do. `--json` prints one JSON document on stdout instead of text.
"""


def commands(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The paths of all visible commands, parents first, in the order of `--help`."""
    yield path
    for name, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            yield from commands(child, (*path, name))


def help_text(path: tuple[str, ...]) -> str:
    result = CliRunner().invoke(app, [*path, "--help"], prog_name="fedcompose")
    if result.exit_code != 0:
        raise SystemExit(f"fedcompose {' '.join(path)} --help failed: {result.output}")
    return "\n".join(line.rstrip() for line in result.output.strip("\n").splitlines()).strip("\n")


def page() -> str:
    sections = [INTRODUCTION]
    for path in commands(typer.main.get_command(app), ()):
        title = " ".join(("fedcompose", *path))
        sections.append(f"{'##' if len(path) < 2 else '###'} {title}\n\n```text\n{help_text(path)}\n```\n")
    return "\n".join(sections)


def main() -> None:
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text() != page():
            raise SystemExit("docs/cli.md is stale: run `make docs`")
        return
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
