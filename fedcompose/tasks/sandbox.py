"""Running code that a model wrote against unit tests, in a process that can do little else.

Each run is a fresh interpreter (`python -I -S`) in its own session and an empty temporary folder, with an
empty environment, and is killed with everything it started when its time is up. Inside, before the first
line of the model's code (`sandbox_child.py`):

- resource limits on CPU time, memory, file size, open files and processes: a boundary on every Unix, except
  that the process limit does not bind root;
- on Linux, a seccomp filter without network, new processes, signals or other programs, and a Landlock rule
  without files other than Python's own (to read) and the temporary folder: boundaries drawn by the kernel;
- on Linux, where the kernel lets an ordinary user make one, an empty network namespace: a second such
  boundary;
- an audit hook that refuses the same things from within Python: this is not a boundary, a determined
  program gets around it. It gives clean errors, and it is all there is against network and files where the
  kernel offers less.

`boundaries()` says which of these this machine has. What none of them gives is a trustworthy verdict about
a program that sets out to forge it: tests and program share one interpreter, so such a program can claim to
have passed.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, cast

from fedcompose.errors import MissingError

MAX_SOURCE_CHARS = 50_000  # of the program and of its tests, each
START_SECONDS = 30.0  # for the interpreter to start on a busy machine
_CHILD = Path(__file__).with_name("sandbox_child.py")


@dataclass(frozen=True)
class Limits:
    """What one run may use."""

    cpu_seconds: int = 4
    wall_seconds: float = 8.0
    memory_bytes: int = 512 << 20  # address space; the bare interpreter maps about 30 MB
    file_bytes: int = 1 << 20
    open_files: int = 32
    processes: int = 16  # of this user in all, so usually none and no threads either


DEFAULT_LIMITS = Limits()


def passes(code: str, tests: str, limits: Limits = DEFAULT_LIMITS) -> bool:
    """Whether `code` followed by `tests` (assert statements) runs to its end within the limits.

    Raises: MissingError: `SANDBOX_FAILED`, when this machine cannot run such a process at all.
    """
    if max(len(code), len(tests)) > MAX_SOURCE_CHARS:
        return False
    return _run(code, tests, limits)[1]


def boundaries() -> frozenset[str]:
    """Which kernel boundaries hold on this machine: of `rlimits`, `seccomp`, `landlock`, `netns`."""
    return frozenset(_run("", "", DEFAULT_LIMITS)[0])


def _run(code: str, tests: str, limits: Limits) -> tuple[list[str], bool]:
    """The boundaries that the child could draw, and whether it said at the end that all tests held."""
    token = secrets.token_hex(16)
    task = {"code": code, "tests": tests, "token": token, "limits": asdict(limits)}
    with tempfile.TemporaryDirectory(prefix="fedcompose-code-") as folder, _child(folder) as process:
        stdin, stdout = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps(task).encode())
            stdin.close()
        drawn = _read_line(stdout, START_SECONDS)
        if not drawn.startswith("ready"):
            raise MissingError(
                "SANDBOX_FAILED", "the process for running model-written code did not start",
                got=f"{sys.executable} on {sys.platform}", fix="run code tasks on Linux or macOS",
            )  # fmt: skip
        return drawn.split()[1:], _read_line(stdout, limits.wall_seconds) == token


@contextlib.contextmanager
def _child(folder: str) -> Iterator[subprocess.Popen[bytes]]:
    """The child in its own session; it and all that it started are gone when the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(_CHILD)], cwd=folder, env={}, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _read_line(stream: IO[bytes], seconds: float) -> str:
    """One line of at most 100 bytes (a chatty child cannot fill our memory); empty when late."""
    descriptor, deadline, line = stream.fileno(), time.monotonic() + seconds, b""
    while len(line) < 100 and not line.endswith(b"\n"):
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        byte = os.read(descriptor, 1) if ready else b""
        if not byte:
            return ""
        line += byte
    return line.decode("ascii", "replace").strip()
