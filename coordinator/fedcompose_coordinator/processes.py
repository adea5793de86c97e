"""Run commands side by side, and tell what each of them took."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedcompose.errors import MissingError

POLL_S = 0.5
PEAK_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


@dataclass(frozen=True)
class Usage:
    """What one process took: wall clock, processor time of all its threads, largest memory."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def run_all(
    commands: Sequence[Sequence[str]],
    at_once: int,
    code: str,
    on_tick: Callable[[], None] | None = None,
    on_done: Callable[[int, Usage], None] | None = None,
) -> None:
    """Run all commands, `at_once` at a time with an equal share of the cores; the first failure ends the others.

    `on_done(number, usage)` is told of each command that succeeded.

    Raises: MissingError: `code`.
    """
    threads = str(max(1, (os.cpu_count() or 1) // at_once))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    waiting = list(enumerate(commands))
    running: dict[int, tuple[subprocess.Popen[bytes], float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                number, command = waiting.pop(0)
                process = subprocess.Popen(list(command), env=environment, stdout=subprocess.DEVNULL)
                running[number] = (process, time.monotonic())
            for number, (process, started) in list(running.items()):
                usage = _ended(process, started, code)
                if usage:
                    del running[number]
                    if on_done:
                        on_done(number, usage)
            if on_tick:
                on_tick()
            time.sleep(POLL_S)
    finally:
        for process, _ in running.values():
            if process.returncode is None:
                process.terminate()
                process.wait()


def _ended(process: subprocess.Popen[bytes], started: float, code: str) -> Usage | None:
    """What a process took, or None while it runs. Raises: MissingError: `code` when it failed."""
    pid, status, used = os.wait4(process.pid, os.WNOHANG)
    if pid == 0:
        return None
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise MissingError(
            code,
            "a process that did a part of the work stopped early",
            got=f"exit status {process.returncode}",
            fix="read its message above, then run the same command again; what is finished is kept",
        )
    return Usage(time.monotonic() - started, used.ru_utime + used.ru_stime, used.ru_maxrss * PEAK_UNIT)
