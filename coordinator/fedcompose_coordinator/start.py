"""Keep the coordinator's processes going, in front or in the background, and end them.

    superlink   sites connect to it
    driver      follows the calls, fetches and judges what comes

Either may die at any time; it is started again and goes on from the files. `start.pid` is held for as long as they are
kept going, so that there is one such pair for a folder, and says whom `stop` has to ask.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fedcompose.errors import ConfigError, MissingError
from fedcompose.supervision import Child, only_one, supervise
from fedcompose_coordinator.config import load_config
from fedcompose_coordinator.door import close_door, read_door

log = logging.getLogger(__name__)

PID_FILE = "start.pid"
LOG_FILE = Path("logs") / "start.log"  # of a start in the background
READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
POLL_S = 0.2


def keep_going(home: Path, stop: threading.Event) -> None:
    """Run the coordinator until `stop` is set.

    Raises: ConfigError: `ALREADY_RUNNING`.
    """
    listen = load_config(home).listen
    with only_one(home / PID_FILE):
        close_door(home)
        end_metrics = _serve_metrics(home, listen.metrics_port)
        try:
            supervise([_child("superlink", home), _child("driver", home)], stop, _report)
        finally:
            end_metrics()
            close_door(home)


def _serve_metrics(home: Path, port: int) -> Callable[[], None]:
    if not port:
        return lambda: None
    from fedcompose_coordinator.metrics import serve_metrics

    return serve_metrics(home, port)


def _child(name: str, home: Path) -> Child:
    return Child(name, [sys.executable, "-m", f"fedcompose_coordinator.{name}", str(home.resolve())])


def _report(name: str, what: str) -> None:
    log.info("a process was started" if what == "started" else "a process has ended", extra={"child": name})


def start_in_background(home: Path) -> int:
    """Start the coordinator as a process of its own, and return its number when sites can connect.

    Raises: ConfigError: `ALREADY_RUNNING`. MissingError: `START_FAILED`.
    """
    running = running_pid(home)
    if running is not None:
        raise ConfigError(
            "ALREADY_RUNNING", f"this coordinator is running already, as process {running}",
            fix="fedcompose coordinator stop",
        )  # fmt: skip
    close_door(home)
    (home / LOG_FILE).parent.mkdir(parents=True, exist_ok=True)
    with (home / LOG_FILE).open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedcompose", "coordinator", "start", "--home", str(home.resolve())],
            stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True,
        )  # fmt: skip
    if not _wait(lambda: process.poll() is not None or read_door(home) is not None, READY_TIMEOUT_S):
        process.terminate()
    if read_door(home) is None:
        process.wait(STOP_TIMEOUT_S)
        raise MissingError("START_FAILED", "the coordinator did not come up", fix=f"read {home / LOG_FILE}")
    return process.pid


def stop_running(home: Path) -> int | None:
    """End the coordinator of this folder and all its processes; its number, or None if it was not running.

    Raises: MissingError: `STOP_FAILED`.
    """
    pid = running_pid(home)
    if pid is None:
        return None
    os.kill(pid, signal.SIGTERM)
    if not _wait(lambda: running_pid(home) is None, STOP_TIMEOUT_S):
        raise MissingError("STOP_FAILED", f"process {pid} does not end", fix=f"kill -9 {pid}")
    return pid


def running_pid(home: Path) -> int | None:
    """The process that keeps this coordinator going, if one does: the one that holds the lock."""
    path = home / PID_FILE
    if not path.is_file():
        return None
    with path.open("r") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(stream.read(20))
    return None


def _wait(is_done: Callable[[], bool], timeout_s: float) -> bool:
    give_up = time.monotonic() + timeout_s
    while not is_done():
        if time.monotonic() > give_up:
            return False
        time.sleep(POLL_S)
    return True
