from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from fedcompose.bases import Base
from fedcompose.contribution import VerifiedContribution
from fedcompose.errors import ConfigError
from fedcompose.model.estimators import Gumbel
from fedcompose_coordinator import training
from fedcompose_coordinator.compose import compose
from fedcompose_coordinator.lessons import Lesson, Row, hold_back, micro_batches, within_budget
from fedcompose_coordinator.methods import ComposeSettings, recipe
from fedcompose_coordinator.work import prepare


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def test_the_learning_rate_warms_up_and_ends_near_zero() -> None:
    settings = ComposeSettings(steps=40, warm_up=0.1)
    rates = [training.schedule(at, settings) for at in range(40)]

    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8]) and rates[4] == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.01


def test_the_router_s_own_losses_rise_and_gumbel_s_temperature_falls_and_is_held() -> None:
    settings = ComposeSettings(steps=100, losses_warm_up=0.3, temperature_start=1.5, temperature_end=0.1)
    rising = [training.rising(at, settings) for at in range(100)]
    assert rising[0] == pytest.approx(1 / 30) and rising[14] == pytest.approx(0.5) and set(rising[29:]) == {1.0}
    assert training.rising(0, ComposeSettings()) == 1.0

    falling = [training.temperature(at, settings) for at in range(100)]
    assert falling[0] == 1.5 and falling[89:] == pytest.approx([0.1] * 11)
    steps = [math.log(later / earlier) for earlier, later in pairwise(falling[:90])]
    assert steps == pytest.approx([steps[0]] * 89)


def test_training_cools_the_gumbel_estimator_and_leaves_others_alone(
    contributions: list[VerifiedContribution], lessons: list[Lesson], base: Base
) -> None:
    work = prepare(contributions, lessons, base, recipe("gumbel", {"steps": 4}), 0, "cpu")
    training.cool(work, 0)
    assert isinstance(work.model.router.estimator, Gumbel) and work.model.router.estimator.tau == 1.5
    training.cool(work, 3)
    assert work.model.router.estimator.tau == pytest.approx(0.1)
    training.cool(prepare(contributions, lessons, base, recipe("hard"), 0, "cpu"), 3)


def test_guidance_makes_the_own_experts_speak(
    contributions: list[VerifiedContribution], lessons: list[Lesson], base: Base, tmp_path: Path
) -> None:
    shares = {}
    for method in ("hard", "guided"):
        compose(contributions, lessons, base, recipe(method, {"steps": 6, "batch": 8}), 0, tmp_path / method)
        shares[method] = _log(tmp_path / method)[-1]["routing_accuracy"]
    assert shares["guided"] > 0.9 and shares["guided"] > shares["hard"]


def test_guidance_reads_every_real_token_of_its_own_row(
    contributions: list[VerifiedContribution], lessons: list[Lesson], base: Base
) -> None:
    """In a batch with padding it is what the rows would give one by one, weighted by their tokens."""
    work = prepare(contributions, lessons, base, recipe("guided", {"guidance": 2.0}), 0, "cpu")
    rows = [work.rows[0], work.rows[-1]]

    def loss(rows: list[Row]) -> float:
        batch = work.read(rows)
        _, _, call = training.completion_loss(work, batch)
        return float(training.router_loss(work, batch, rows, call).detach())  # type: ignore[union-attr]

    lengths = [len(row.ids) for row in rows]
    apart = sum(loss([row]) * length for row, length in zip(rows, lengths, strict=True)) / sum(lengths)
    assert len(set(lengths)) == 2 and loss(rows) == pytest.approx(apart, rel=2e-2)  # bfloat16 where it is fast


def test_losses_that_compare_domains_see_every_domain_in_every_pass(
    contributions: list[VerifiedContribution], lessons: list[Lesson], base: Base, tmp_path: Path
) -> None:
    assert training.compares_domains(ComposeSettings(balance=0.1))
    assert training.compares_domains(ComposeSettings(entropy=0.1, entropy_form="inform"))
    assert not training.compares_domains(ComposeSettings(entropy=0.1, guidance=1.0, consistency=1.0))
    unlike = [Row(domain, tuple(range(5 + 40 * domain + n)), 2) for domain in range(3) for n in range(6)]
    for part in micro_batches(unlike, together=True, max_tokens=400):
        assert [sum(row.domain == domain for row in part) for domain in range(3)] == [len(part) / 3] * 3
    assert any({row.domain for row in part} != {0, 1, 2} for part in micro_batches(unlike, max_tokens=400))


@pytest.mark.parametrize("settings", [
    {"balance": 0.1}, {"entropy": 0.1, "entropy_form": "inform"}, {"consistency": 0.1},
    {"consistency": 0.1, "consistency_over": "sequence"},
], ids=str)  # fmt: skip
def test_every_loss_reaches_the_router(
    settings: dict[str, Any], contributions: list[VerifiedContribution], lessons: list[Lesson], base: Base
) -> None:
    work = prepare(contributions, lessons, base, recipe("hard", settings), 0, "cpu")
    batch, rows = work.read(work.rows), list(work.rows)
    _, _, call = training.completion_loss(work, batch)
    (gradient,) = torch.autograd.grad(training.router_loss(work, batch, rows, call), work.learned)  # type: ignore[arg-type]
    assert gradient.abs().max() > 1e-6


def test_a_budget_keeps_the_first_lessons_of_each_domain() -> None:
    rows = [Row(domain, tuple(range(10)), 2) for _ in range(4) for domain in range(2)]
    assert [row.domain for row in within_budget(rows, 25)] == [0, 1, 0, 1]
    assert within_budget(rows, None) == rows


def test_every_so_manieth_lesson_of_a_domain_is_held_back() -> None:
    rows = [Row(domain, tuple(range(4 + n)), 2) for domain in range(2) for n in range(9)]
    taught, held = hold_back(rows, 4)
    assert [len(row.ids) for row in held] == [7, 11, 7, 11] and len(taught) == 14


def test_training_stops_when_lessons_that_it_does_not_learn_from_stop_getting_likelier(
    contributions: list[VerifiedContribution], lessons: list[Lesson], base: Base, tmp_path: Path
) -> None:
    wrong = [
        Lesson(each.domain, each.prompt, "zyx" if n % 12 == 7 else each.completion) for n, each in enumerate(lessons)
    ]  # held back, and contradicted by all the others
    settings = {"steps": 30, "batch": 4, "checkpoint_every": 1, "patience": 3, "attention_lr": 1e-2}

    composition = compose(contributions, wrong, base, recipe("hard", settings), 0, tmp_path / "candidate")

    checks = [line["held_loss"] for line in _log(tmp_path / "candidate")]
    assert composition["training"]["steps_done"] == len(checks) < 30
    assert min(checks[-3:]) >= min(checks[:-3])
    assert training.out_of_patience([{"held_loss": 1.0}, {"held_loss": 2.0}], 1)
    assert not training.out_of_patience([{"held_loss": 2.0}, {"held_loss": 1.0}], 1)
    assert not training.out_of_patience([{"held_loss": 1.0}] * 9, None)


def test_a_run_that_diverges_says_so_and_leaves_no_candidate(
    contributions: list[VerifiedContribution], lessons: list[Lesson], base: Base, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        compose(contributions, lessons, base, recipe("hard", {"steps": 6, "attention_lr": 1e30}), 0, tmp_path / "out")
    assert error.value.code == "COMPOSE_DIVERGED" and not (tmp_path / "out").exists()
