"""A grid of cells, each a measurement of one method on one set of questions, made once and kept.

A finished cell is a file with one 0 or 1 per prompt, named by what was measured: the weights, the prompts, the limit.
An interrupted run continues where it stopped, a new candidate re-measures only what changed, a method that turns up
twice is measured once, and several processes share one grid.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from fedcompose.errors import FedcomposeError
from fedcompose.files import dump_json, read_json, sha256_hex, write_json
from fedcompose_coordinator.processes import run_all
from fedcompose_coordinator.questions import Prompt, Questions

CLAIMS = 1 << 32  # bytes of the file of claims that stand for cells; two cells rarely share one, and then only wait


@dataclass(frozen=True)
class Method:
    """One way to answer: who decides about the experts, and whose attention LoRA is merged in.

    `router` is "learned" (that of the candidate), "expert:SITE", "oracle" (each prompt's own expert), "random",
    "uniform" or "none". `candidate` is a folder; a control is asked at the same places as its candidate's router.
    `digest` names the exact weights behind it all.
    """

    router: str
    digest: str
    candidate: Path | None = None
    attention: Path | None = None
    seed: int = 0  # of the random router


@dataclass(frozen=True)
class Cell:
    """One method on one set of questions."""

    method: Method
    questions: Questions
    max_new_tokens: int

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the cell would have to be measured again."""
        method = self.method
        measured = {
            "router": method.router, "weights": method.digest, "questions": dict(self.questions.identity()),
            "max_new_tokens": self.max_new_tokens, "seed": method.seed if method.router == "random" else None,
        }  # fmt: skip
        return sha256_hex(dump_json(measured))


class Bench(Protocol):
    """One loaded model that can act as each method in turn."""

    def become(self, method: Method) -> None:
        """Act as `method` from now on; what `routed` tells starts anew."""

    def ask(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        """The most likely completion of every prompt, in their order."""

    def routed(self) -> dict[str, Any]:
        """Where the tokens went since `become`, and what the method holds in memory; kept in the cell."""


OpenBench = Callable[[], Bench]
OnCell = Callable[[int, int], None]


def fill(
    cells: Sequence[Cell],
    folder: Path,
    open_bench: OpenBench,
    *,
    workers: Sequence[str] = (),
    processes: int = 1,
    on_cell: OnCell | None = None,
) -> None:
    """Measure the cells that are missing; with more than one process, `workers` is the command that starts one of
    them, which must end in `measure` over the same cells and folder.

    Raises: MissingError: `WORKER_FAILED`; finished cells are kept.
    """
    if processes > 1 and finished(cells, folder) < len(cells):
        measure_in_processes(cells, folder, workers, processes, on_cell)
    measure(cells, folder, open_bench, on_cell)


def measure(cells: Sequence[Cell], folder: Path, open_bench: OpenBench, on_cell: OnCell | None = None) -> None:
    """Measure every cell that nobody has measured or is measuring; opens the model only for work.

    Safe to run in several processes at once over the same folder.
    """
    bench: Bench | None = None
    for cell in _claim(cells, folder):
        bench = bench or open_bench()
        write_json(_path(folder, cell), _measure(cell, bench))
        if on_cell:
            on_cell(finished(cells, folder), len(cells))


def measure_in_processes(
    cells: Sequence[Cell], folder: Path, command: Sequence[str], workers: int, on_cell: OnCell | None = None
) -> None:
    """Run `command`, which must end in `measure` over the same cells and folder, `workers` times side by side.

    Raises: MissingError: `WORKER_FAILED`; finished cells are kept.
    """

    def tell() -> None:
        if on_cell:
            on_cell(finished(cells, folder), len(cells))

    run_all([command] * workers, workers, on_tick=tell)
    tell()


def finished(cells: Sequence[Cell], folder: Path) -> int:
    """How many of the cells are done."""
    return sum(read_cell(cell, folder) is not None for cell in cells)


def read_cell(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """A finished cell, or None when it is missing, unreadable or was measured on something else."""
    path = _path(folder, cell)
    if not path.is_file():
        return None
    try:
        found = read_json(path)
    except FedcomposeError:
        return None
    return found if isinstance(found, dict) and found.get("fingerprint") == cell.fingerprint else None


def _claim(cells: Sequence[Cell], folder: Path) -> Iterator[Cell]:
    """Cells that are not done, each held by a lock on its own byte of one file while the caller works on it.

    The kernel lets go of a lock when its process ends, however it ends, so a crash never blocks a cell.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".claims").open("ab") as claims:
        for cell in cells:
            byte = int(cell.fingerprint, 16) % CLAIMS
            try:
                fcntl.lockf(claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
            except (BlockingIOError, PermissionError):
                continue
            if read_cell(cell, folder) is None:
                yield cell
            fcntl.lockf(claims, fcntl.LOCK_UN, 1, byte)


def _measure(cell: Cell, bench: Bench) -> dict[str, Any]:
    started = time.monotonic()
    bench.become(cell.method)
    completions = bench.ask(cell.questions.prompts(), cell.max_new_tokens)
    return {
        "method": cell.method.router,
        "questions": cell.questions.name,
        "fingerprint": cell.fingerprint,
        **cell.questions.mark(completions),
        **bench.routed(),
        "seconds": round(time.monotonic() - started, 3),
    }


def _path(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"{cell.fingerprint[:16]}.json"
