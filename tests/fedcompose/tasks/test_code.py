from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedcompose.tasks import Example, get_task, sandbox
from fedcompose.tasks.sandbox import Limits, boundaries, passes

CODE = get_task("code")
QUICK = Limits(cpu_seconds=1, wall_seconds=5)
DOUBLE = "def double(x):\n    return 2 * x\n"


def test_a_correct_function_passes_and_a_wrong_one_does_not() -> None:
    assert CODE.reward(f"Sure:\n```python\n{DOUBLE}```\nDone.", "assert double(4) == 8") == 1.0
    assert CODE.reward(f"```\n{DOUBLE}```", "assert double(4) == 9") == 0.1
    assert CODE.is_correct(DOUBLE, "assert double(4) == 8")


@pytest.mark.parametrize("completion", ["", "no code", "```python\nx = 1\n```", "```python\ndef f(:\n```"])
def test_a_completion_without_a_function_earns_nothing(completion: str) -> None:
    assert CODE.parse(completion) is None
    assert CODE.reward(completion, "assert True") == 0.0


def test_an_answer_is_python_with_an_assert() -> None:
    assert CODE.canonical("assert f(1) == 2") == "assert f(1) == 2"
    assert CODE.canonical("f(1)") is None
    assert CODE.canonical("assert f(") is None


def test_the_target_is_a_block_that_is_correct() -> None:
    example = Example("Double x.", "assert double(3) == 6", solution=DOUBLE)
    assert CODE.parse(CODE.target(example)) == DOUBLE
    assert CODE.is_correct(CODE.target(example), example.answer)


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "print('passed')",
        "raise SystemExit",
        "import os\nfor d in range(3, 30):\n    try: os.write(d, b'0' * 32 + b'\\n')\n    except OSError: pass",
    ],
)
def test_ending_early_or_claiming_success_is_not_passing(code: str) -> None:
    assert not passes(code, "assert False", QUICK)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("while True: pass", id="infinite loop"),
        pytest.param("x = bytearray(4 << 30)", id="memory bomb"),
        pytest.param("import os\nwhile True: os.fork()", id="fork bomb"),
        pytest.param("import subprocess; subprocess.run(['true'])", id="program"),
        pytest.param("import socket; socket.create_connection(('127.0.0.1', 9))", id="socket"),
        pytest.param("import os; os.kill(os.getppid(), 0)", id="signal to the parent"),
        pytest.param("open('big', 'w').write('x' * (4 << 20))", id="big file"),
        pytest.param("(" * 5000, id="deep nesting"),
    ],
)
def test_a_hostile_program_fails_and_ends(code: str) -> None:
    assert not passes(code, "assert True", QUICK)


def test_a_sleeping_program_is_ended_by_the_clock() -> None:
    assert not passes("import time; time.sleep(60)", "assert True", Limits(wall_seconds=1.0))


def test_files_can_be_written_in_the_working_folder_only(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    assert passes("open('inside', 'w').write('x')", "assert open('inside').read() == 'x'", QUICK)
    for attack in (f"open({str(outside)!r}, 'w')", f"import os; os.remove({str(outside)!r})"):
        assert not passes(attack, "assert True", QUICK)
    assert outside.read_text() == "untouched"


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDCOMPOSE_SECRET", "canary")
    assert passes("import os", "assert 'FEDCOMPOSE_SECRET' not in os.environ", QUICK)


def test_ordinary_modules_work() -> None:
    modules = "math, random, re, itertools, functools, collections, heapq, bisect, datetime, decimal, string"
    assert passes(f"import {modules}", "assert math.isqrt(17) == 4", QUICK)
    assert passes("x = bytearray(100 << 20)", "assert len(x)", QUICK)


# Each kernel boundary alone, without the audit hook: what is refused here is refused by the kernel.
ALONE = """
import ctypes, importlib.util, os, resource, socket, sys
spec = importlib.util.spec_from_file_location("child", sys.argv[1])
child = importlib.util.module_from_spec(spec); spec.loader.exec_module(child)
libc = ctypes.CDLL(None, use_errno=True)
def refused(action):
    try: action()
    except OSError: return True
    return False
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux draws these boundaries")
@pytest.mark.parametrize(
    ("boundary", "check"),
    [
        (
            "seccomp",
            "assert child.filter_syscalls(libc)\n"
            "assert refused(os.fork) and refused(socket.socket) and refused(lambda: os.kill(os.getppid(), 0))\n"
            "assert refused(lambda: os.execv('/bin/true', ['true']))\n"
            "import threading; t = threading.Thread(target=print); t.start(); t.join()",
        ),
        (
            "landlock",
            "assert child.restrict_files(libc, os.getcwd())\n"
            "assert refused(lambda: open(sys.argv[2], 'a')) and refused(lambda: open(sys.argv[2]))\n"
            "assert refused(lambda: os.remove(sys.argv[2])) and not refused(lambda: open('here', 'w'))",
        ),
        (
            "netns",
            "listener = socket.create_server(('127.0.0.1', 0)); address = listener.getsockname()\n"
            "socket.create_connection(address, 1).close()\n"
            "assert child.leave_network(libc)\n"
            "assert refused(lambda: socket.create_connection(address, 1))",
        ),
    ],
)
def test_each_kernel_boundary_holds_by_itself(boundary: str, check: str, tmp_path: Path) -> None:
    if boundary not in boundaries():
        pytest.skip(f"this kernel offers no {boundary} to this user")
    outside, folder = tmp_path / "outside", tmp_path / "work"
    outside.write_text("untouched")
    folder.mkdir()
    script = [sys.executable, "-I", "-c", ALONE + check, str(sandbox._CHILD), str(outside)]
    done = subprocess.run(script, cwd=folder, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_resource_limits_hold_everywhere() -> None:
    assert "rlimits" in boundaries()
