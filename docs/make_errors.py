"""Write `docs/errors.md`: every error code that the source can raise, its exit status, and what it means.

`make docs` writes the file; `make check` runs this with `--check` and fails when the file is stale. A code is found
where it is raised, so that none can be forgotten; its meaning is its entry in `fedcompose/explanations.py` or, for one
without, the message with which it is raised.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from fedcompose.errors import ConfigError, FedcomposeError, MissingError, RefusedError
from fedcompose.explanations import EXPLANATIONS

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "errors.md"
SOURCES = ("fedcompose", "client/fedcompose_client", "coordinator/fedcompose_coordinator")
CLASSES: dict[str, type[FedcomposeError]] = {each.__name__: each for each in (RefusedError, ConfigError, MissingError)}
CODE = re.compile(r"[A-Z][A-Z0-9_]{4,}")
INTRODUCTION = """# Error codes

Generated from the source by `make docs`; do not edit.

A command that fails says its code first, and with `--json` as `error.code`. Codes are stable; messages may change. Exit
status 1: something untrusted was refused; 2: a command, file or setting is wrong; 3: this machine lacks something.

| code | exit | meaning |
|---|---|---|
"""


def raised(tree: ast.Module) -> Iterator[tuple[str, int, str]]:
    """Code, exit status and message of every error that a module makes.

    Where a module makes errors with a code that it was given (`_same(code, ...)`), every code that stands in a call of
    its own functions counts as raised.
    """
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    made = {call: CLASSES[name] for call in calls if (name := _name(call.func)) in CLASSES}
    passed_on = [error for call, error in made.items() if not isinstance(call.args[0], ast.Constant)]
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for call in calls:
        if call in made:
            yield from _raised(call, made[call], 0)
        elif passed_on and _name(call.func) in own:
            for position in range(len(call.args)):
                yield from _raised(call, passed_on[0], position)


def answers(tree: ast.Module) -> Iterator[tuple[str, int, str]]:
    """Codes that travel in messages, and are raised by whoever receives them: `NOT_READY = "NOT_READY"`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            code = node.value.value
            if code in EXPLANATIONS and [_name(target) for target in node.targets] == [code]:
                yield str(code), RefusedError.exit_status, ""


def _raised(call: ast.Call, error: type[FedcomposeError], position: int) -> Iterator[tuple[str, int, str]]:
    code, *rest = call.args[position:]
    if isinstance(code, ast.Constant) and isinstance(code.value, str) and CODE.fullmatch(code.value):
        yield code.value, error.exit_status, _text(rest[0]) if rest else ""


def _name(function: ast.expr) -> str:
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


def _text(message: ast.expr) -> str:
    """A literal message; whatever is filled in at run time is shown as `…`."""
    if isinstance(message, ast.Constant):
        return str(message.value)
    if isinstance(message, ast.JoinedStr):
        return "".join(_text(part) for part in message.values)
    return "…"


def codes() -> dict[str, tuple[int, str]]:
    """Exit status and meaning of every code, the codes in order."""
    found: dict[str, tuple[int, str]] = {}
    for source in SOURCES:
        for path in sorted((ROOT / source).rglob("*.py")):
            tree = ast.parse(path.read_text())
            for code, status, message in (*raised(tree), *answers(tree)):
                if code not in found:
                    found[code] = status, EXPLANATIONS.get(code, message)
    return dict(sorted(found.items()))


def page() -> str:
    rows = [f"| `{code}` | {status} | {meaning.replace('|', '/')} |\n" for code, (status, meaning) in codes().items()]
    return INTRODUCTION + "".join(rows)


def main() -> None:
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text() != page():
            raise SystemExit("docs/errors.md is stale: run `make docs`")
        return
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
