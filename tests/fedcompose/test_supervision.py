"""Children are kept going, and none is left, also when nobody could say goodbye."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcompose import supervision
from fedcompose.errors import ConfigError
from fedcompose.supervision import Child, end, only_one, start, supervise

PATIENCE_S = 30

# Starts a grandchild that waits, writes both numbers, and waits itself.
FAMILY = """
import os, sys, time
from pathlib import Path
from fedcompose.supervision import Child, follow_parent, start
follow_parent()
waiting = "import time; from fedcompose.supervision import follow_parent; follow_parent(); time.sleep(600)"
child = start(Child("grandchild", [sys.executable, "-c", waiting]))
Path(sys.argv[1]).write_text(f"{os.getpid()} {child.pid}")
time.sleep(600)
"""


def wait_until(true: Callable[[], bool]) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Not counting one that has ended and is only waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def family(tmp_path: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A process and what it started, by number."""
    told = tmp_path / "pids"
    process = start(Child("child", [sys.executable, "-c", FAMILY, str(told)]))
    wait_until(lambda: told.exists() and len(told.read_text().split()) == 2)
    return process, [int(pid) for pid in told.read_text().split()]


def test_what_a_killed_process_started_ends_by_itself(family: tuple[subprocess.Popen[bytes], list[int]]) -> None:
    process, pids = family
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(is_alive, pids)))


def test_without_following_it_would_stay(tmp_path: Path) -> None:
    """Negative control: an orphan does not end by itself."""
    told = tmp_path / "pids"
    code = FAMILY.replace("follow_parent();", "")
    process = start(Child("child", [sys.executable, "-c", code, str(told)]))
    wait_until(lambda: told.exists() and len(told.read_text().split()) == 2)
    grandchild = int(told.read_text().split()[1])
    process.kill()
    process.wait()
    time.sleep(3 * supervision.PARENT_POLL_S)
    assert is_alive(grandchild)
    os.kill(grandchild, signal.SIGKILL)


def test_ending_a_process_ends_what_it_started(family: tuple[subprocess.Popen[bytes], list[int]]) -> None:
    process, pids = family
    end([process])
    wait_until(lambda: not any(map(is_alive, pids)))


def test_a_process_that_does_not_want_to_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "PATIENCE_S", 0.3)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('x', flush=True); time.sleep(600)"
    process = start(Child("stubborn", [sys.executable, "-c", code]), stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.read(1) == b"x"
    end([process])
    assert process.returncode == -signal.SIGKILL


def test_a_child_that_ends_is_started_again_later_and_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "FIRST_PAUSE_S", 0.1)
    stop, reports = threading.Event(), list[tuple[str, str]]()

    def report(name: str, what: str) -> None:
        reports.append((name, what))
        if len(reports) == 6:
            stop.set()

    supervise([Child("brief", [sys.executable, "-c", "raise SystemExit(3)"])], stop, report)
    assert [what for _, what in reports[::2]] == ["started"] * 3
    assert all(what.startswith("ended with 3") for _, what in reports[1::2])


def test_only_one_process_holds_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with only_one(path):
        assert path.read_text() == f"{os.getpid()}\n"
        with pytest.raises(ConfigError, match=r"another process") as refused, only_one(path):
            pass
        assert refused.value.got == f"process {os.getpid()}"
    assert path.read_text() == ""
    with only_one(path):
        pass
