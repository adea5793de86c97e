from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fedcompose.leftovers import Process, leftovers, processes


def test_processes_that_nobody_looks_after(tmp_path: Path) -> None:
    place = str(tmp_path)
    running = {
        each.pid: each
        for each in [
            Process(10, 1, "python -m fedcompose client join", place),  # started by hand, or by systemd
            Process(11, 10, "flower-supernode --isolation process", place),
            Process(20, 1, "flower-supernode --isolation process", place),  # its parent has died
            Process(21, 20, "flwr-clientapp", place),
            Process(30, 1, "flower-supernode --isolation process", "/elsewhere"),
            Process(40, 99, f"python -m fedcompose client train --site {place}", "/root"),  # a person's, from a shell
            Process(50, 1, "bash", place),
        ]
    }
    assert [each.pid for each in leftovers(tmp_path, running)] == [20, 21]


def test_processes_of_this_machine_are_seen() -> None:
    """Negative control: a list that is always empty would find nothing left over."""
    child = subprocess.Popen([sys.executable, "-c", "input('fedcompose')"], stdin=subprocess.PIPE)
    try:
        assert processes()[child.pid].parent > 1
        assert "input" in processes()[child.pid].command
    finally:
        child.kill()
        child.communicate()
