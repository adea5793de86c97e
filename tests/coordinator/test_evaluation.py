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
from fedcompose.files import write_json
from fedcompose.intervals import paired_difference
from fedcompose_coordinator.evaluation import Parts, Plan, summarise
from fedcompose_coordinator.grid import Method, fill, finished, measure, measure_in_processes
from fedcompose_coordinator.questions import Domain, Prompt
from tests.coordinator.sample_report import sample_plan, write_cells

ROOT = Path(__file__).parents[2]
PER_DOMAIN = 8
DOMAINS = [
    Domain("sums", "bank", "chain_sum", {}, PER_DOMAIN), Domain("truth", "archive", "logic", {}, PER_DOMAIN),
]  # fmt: skip
ROUTERS = {
    "composed": "learned", "base": "none", "uniform": "uniform", "random_router": "random",
    "expert:bank": "expert:bank", "expert:archive": "expert:archive",
}  # fmt: skip
PLAN = Plan({name: Method(router, f"digest of {name}") for name, router in ROUTERS.items()}, DOMAINS, 4)
CELLS = PLAN.cells()
SKILL = {"learned": 7, "none": 2, "uniform": 4, "random": 3, "expert:bank": 6, "expert:archive": 5}
RIGHT = {
    prompt.text: f"Answer: {example.answer}"
    for domain in DOMAINS for prompt, example in zip(domain.prompts(), domain.examples, strict=True)
}  # fmt: skip


class FakeBench:
    """Knows as many answers of each set as `SKILL` says."""

    def __init__(self, log: Path) -> None:
        self.log, self.router = log, ""

    def become(self, method: Method) -> None:
        self.router = method.router
        with self.log.open("a") as stream:
            stream.write(f"{os.getpid()} {self.router}\n")

    def ask(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        time.sleep(0.02)  # long enough for another process to take a cell meanwhile
        return [RIGHT[prompt.text] if row < SKILL[self.router] else "" for row, prompt in enumerate(prompts)]

    def routed(self) -> dict[str, Any]:
        return {"routed": [[30, 10], [20, 20]] if self.router == "learned" else None, "distinct": None, "held": 8}


def run(plan: Plan, folder: Path) -> dict[str, Any]:
    fill(plan.cells(), folder / "evaluation", lambda: FakeBench(folder / "log"))
    return summarise(plan, folder / "evaluation")


def work(folder: str, die_after: int = -1, together: int = 1) -> None:
    """One of `together` processes that begin at the same time; it ends without a word after `die_after` cells."""
    (Path(folder) / f"ready-{os.getpid()}").touch()
    while len(list(Path(folder).glob("ready-*"))) < together:
        time.sleep(0.01)

    class Dying(FakeBench):
        def ask(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
            nonlocal die_after
            if die_after == 0:
                os._exit(9)
            die_after -= 1
            return super().ask(prompts, max_new_tokens)

    measure(CELLS, Path(folder), lambda: Dying(Path(folder) / "log"))


def command(folder: Path, die_after: int = -1, together: int = 1) -> list[str]:
    call = f"from tests.coordinator.test_evaluation import work; work({str(folder)!r}, {die_after}, {together})"
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {call}"]


def file_of(folder: Path, method: str, domain: Domain) -> Path:
    return folder / "evaluation" / "cells" / f"{PLAN.cell(method, domain).fingerprint[:16]}.json"


def test_every_method_is_scored_on_every_domain_with_interval_and_n(tmp_path: Path) -> None:
    found = run(PLAN, tmp_path)
    assert set(found["accuracy"]) == {*ROUTERS, "best_single"}
    cell = found["accuracy"]["composed"]["sums"]
    assert cell["value"] == 7 / 8 and cell["n"] == PER_DOMAIN and cell["low"] < 7 / 8 < cell["high"]
    json.dumps(found, allow_nan=False)


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
    cell = file_of(tmp_path, "expert:bank", DOMAINS[1])
    cell.unlink() if damage == "gone" else cell.write_bytes(cell.read_bytes()[:40])
    (tmp_path / "log").write_text("")
    assert run(PLAN, tmp_path)["accuracy"] == first["accuracy"]
    assert (tmp_path / "log").read_text().split()[1:] == ["expert:bank"]


def test_a_new_candidate_is_measured_again_and_nothing_else(tmp_path: Path) -> None:
    run(PLAN, tmp_path)
    (tmp_path / "log").write_text("")
    run(replace(PLAN, methods={**PLAN.methods, "composed": Method("learned", "another")}), tmp_path)
    assert {line.split()[1] for line in (tmp_path / "log").read_text().splitlines()} == {"learned"}


def test_the_same_thing_under_two_names_is_measured_once(tmp_path: Path) -> None:
    twice = replace(PLAN, methods={**PLAN.methods, "again": PLAN.methods["uniform"]})
    run(twice, tmp_path)
    assert (tmp_path / "log").read_text().count("uniform") == len(DOMAINS)


def test_other_prompts_invalidate_every_cell(tmp_path: Path) -> None:
    run(PLAN, tmp_path)
    assert finished(CELLS, tmp_path / "evaluation") == 12
    other = replace(PLAN, domains=[replace(domain, count=9) for domain in DOMAINS])
    assert finished(other.cells(), tmp_path / "evaluation") == 0


def test_a_half_finished_grid_has_no_summary(tmp_path: Path) -> None:
    run(PLAN, tmp_path)
    file_of(tmp_path, "base", DOMAINS[0]).unlink()
    with pytest.raises(ConfigError) as caught:
        summarise(PLAN, tmp_path / "evaluation")
    assert caught.value.code == "EVALUATION_INCOMPLETE"


def test_a_method_is_named_by_exactly_the_weights_it_needs(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "attention").mkdir(parents=True)
        (tmp_path / name / "attention" / "weights").write_text(name)
        (tmp_path / name / "router.safetensors").write_text(name)
        write_json(tmp_path / name / "composition.json", {"router": {"decides": "block"}, "experts": []})
    one, two = (Parts("base", {"bank": "a", "lab": "b"}, tmp_path / name) for name in ("one", "two"))
    less = Parts("base", {"bank": "a", "lab": "another"}, tmp_path / "one")
    assert one.composed(one.candidate).digest != two.composed(two.candidate).digest
    assert one.method("none", attention=one.candidate).digest != one.method("none").digest
    for router in ("uniform", "oracle", "random", "expert:bank"):
        assert one.method(router).digest == two.method(router).digest
        assert (one.method(router).digest == less.method(router).digest) == (router == "expert:bank")
    write_json(tmp_path / "two" / "composition.json", {"router": {"decides": "linear"}, "experts": []})
    assert one.method("random").digest != two.method("random").digest


def test_two_processes_share_the_cells_and_measure_none_twice(tmp_path: Path) -> None:
    measure_in_processes(CELLS, tmp_path, command(tmp_path, together=2), workers=2)
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert len(lines) == 12 == finished(CELLS, tmp_path)
    assert len({pid for pid, _ in lines}) == 2


def test_a_process_that_dies_is_reported_and_leaves_no_lock(tmp_path: Path) -> None:
    with pytest.raises(MissingError) as caught:
        measure_in_processes(CELLS, tmp_path, command(tmp_path, die_after=3), workers=1)
    assert caught.value.code == "WORKER_FAILED"
    assert finished(CELLS, tmp_path) == 3
    measure(CELLS, tmp_path, lambda: FakeBench(tmp_path / "log"))
    assert finished(CELLS, tmp_path) == 12


def test_a_domain_without_gain_has_no_retention(tmp_path: Path) -> None:
    class Lost(FakeBench):
        def ask(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
            return ["?"] * len(prompts)

    plan = replace(PLAN, domains=DOMAINS[:1])
    folder = tmp_path / "evaluation"
    measure(plan.cells(), folder, lambda: Lost(tmp_path / "log"))
    found = summarise(plan, folder)
    assert found["retention"] == {"sums": None} and found["retention_mean"] is None
    json.dumps(found, allow_nan=False)


def test_the_sample_of_the_report_is_a_valid_evaluation(tmp_path: Path) -> None:
    plan = sample_plan(40)
    write_cells(plan, tmp_path)
    assert summarise(plan, tmp_path)["accuracy_mean"]["composed"]["n"] == 120
