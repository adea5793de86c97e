"""Keep the processes of one command going while it runs, and leave none behind however it ends.

A child learns its parent's number from the environment and watches it, so that it also ends when the parent was killed
and could not say so. Each child leads a process group of its own; what it started ends with it.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from fedcompose import logs
from fedcompose.errors import ConfigError, FedcomposeError
from fedcompose.memory import reuse_freed_memory

log = logging.getLogger(__name__)

PARENT = "FEDCOMPOSE_PARENT"

PARENT_POLL_S = 0.5
POLL_S = 0.2
FIRST_PAUSE_S = 1.0  # before a child that ended is started again; doubled each time
LONGEST_PAUSE_S = 60.0
HEALTHY_S = 60.0  # a child that ran for so long begins with the first pause again
PATIENCE_S = 10.0  # between asking a child to end and ending it


@dataclass(frozen=True)
class Child:
    """A program to keep going."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)


def follow_parent() -> None:
    """End this process as soon as the one that started it is gone, if that one wants to be followed."""
    parent = os.environ.pop(PARENT, None)
    if parent is not None:
        threading.Thread(target=_watch, args=(int(parent),), daemon=True, name="follow-parent").start()


def be_child(name: str, work: Callable[[Path], None]) -> None:
    """Be the program `python -m MODULE FOLDER` that another one supervises, and whose end it does not outlive."""
    reuse_freed_memory()
    logs.configure(name)
    follow_parent()
    try:
        work(Path(sys.argv[1]))
    except FedcomposeError as failure:
        log.error("cannot go on", extra={"code": failure.code})
        sys.exit(failure.exit_status)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    os._exit(1)


def stop_on_signals() -> threading.Event:
    """An event that the usual signals to end set, instead of ending this process at once."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    return stop


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Be the only process that holds this file, which says its number; it is free again however the process ends.

    Raises: ConfigError: `ALREADY_RUNNING`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            raise ConfigError(
                "ALREADY_RUNNING",
                f"another process holds {path}",
                got=f"process {stream.read(20).strip()}",
                fix="end that process first",
            ) from error
        stream.truncate(0)
        stream.write(f"{os.getpid()}\n")
        stream.flush()
        try:
            yield
        finally:
            stream.truncate(0)


def start(child: Child, stdout: int | None = None, stderr: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """Start a child that follows this process; what it prints goes where this process's does, if nothing is said."""
    return subprocess.Popen(
        child.argv,
        env={**os.environ, **child.env, PARENT: str(os.getpid())},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask these processes to end, and end those that do not, with all that they started."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + PATIENCE_S
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def supervise(
    children: Sequence[Child], stop: threading.Event, report: Callable[[str, str], None] = lambda name, what: None
) -> None:
    """Keep all children going until `stop` is set, then end them; `report` is told what happens to which."""
    kept = [_Kept(child, report) for child in children]
    try:
        while not stop.is_set():
            for each in kept:
                each.look(time.monotonic())
            stop.wait(POLL_S)
    finally:
        end([each.process for each in kept if each.process is not None])


class _Kept:
    """One child, the process that it is at present, and when it may be started again."""

    def __init__(self, child: Child, report: Callable[[str, str], None]) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._child, self._report = child, report
        self._started_s = self._next_s = 0.0
        self._pause_s = FIRST_PAUSE_S

    def look(self, now_s: float) -> None:
        """Start the process if it is time to, and note when it has ended."""
        if self.process is None and now_s >= self._next_s:
            self.process, self._started_s = start(self._child), now_s
            self._report(self._child.name, "started")
        elif self.process is not None and self.process.poll() is not None:
            self._ended(self.process, now_s)

    def _ended(self, process: subprocess.Popen[bytes], now_s: float) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started and left
        if now_s - self._started_s >= HEALTHY_S:
            self._pause_s = FIRST_PAUSE_S
        self._report(self._child.name, f"ended with {process.returncode}, again in {self._pause_s:.0f} s")
        self.process, self._next_s = None, now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
