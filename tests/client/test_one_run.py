"""The statistics of an audit against what is known exactly."""

from __future__ import annotations

import math
import random
from statistics import median

import pytest

from fedcompose.intervals import ranking
from fedcompose_client.one_run import epsilon_low, hits_at, one_run_bound


@pytest.mark.parametrize(("canaries", "cap"), [(50, 2.78), (100, 3.49), (200, 4.19), (500, 5.10), (1000, 5.78)])
def test_all_guesses_right_prove_no_more_than_the_known_cap(canaries: int, cap: float) -> None:
    assert epsilon_low(canaries, canaries, canaries, 1e-5) == pytest.approx(cap, abs=0.01)


@pytest.mark.parametrize(("epsilon", "known"), [(0.5, 0.37), (1.0, 0.87), (2.0, 1.88), (4.0, 3.58)])
def test_randomised_response_is_bounded_from_below_by_nearly_its_epsilon(epsilon: float, known: float) -> None:
    """Each coin is reported truly with probability e^ε / (1 + e^ε), which is ε-differentially private exactly."""
    lots, truth = random.Random(f"response:{epsilon}"), 1 / (1 + math.exp(-epsilon))
    bounds = []
    for _ in range(20):
        right = sum(lots.random() < truth for _ in range(1000))
        bounds.append(epsilon_low(right, 1000, 1000, 1e-5))
    assert median(bounds) == pytest.approx(known, abs=0.13)
    assert sum(bound > epsilon for bound in bounds) <= 4  # 5 % of audits may be wrong


def test_scores_that_know_nothing_prove_nothing_and_scores_that_know_all_reach_the_cap() -> None:
    lots = random.Random(3)
    coins = [lots.random() < 0.5 for _ in range(300)]
    wrong = sum(one_run_bound([lots.random() for _ in coins], coins, 1e-5).low > 0 for _ in range(60))
    assert wrong <= 6
    found = one_run_bound([coin + lots.random() / 2 for coin in coins], coins, 1e-5)
    assert found.low > 3.0 and found.low <= found.cap < 4.6
    assert found.right <= found.guesses


def test_delta_and_doubt_make_the_bound_lower() -> None:
    plain = epsilon_low(95, 100, 100, 0.0)
    assert plain > epsilon_low(95, 100, 100, 1e-3) > 0
    assert plain > epsilon_low(95, 100, 100, 0.0, doubt=0.001)
    assert epsilon_low(50, 100, 100, 1e-5) == 0 == epsilon_low(0, 0, 100, 1e-5)


def test_the_area_under_the_curve_has_an_honest_interval() -> None:
    assert ranking([1, 2, 3], [1, 2, 3]).value == 0.5
    perfect = ranking([2.0] * 20, [1.0] * 20)
    assert perfect.value == perfect.high == 1.0 and 0.8 < perfect.low < 1.0
    lots = random.Random(5)
    inside = 0
    for _ in range(200):
        found = ranking([lots.gauss(1, 1) for _ in range(40)], [lots.gauss(0, 1) for _ in range(40)])
        inside += found.low <= 0.7602 <= found.high  # Φ(1 / √2)
    assert inside >= 182  # 95 % of 200, less what chance takes


def test_shares_at_few_false_alarms_need_enough_others() -> None:
    members, others = [*range(50, 150)], [*range(100)]
    found = hits_at(0.01, members, others)
    assert found is not None and found.value == 0.51  # above 98, the second highest of the others
    assert hits_at(0.001, members, others) is None
