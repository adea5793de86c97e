from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcompose.contribution import KINDS
from fedcompose.wire import Part, part_limits, plan, stream_bytes

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("fedcompose", "client/fedcompose_client", "coordinator/fedcompose_coordinator")


def parts(sizes: list[int]) -> list[Part]:
    return [Part(f"adapter/{index}", size, "0" * 64) for index, size in enumerate(sizes)]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(1, 60))
def test_windows_cover_every_byte_of_every_file_once_and_in_order(sizes: list[int], length: int) -> None:
    files = parts(sizes)
    seen: dict[str, list[int]] = {part.name: [] for part in files}
    for start in range(0, stream_bytes(files), length):
        slices = plan(files, start, length)
        assert 0 < sum(piece.length for piece in slices) <= length
        for piece in slices:
            seen[piece.part.name] += range(piece.offset, piece.offset + piece.length)
    assert all(seen[part.name] == list(range(part.size)) for part in files)


@pytest.mark.parametrize("start", [6, 7, 10**9])
def test_there_is_nothing_after_the_end(start: int) -> None:
    assert plan(parts([1, 2, 3]), start, 10) == []


def test_no_name_of_a_contribution_is_a_path_or_hidden() -> None:
    assert all(re.fullmatch(r"(adapter|traces)/[A-Za-z_]+\.[a-z]+", name) for name in part_limits(KINDS))


def test_flower_is_imported_in_few_places() -> None:
    """So that Flower's switches are always set before it is imported, and its internals stay where we look for them."""
    importing = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"^\s*(import|from) flwr\b", path.read_text(), re.MULTILINE)
    }
    assert importing == {
        "fedcompose/wire.py",
        "client/fedcompose_client/executor.py",
        "coordinator/fedcompose_coordinator/driver.py",
        "coordinator/fedcompose_coordinator/superlink.py",
    }


@pytest.mark.parametrize("module", ["fedcompose_client.executor", "fedcompose_coordinator.driver"])
def test_whoever_imports_flower_has_its_switches_set_before(module: str, private_home: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLWR")}
    code = f"""
import sys, builtins, os
real = builtins.__import__
def watched(name, *rest):
    if name.split(".")[0] == "flwr" and os.environ.get("FLWR_TELEMETRY_ENABLED") != "0":
        sys.exit(7)
    return real(name, *rest)
builtins.__import__ = watched
import {module}
"""
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_importing_the_wire_turns_off_what_flower_would_send(private_home: Path) -> None:
    names = ["FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", "FLWR_HOME"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLWR")}
    code = f"import os, fedcompose.wire; print(*(os.environ[name] for name in {names}))"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["0", "1", str(private_home / "flower")]
