"""What guesses about canaries prove: a lower bound on ε from one training run.

Each canary was put among the training rows by the flip of a coin. An auditor guesses the coin of some of them from a
score. Under (ε, δ)-differential privacy so many right guesses are only so likely; the largest ε that they refute is a
lower bound on the true one. The bound cannot exceed what all guesses right would prove: the cap, which goes up with the
number of canaries and is always told with the bound. Nothing here knows about models.

Source: T. Steinke, M. Nasr, M. Jagielski, Privacy auditing with one (1) training run, NeurIPS 2023, theorem 5.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcompose.intervals import Interval, wilson

SHARES_GUESSED = (0.1, 0.25, 0.5, 1.0)  # of the canaries, half of them the highest scores and half the lowest
CONFIDENCE = 0.95
MOST_EPSILON = 50.0
BISECTIONS = 50


@dataclass(frozen=True)
class Bound:
    """ε is at least `low`, and this audit could have shown `cap` at most; both hold with 95 % confidence."""

    low: float
    cap: float
    right: int
    guesses: int


def one_run_bound(scores: Sequence[float], included: Sequence[bool], delta: float) -> Bound:
    """The best bound over several numbers of guesses, with the confidence shared among them (Bonferroni)."""
    order = np.argsort(np.asarray(scores), kind="stable")
    coins = np.asarray(included)[order]
    count, doubt = len(coins), (1 - CONFIDENCE) / len(SHARES_GUESSED)
    bounds = []
    for share in SHARES_GUESSED:
        half = int(share * count / 2)
        right = int(coins[count - half :].sum() + (~coins[:half]).sum())
        low, cap = (epsilon_low(each, 2 * half, count, delta, doubt) for each in (right, 2 * half))
        bounds.append(Bound(low, cap, right, 2 * half))
    best = max(bounds, key=lambda bound: (bound.low, bound.guesses))
    return Bound(best.low, max(bound.cap for bound in bounds), best.right, best.guesses)


def epsilon_low(right: int, guesses: int, canaries: int, delta: float, doubt: float = 1 - CONFIDENCE) -> float:
    """The largest ε that `right` of `guesses` refute, wrong in at most a share `doubt` of all audits."""
    if guesses == 0 or chance(right, guesses, canaries, 0.0, delta) > doubt:
        return 0.0
    low, high = 0.0, MOST_EPSILON
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if chance(right, guesses, canaries, middle, delta) > doubt:
            high = middle
        else:
            low = middle
    return low


def chance(right: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """How likely at most so many right guesses or more are under (ε, δ)-differential privacy."""
    likely = _binomial(guesses, 1 / (1 + math.exp(-epsilon)))
    tail = float(likely[right:].sum())
    below = np.cumsum(likely[:right][::-1])  # P[right - i ≤ guessed right < right] for i = 1, 2, ...
    worst = float((below / np.arange(1, right + 1)).max()) if right else 0.0
    return min(1.0, tail + 2 * canaries * delta * worst)


def _binomial(count: int, share: float) -> NDArray[np.float64]:
    """P[0], ..., P[count] of so many independent tries."""
    if share in (0.0, 1.0):
        return np.asarray(np.eye(count + 1)[int(share) * count])
    logs = np.cumsum([0.0, *np.log(np.arange(1, count + 1))])
    hits = np.arange(count + 1)
    return np.asarray(np.exp(logs[-1] - logs - logs[::-1] + hits * math.log(share) + hits[::-1] * math.log1p(-share)))


def hits_at(false_share: float, members: Sequence[float], others: Sequence[float]) -> Interval | None:
    """The share of members above the score that at most `false_share` of the others exceed; None if too few others.

    The interval is Wilson's, for that score: how well the others tell it is not part of it.
    """
    allowed = int(false_share * len(others) + 1e-9)
    if allowed < 1:
        return None
    threshold = sorted(others, reverse=True)[allowed]
    return wilson(sum(score > threshold for score in members), len(members))
