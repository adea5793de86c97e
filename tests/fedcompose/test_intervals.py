"""Golden numbers, symmetries and coverage of the intervals every report rests on."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from fedcompose.intervals import (
    Z_95,
    Ingredients,
    Interval,
    Resampling,
    accuracy,
    drawn_interval,
    drawn_ratio,
    mean_interval,
    paired_difference,
    retention,
    unpaired_difference,
    wilson,
)


def vectors(both: int, only_first: int, only_second: int, neither: int) -> tuple[list[int], list[int]]:
    first = [1] * (both + only_first) + [0] * (only_second + neither)
    second = [1] * both + [0] * only_first + [1] * only_second + [0] * neither
    return first, second


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_agrees_with_published_limits(right: int, n: int, low: float, high: float) -> None:
    found = wilson(right, n)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


def test_wilson_mirrors_right_and_wrong() -> None:
    some, rest = wilson(7, 40), wilson(33, 40)
    assert some.low == pytest.approx(1 - rest.high)
    assert wilson(40, 40).high == 1.0 and wilson(40, 40).low < 1.0


@pytest.mark.parametrize("vector", [[], [0, 2], [0.5]])
def test_accuracy_refuses_what_is_not_right_or_wrong(vector: list[int]) -> None:
    with pytest.raises(ValueError, match="zeros and ones"):
        accuracy(vector)


@pytest.mark.parametrize("counts", [(90, 20, 8, 82), (10, 0, 0, 190), (0, 30, 0, 0), (50, 3, 3, 44), (100, 9, 1, 90)])
def test_the_paired_limits_are_where_the_score_statistic_reaches_the_quantile(
    counts: tuple[int, ...],
) -> None:
    first, second = vectors(*counts)
    found = paired_difference(first, second)
    n, b, c = len(first), counts[1], counts[2]
    assert found.low <= found.value <= found.high
    for end, sign in ((found.low, 1), (found.high, -1)):
        if abs(end) == 1:
            continue
        # independent of the code: the likelihood is maximised numerically, not by the closed form
        share = constrained_share(b, c, n, end)
        statistic = (b - c - n * end) / math.sqrt(n * (2 * share + end * (1 - end)))
        assert statistic == pytest.approx(sign * Z_95, abs=1e-3)


def constrained_share(b: int, c: int, n: int, difference: float) -> float:
    """Most likely probability that only the second is right, given the difference; by ternary search."""

    def likelihood(q: float) -> float:
        rest = 1 - 2 * q - difference
        terms = ((b, q + difference), (c, q), (n - b - c, rest))
        return sum(count * math.log(max(p, 1e-300)) for count, p in terms if count)

    low, high = max(0.0, -difference), (1 - difference) / 2
    for _ in range(200):
        third = (high - low) / 3
        if likelihood(low + third) < likelihood(high - third):
            low += third
        else:
            high -= third
    return (low + high) / 2


@pytest.mark.parametrize(("b", "c"), [(b, c) for b in range(0, 24, 3) for c in range(0, 24, 4) if b + c])
def test_zero_is_left_out_exactly_when_mcnemar_rejects(b: int, c: int) -> None:
    found = paired_difference(*vectors(60, b, c, 60))
    assert found.excludes_zero() == (abs(b - c) / math.sqrt(b + c) > Z_95)


def test_swapping_the_models_mirrors_the_difference() -> None:
    first, second = vectors(60, 17, 5, 40)
    there, back = paired_difference(first, second), paired_difference(second, first)
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))


def test_equal_answers_still_leave_doubt() -> None:
    found = paired_difference([1, 0] * 100, [1, 0] * 100)
    assert found.value == 0 and 0 < found.high < 0.03 and -0.03 < found.low < 0


def test_paired_limits_cover_the_truth_about_95_times_in_100() -> None:
    rng, inside, rounds = random.Random(1), 0, 600
    for _ in range(rounds):  # truth: only first 0.20, only second 0.10, difference 0.10
        draws = [rng.random() for _ in range(120)]
        first = [int(u < 0.6) for u in draws]
        second = [int(u < 0.4 or 0.6 <= u < 0.7) for u in draws]
        found = paired_difference(first, second)
        inside += found.low <= 0.10 <= found.high
    assert 0.92 <= inside / rounds <= 0.98


def test_the_paired_interval_is_narrower_than_an_unpaired_one_when_models_agree() -> None:
    first, second = vectors(150, 12, 4, 34)
    one, two = accuracy(first), accuracy(second)
    unpaired = math.hypot(one.value - one.low, two.high - two.value)
    found = paired_difference(first, second)
    assert found.value - found.low < 0.6 * unpaired


def test_the_unpaired_difference_agrees_with_published_limits() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), 873-890, table II, method 10: 56/70 - 48/80
    found = unpaired_difference(wilson(56, 70), wilson(48, 80))
    assert (round(found.value, 4), round(found.low, 4), round(found.high, 4)) == (0.2, 0.0524, 0.3339)


def test_different_prompts_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="same prompts"):
        paired_difference([1, 0], [1, 0, 1])


def test_a_mean_over_four_equal_domains_halves_the_interval() -> None:
    part = Interval(0.5, 0.4, 0.58, 100)
    found = mean_interval([part] * 4)
    assert (found.value, found.low, found.high, found.n) == pytest.approx((0.5, 0.45, 0.54, 400))


def test_retention_is_the_kept_share_of_the_experts_gain() -> None:
    base, expert, composed = [0] * 100, [1] * 80 + [0] * 20, [1] * 72 + [0] * 28
    per_domain, mean = retention({"math": Ingredients(base, expert, composed)})
    found = per_domain["math"]
    assert found is not None and mean is not None
    assert found.value == mean.value == pytest.approx(0.9)
    assert 0.8 < found.low < 0.9 < found.high < 1.0


def test_a_domain_without_gain_has_no_retention_and_does_not_spoil_the_mean() -> None:
    good = Ingredients([0] * 50, [1] * 50, [1] * 50)
    flat = Ingredients([1, 0] * 25, [1, 0] * 25, [1] * 50)
    per_domain, mean = retention({"flat": flat, "good": good})
    assert per_domain["flat"] is None
    assert mean is not None and mean.value == 1.0
    assert retention({"flat": flat}) == ({"flat": None}, None)


def test_retention_limits_are_the_same_on_every_run() -> None:
    rng = random.Random(3)
    parts = Ingredients(*([rng.randint(0, 1) for _ in range(90)] for _ in range(2)), [1] * 90)
    parts = Ingredients([0] * 60 + list(parts.base)[:30], parts.expert, parts.composed)
    assert retention({"a": parts}) == retention({"a": parts})


def answers(seed: int, runs: int, count: int = 300, spread: float = 0.0) -> list[list[int]]:
    """Runs whose skill differs by `spread`, over prompts of their own difficulty."""
    rng = np.random.default_rng(seed)
    difficulty = rng.random(count)
    return [(difficulty < 0.6 + spread * rng.normal()).astype(int).tolist() for _ in range(runs)]


def test_of_one_run_the_bootstrap_agrees_with_wilson() -> None:
    vectors = answers(0, runs=1)
    found = drawn_interval(Resampling({"math": 300}, 1).mean("math", vectors), 300)
    expected = accuracy(vectors[0])
    assert found is not None and found.value == pytest.approx(expected.value)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.01)


def test_the_bootstrap_pairs_prompts_and_runs() -> None:
    resampling = Resampling({"math": 300}, 3)
    first = answers(1, runs=3, spread=0.1)
    second = [[bit if row % 20 else 0 for row, bit in enumerate(run)] for run in first]  # a little worse everywhere
    one, two = resampling.mean("math", first), resampling.mean("math", second)
    alone, apart = drawn_interval(one, 300), drawn_interval(one - two, 300)
    assert alone is not None and apart is not None and apart.excludes_zero()
    assert apart.high - apart.low < (alone.high - alone.low) / 3
    unpaired = drawn_interval(one - np.random.default_rng(0).permutation(two), 300)
    assert unpaired is not None and not unpaired.excludes_zero()


def test_runs_that_differ_make_an_interval_wider_than_prompts_do() -> None:
    alike, apart = (
        drawn_interval(Resampling({"math": 300}, 3).mean("math", answers(2, runs=3, spread=spread)), 300)
        for spread in (0.0, 0.15)
    )
    assert alike is not None and apart is not None
    assert apart.high - apart.low > 1.5 * (alike.high - alike.low)


def test_the_variance_between_runs_is_right_on_average() -> None:
    rng, found = np.random.default_rng(3), []
    for _ in range(200):  # each run is right on everything or nothing of a single prompt: only runs vary
        runs = rng.integers(0, 2, size=(3, 1))
        found.append(np.var(Resampling({"math": 1}, 3).mean("math", runs.tolist())[1:]))
    assert np.mean(found) == pytest.approx(0.25 / 3, rel=0.15)  # the variance of a mean of three coins


def test_resampled_limits_cover_the_truth_about_95_times_in_100() -> None:
    inside, resampling = 0, Resampling({"math": 120}, 1)
    for seed in range(200):
        found = drawn_interval(resampling.mean("math", answers(seed, 1, 120)), 120)
        assert found is not None
        inside += found.low <= 0.6 <= found.high
    assert 0.9 <= inside / 200 <= 0.99


def test_a_ratio_without_a_gain_has_no_interval() -> None:
    resampling = Resampling({"math": 50}, 1)
    none, some = resampling.mean("math", [[0] * 50]), resampling.mean("math", [[1, 0] * 25])
    assert drawn_interval(drawn_ratio(some, none), 50) is None
    found = drawn_interval(drawn_ratio(some, some), 50)
    assert found is not None and (found.value, found.low, found.high) == (1, 1, 1)


def test_resampling_is_the_same_on_every_run() -> None:
    first, again = (Resampling({"b": 90, "a": 80}, 3).mean("a", answers(4, 3, 80)) for _ in range(2))
    assert np.array_equal(first, again)
