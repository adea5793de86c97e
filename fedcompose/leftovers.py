"""Processes of a federation that nobody looks after: what a crash left behind, as far as /proc tells."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

# Programs that work for a federation, and those of them that a person or a service manager starts.
OURS = re.compile(r"flower-super(?:node|link|exec)|flwr-\w+app|fedcompose")
STARTED_BY_HAND = re.compile(r"client join|coordinator start")


@dataclass(frozen=True)
class Process:
    """A process of this machine, as far as /proc tells."""

    pid: int
    parent: int
    command: str
    folder: str


def processes() -> dict[int, Process]:
    """Those that this user may look at; none where the system has no /proc."""
    return {found.pid: found for each in Path("/proc").glob("[0-9]*") if (found := _process(each))}


def _process(entry: Path) -> Process | None:
    try:
        command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        return Process(int(entry.name), parent, command, os.readlink(entry / "cwd"))  # noqa: PTH115
    except (OSError, ValueError, IndexError):
        return None


def leftovers(folder: Path, running: dict[int, Process]) -> list[Process]:
    """Processes of this folder that nobody looks after: their first ancestor of ours was not started by hand."""
    place = str(folder.resolve())
    return [
        process
        for process in running.values()
        if OURS.search(process.command)
        and (process.folder == place or process.folder.startswith(place + os.sep) or place in process.command)
        and not STARTED_BY_HAND.search((oldest := _oldest(process, running)).command)
        and oldest.parent == 1
    ]


def _oldest(process: Process, running: dict[int, Process]) -> Process:
    """The first ancestor of this process that is still one of ours."""
    while (parent := running.get(process.parent)) is not None and OURS.search(parent.command):
        process = parent
    return process
