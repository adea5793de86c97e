from __future__ import annotations

import ast
import io
import json
import logging
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedcompose import logs

ROOT = Path(__file__).parents[2]
CANARY = "canary-7f3a Mrs Jones has 42"
LEVELS = {"debug", "info", "warning", "error", "exception", "critical", "log"}


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What the log gets; afterwards pytest has its own handlers back."""
    before, level, hooks = logging.root.handlers[:], logging.root.level, (sys.excepthook, threading.excepthook)
    stream = io.StringIO()
    logs.configure("test", stream)
    yield stream
    logging.root.handlers[:], logging.root.level = before, level
    sys.excepthook, threading.excepthook = hooks


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_says_what_happened_to_whom(stream: io.StringIO) -> None:
    logging.getLogger("fedcompose_client.x").warning("refused a call", extra={"code": "CALL_SITE", "bytes": 12})
    (line,) = lines(stream)
    assert line.pop("at").endswith("Z")
    assert line == {"bytes": 12, "code": "CALL_SITE", "event": "refused a call", "level": "warning", "part": "test"}


@pytest.mark.parametrize("value", [CANARY, {"a": CANARY}, [CANARY], CANARY.encode(), math.nan, math.inf, True])
def test_a_sentence_fits_under_no_name(stream: io.StringIO, value: Any) -> None:
    for name in (*logs.FIELDS, "question", "text"):
        logging.getLogger("fedcompose.x").error("an event", extra={name: value})
    assert {name for line in lines(stream) for name in line} == {"at", "event", "level", "part"}
    assert "Jones" not in stream.getvalue()


def test_neither_arguments_nor_messages_of_exceptions_are_kept(stream: io.StringIO) -> None:
    log = logging.getLogger("fedcompose.x")
    try:
        raise ValueError(CANARY)
    except ValueError:
        log.exception("an action failed: %s", CANARY)
    assert "Jones" not in stream.getvalue()
    (line,) = lines(stream)
    assert line["error"] == "ValueError"
    assert line["where"].startswith("test_logs.py:")


@pytest.mark.parametrize("where", ["fail()", "thread = threading.Thread(target=fail); thread.start(); thread.join()"])
@pytest.mark.parametrize("configure", ["logs.configure('test')", "pass"])
def test_what_nothing_caught_is_a_line_as_well(where: str, configure: str) -> None:
    """With Python's own handling, the negative control, the message comes along."""
    program = f"import threading\nfrom fedcompose import logs\ndef fail(): raise ValueError({CANARY!r})\n{configure}\n"
    done = subprocess.run([sys.executable, "-c", program + where], capture_output=True, text=True, timeout=60)
    assert ("Jones" in done.stderr) == (configure == "pass")
    if configure != "pass":
        (line,) = [json.loads(line) for line in done.stderr.splitlines()]
        assert (line["level"], line["error"], line["where"]) == ("critical", "ValueError", "<string>:3")


def test_of_other_packages_only_the_place_is_kept(stream: io.StringIO) -> None:
    logging.getLogger("flwr").error(CANARY)
    (line,) = lines(stream)
    assert line["event"].startswith("flwr, line ")
    assert "Jones" not in stream.getvalue()


def test_whoever_looks_for_a_fault_sees_every_text(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the tests above: the text was there to be kept."""
    monkeypatch.setenv("FEDCOMPOSE_DEBUG", "1")
    logging.getLogger("flwr").error("%s", CANARY)
    assert lines(stream)[0]["text"] == CANARY


def test_a_package_that_brought_its_own_handler_loses_it() -> None:
    own = io.StringIO()
    logging.getLogger("somebody").addHandler(logging.StreamHandler(own))
    before = logging.root.handlers[:]
    try:
        logs.configure("test", io.StringIO())
        logging.getLogger("somebody").error(CANARY)
    finally:
        logging.root.handlers[:] = before
    assert own.getvalue() == ""


def texts_of_events(source: str) -> list[ast.expr]:
    """The first argument of every call of a logger in a module."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LEVELS:
            of = node.func.value
            if isinstance(of, ast.Name) and of.id in ("log", "logger", "logging"):
                found.append(node.args[1 if node.func.attr == "log" else 0])
    return found


def is_constant(text: ast.expr) -> bool:
    if isinstance(text, ast.IfExp):
        return is_constant(text.body) and is_constant(text.orelse)
    return isinstance(text, ast.Constant) and isinstance(text.value, str)


def test_every_event_is_a_text_of_the_source_and_nothing_else() -> None:
    packages = ("fedcompose", "client/fedcompose_client", "coordinator/fedcompose_coordinator")
    modules = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    bad = [
        f"{path.name}:{text.lineno}"
        for path in modules
        for text in texts_of_events(path.read_text())
        if not is_constant(text)
    ]
    assert len(modules) > 50
    assert not bad


@pytest.mark.parametrize("call", ['log.info(f"row {row}")', 'log.info("row " + row)', "log.warning(row)"])
def test_the_rule_for_events_can_be_broken(call: str) -> None:
    """Negative control of the test above."""
    assert not any(map(is_constant, texts_of_events(call)))
