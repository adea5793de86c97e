"""The grid: resumable, shared by processes, bound to what it measured; and its summary's arithmetic."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedcompose.errors import ConfigError, MissingError
from fedcompose.intervals import paired_difference
from fedcompose.tasks import Example, Task
from fedcompose_coordinator.evaluation import (
    Domain,
    Plan,
    evaluate,
    finished,
    measure,
    measure_in_processes,
    summarise,
)
from tests.coordinator.sample_report import sample_plan, write_cells

ROOT = Path(__file__).parents[2]
PER_DOMAIN = 8
DOMAINS = [Domain("sums", "bank", "chain_sum", {}), Domain("truth", "archive", "logic", {})]
METHODS = ("composed", "base", "uniform", "random_router", "expert:bank", "expert:archive")
PLAN = Plan(DOMAINS, {method: f"digest of {method}" for method in METHODS}, PER_DOMAIN, max_new_tokens=4)
SKILL = {"composed": 7, "base": 2, "uniform": 4, "random_router": 3, "expert:bank": 6, "expert:archive": 5}


class FakeBench:
    """A model that is the name of the method it acts as."""

    tokenizer = None

    def __init__(self, log: Path) -> None:
        self.log, self.method = log, ""

    def become(self, method: str, seed: int) -> str:
        self.method = method
        with self.log.open("a") as stream:
            stream.write(f"{os.getpid()} {method}\n")
        return method

    def routed(self) -> list[list[int]] | None:
        return [[30, 10], [20, 20]] if self.method == "composed" else None


def fake_answers(
    model: str, tokenizer: None, task: Task, examples: Sequence[Example], max_new_tokens: int
) -> list[str]:
    time.sleep(0.02)  # long enough for another process to take a cell meanwhile
    right = SKILL[model]
    return [f"Answer: {example.answer}" if number < right else "" for number, example in enumerate(examples)]


def run(plan: Plan, folder: Path) -> dict[str, Any]:
    return evaluate(plan, folder, lambda: FakeBench(folder / "log"), fake_answers)


def work(folder: str, die_after: int = -1, together: int = 1) -> None:
    """One of `together` processes that begin at the same time; it ends without a word after `die_after` cells."""
    (Path(folder) / f"ready-{os.getpid()}").touch()
    while len(list(Path(folder).glob("ready-*"))) < together:
        time.sleep(0.01)

    def dying(model: str, *rest: Any) -> list[str]:
        nonlocal die_after
        if die_after == 0:
            os._exit(9)
        die_after -= 1
        return fake_answers(model, *rest)

    measure(PLAN, Path(folder), lambda: FakeBench(Path(folder) / "log"), dying)


def command(folder: Path, die_after: int = -1, together: int = 1) -> list[str]:
    call = f"from tests.coordinator.test_evaluation import work; work({str(folder)!r}, {die_after}, {together})"
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {call}"]


def test_every_method_is_scored_on_every_domain_with_interval_and_n(tmp_path: Path) -> None:
    found = run(PLAN, tmp_path)
    assert set(found["accuracy"]) == {*METHODS, "best_single"}
    cell = found["accuracy"]["composed"]["sums"]
    assert cell["value"] == 7 / 8 and cell["n"] == PER_DOMAIN and cell["low"] < 7 / 8 < cell["high"]
    assert json.loads((tmp_path / "evaluation.json").read_text()) == found


def test_retention_and_differences_follow_from_the_same_prompts(tmp_path: Path) -> None:
    found = run(PLAN, tmp_path)
    assert found["retention"]["sums"] == pytest.approx((7 - 2) / (6 - 2))
    assert found["best_single"] == "bank"
    assert found["accuracy"]["best_single"] == found["accuracy"]["expert:bank"]
    assert found["difference"]["base"]["truth"]["value"] == pytest.approx(5 / 8)
    assert found["difference"]["own_expert"]["truth"]["value"] == pytest.approx(2 / 8)
    expected = paired_difference([1] * 7 + [0], [1] * 4 + [0] * 4).as_dict()
    assert found["difference"]["uniform"]["sums"] == expected
    assert found["difference_mean"]["uniform"]["n"] == 2 * PER_DOMAIN


def test_routing_is_the_share_of_tokens_per_layer(tmp_path: Path) -> None:
    routing = run(PLAN, tmp_path)["routing"]
    assert routing["experts"] == ["bank", "archive"]
    assert routing["share"]["sums"] == [[0.75, 0.25], [0.5, 0.5]]
    assert routing["tokens"] == {"sums": 40, "truth": 40}


def test_finished_cells_are_not_measured_again(tmp_path: Path) -> None:
    first = run(PLAN, tmp_path)
    before = (tmp_path / "log").read_text()
    assert run(PLAN, tmp_path) == first
    assert (tmp_path / "log").read_text() == before


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_missing_or_damaged_cell_is_measured_again(tmp_path: Path, damage: str) -> None:
    first = run(PLAN, tmp_path)
    cell = tmp_path / "evaluation" / "cells" / "expert-bank" / "truth.json"
    cell.unlink() if damage == "gone" else cell.write_bytes(cell.read_bytes()[:40])
    (tmp_path / "log").write_text("")
    assert run(PLAN, tmp_path)["accuracy"] == first["accuracy"]
    assert (tmp_path / "log").read_text().split()[1:] == ["expert:bank"]


def test_a_new_candidate_is_measured_again_and_nothing_else(tmp_path: Path) -> None:
    run(PLAN, tmp_path)
    (tmp_path / "log").write_text("")
    run(replace(PLAN, digests={**PLAN.digests, "composed": "another"}), tmp_path)
    assert {line.split()[1] for line in (tmp_path / "log").read_text().splitlines()} == {"composed"}


def test_other_prompts_invalidate_every_cell(tmp_path: Path) -> None:
    run(PLAN, tmp_path)
    assert finished(PLAN, tmp_path / "evaluation") == 12
    assert finished(replace(PLAN, per_domain=9), tmp_path / "evaluation") == 0


def test_a_half_finished_grid_has_no_summary(tmp_path: Path) -> None:
    run(PLAN, tmp_path)
    (tmp_path / "evaluation" / "cells" / "base" / "sums.json").unlink()
    with pytest.raises(ConfigError) as caught:
        summarise(PLAN, tmp_path / "evaluation")
    assert caught.value.code == "EVALUATION_INCOMPLETE"


def test_two_processes_share_the_cells_and_measure_none_twice(tmp_path: Path) -> None:
    measure_in_processes(PLAN, tmp_path, command(tmp_path, together=2), workers=2)
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert len(lines) == 12 == finished(PLAN, tmp_path)
    assert len({pid for pid, _ in lines}) == 2


def test_a_process_that_dies_is_reported_and_leaves_no_lock(tmp_path: Path) -> None:
    with pytest.raises(MissingError) as caught:
        measure_in_processes(PLAN, tmp_path, command(tmp_path, die_after=3), workers=1)
    assert caught.value.code == "EVALUATION_WORKER_FAILED"
    assert finished(PLAN, tmp_path) == 3
    measure(PLAN, tmp_path, lambda: FakeBench(tmp_path / "log"), fake_answers)
    assert finished(PLAN, tmp_path) == 12


def test_a_domain_without_gain_has_no_retention(tmp_path: Path) -> None:
    plan = replace(PLAN, domains=[Domain("sums", "bank", "chain_sum", {})])
    folder = tmp_path / "evaluation"
    measure(plan, folder, lambda: FakeBench(tmp_path / "log"), lambda *_: ["?"] * PER_DOMAIN)
    found = summarise(plan, folder)
    assert found["retention"] == {"sums": None} and found["retention_mean"] is None
    json.dumps(found, allow_nan=False)


def test_the_sample_of_the_report_is_a_valid_evaluation(tmp_path: Path) -> None:
    plan = sample_plan(40)
    write_cells(plan, tmp_path)
    assert summarise(plan, tmp_path)["accuracy_mean"]["composed"]["n"] == 120
