"""How sure a measured accuracy is: 95 % intervals that stay honest for a few hundred prompts.

An accuracy is a share of right answers, so its interval is Wilson's. Two models are compared on the same
prompts, so their difference gets the paired score interval of Tango, which leaves out 0 just when McNemar's
test rejects. A mean over domains combines its parts' intervals (MOVER). A ratio such as the retention has no
such formula, and neither has anything over several training runs: these are bootstrapped with a fixed seed. What is
said of one run takes 0/1 vectors or counts and gives an `Interval`; over several runs, see `Resampling`. Nothing here
knows about models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959963984540054  # two-sided 95 % quantile of the standard normal distribution
BISECTIONS = 60  # halves [-1, 1] down to below 1e-17, the resolution of a float there
BOOTSTRAP_DRAWS = 4000
BOOTSTRAP_SEED = 20_250_607  # any fixed number: equal vectors must give equal intervals


@dataclass(frozen=True)
class Interval:
    """A measured value, the ends of its 95 % interval, and the number of prompts behind it."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)

    def excludes_zero(self) -> bool:
        """Whether the sign of the value is beyond doubt at the 95 % level."""
        return self.low > 0 or self.high < 0


def accuracy(correct: Sequence[int]) -> Interval:
    """The share of ones in a 0/1 vector, with Wilson's interval."""
    _check_binary(correct)
    return wilson(sum(correct), len(correct))


def wilson(right: int, n: int) -> Interval:
    """Wilson's score interval for `right` of `n`; never leaves [0, 1] and is not empty at 0 or `n` right.

    Source: E. B. Wilson, JASA 22 (1927), 209-212.
    """
    if not 0 <= right <= n or n == 0:
        raise ValueError(f"{right} of {n} is not a share")
    share, z2 = right / n, Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low = 0.0 if right == 0 else max(0.0, centre - half)
    high = 1.0 if right == n else min(1.0, centre + half)
    return Interval(share, low, high, n)


def ranking(higher: Sequence[float], lower: Sequence[float]) -> Interval:
    """How often a score of the first list is above one of the second (AUC); ties count half. Not empty at 0 or 1.

    Source: R. G. Newcombe, Statistics in Medicine 25 (2006), 559-573, method 5.
    """
    first, second = np.asarray(higher, dtype=np.float64), np.asarray(lower, dtype=np.float64)
    if not len(first) or not len(second):
        raise ValueError("a ranking needs scores on both sides")
    above = (first[:, None] > second).mean() + (first[:, None] == second).mean() / 2
    value, others = float(above), (len(first) + len(second)) / 2 - 1

    def z(area: float) -> float:
        spread = 1 + others * ((1 - area) / (2 - area) + area / (1 + area))
        variance = area * (1 - area) * spread / (len(first) * len(second))
        return abs(area - value) / math.sqrt(variance) if variance > 0 else math.inf * (area != value)

    low = _bisect(lambda area: z(area) <= Z_95, value, 0.0) if value > 0 else 0.0
    high = _bisect(lambda area: z(area) <= Z_95, value, 1.0) if value < 1 else 1.0
    return Interval(value, low, high, len(first) + len(second))


def paired_difference(first: Sequence[int], second: Sequence[int]) -> Interval:
    """Accuracy of `first` minus accuracy of `second` on the same prompts, both 0/1 vectors in the same order.

    The interval holds the differences that the score test does not reject.
    Source: T. Tango, Statistics in Medicine 17 (1998), 891-908.
    """
    _check_binary(first)
    _check_binary(second)
    if len(first) != len(second):
        raise ValueError("the two vectors must come from the same prompts")
    n = len(first)
    only_first = sum(a > b for a, b in zip(first, second, strict=True))
    only_second = sum(a < b for a, b in zip(first, second, strict=True))
    value = (only_first - only_second) / n

    def z(difference: float) -> float:
        return _tango_z(only_first, only_second, n, difference)

    low = _bisect(lambda d: z(d) <= Z_95, value, -1.0)
    high = _bisect(lambda d: z(d) >= -Z_95, value, 1.0)
    return Interval(value, low, high, n)


def unpaired_difference(first: Interval, second: Interval) -> Interval:
    """`first` minus `second` where only their intervals are known; wider than needed if the prompts were shared.

    Source: R. G. Newcombe, Statistics in Medicine 17 (1998), 873-890, method 10.
    """
    value = first.value - second.value
    below = math.hypot(first.value - first.low, second.high - second.value)
    above = math.hypot(first.high - first.value, second.value - second.low)
    return Interval(value, value - below, value + above, min(first.n, second.n))


def mean_interval(parts: Sequence[Interval]) -> Interval:
    """The unweighted mean of independent parts (domains with their own prompts); `n` is the total.

    Source: G. Y. Zou and A. Donner, Statistics in Medicine 27 (2008), 1693-1702 (MOVER).
    """
    count = len(parts)
    if count == 0:
        raise ValueError("a mean needs at least one part")
    value = sum(part.value for part in parts) / count
    below = math.sqrt(sum((part.value - part.low) ** 2 for part in parts)) / count
    above = math.sqrt(sum((part.high - part.value) ** 2 for part in parts)) / count
    return Interval(value, value - below, value + above, sum(part.n for part in parts))


@dataclass(frozen=True)
class Ingredients:
    """What the retention of one domain is made of: three 0/1 vectors over the same prompts."""

    base: Sequence[int]
    expert: Sequence[int]
    composed: Sequence[int]


def retention(domains: Mapping[str, Ingredients]) -> tuple[dict[str, Interval | None], Interval | None]:
    """(composed - base) / (expert - base) for each domain, and the mean over the domains that have one.

    A domain whose expert is not better than the base has no retention: None. The intervals are percentile
    bootstraps over prompts, domains drawn independently. Draws in which the expert gains nothing are left
    out, so an interval is only as good as the gain is large.
    """
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    draws: dict[str, NDArray[np.float64]] = {}
    per_domain: dict[str, Interval | None] = {}
    for name in sorted(domains):
        value, drawn = _retention_draws(domains[name], rng)
        if value is None:
            per_domain[name] = None
            continue
        draws[name] = drawn
        per_domain[name] = _percentiles(value, drawn, len(domains[name].base))
    found = [part for part in per_domain.values() if part is not None]
    if not found:
        return per_domain, None
    mean = sum(part.value for part in found) / len(found)
    return per_domain, _percentiles(mean, np.mean(list(draws.values()), axis=0), sum(part.n for part in found))


Draws = NDArray[np.float64]  # (1 + BOOTSTRAP_DRAWS,): what was measured, then what other prompts and runs would give


class Resampling:
    """Other prompts and other training runs, drawn once, so that whatever is computed from them is paired.

    A draw weighs the prompts of every domain, and the runs, independently of one another; the first "draw" is what
    was measured. Arithmetic on the draws of several means, such as `composed - base`, gives the draws of the result.
    Of R runs a draw takes R - 1, which makes the variance between runs right on average; with two or three of them it
    is a rough guess still, so show the runs themselves as well.
    Source: A. B. Owen, Annals of Applied Statistics 1 (2007), 386-411 (crossed effects);
    P. J. McCarthy and C. B. Snowden, Vital and Health Statistics 2-95 (1985) (R - 1).
    """

    def __init__(self, prompts: Mapping[str, int], runs: int) -> None:
        """`prompts`: how many of each domain."""
        rng = np.random.default_rng(BOOTSTRAP_SEED)
        self._runs = _weights(rng, runs, max(1, runs - 1))
        self._prompts = {name: _weights(rng, count, count) for name, count in sorted(prompts.items())}

    def mean(self, domain: str, answers: Sequence[Sequence[int]]) -> Draws:
        """The share of right answers; `answers` is a 0/1 vector for each run, over the domain's prompts."""
        right = np.asarray(answers, dtype=np.float64)
        return np.asarray(((self._prompts[domain] @ right.T) * self._runs).sum(1))


def drawn_interval(draws: Draws, n: int) -> Interval | None:
    """The measured value between the percentiles of the draws that have one (NaN: none); None where it has none."""
    value, others = float(draws[0]), draws[1:]
    return None if math.isnan(value) else _percentiles(value, others, n)


def drawn_ratio(part: Draws, whole: Draws) -> Draws:
    """`part / whole`, NaN where the whole is not above zero."""
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1.0), np.nan)


def _weights(rng: np.random.Generator, size: int, taken: int) -> NDArray[np.float64]:
    """(1 + draws, size), rows that add up to 1: all alike, then how often each was among `taken`."""
    drawn = rng.multinomial(taken, np.full(size, 1 / size), size=BOOTSTRAP_DRAWS) / taken
    return np.vstack([np.full(size, 1 / size), drawn])


def _retention_draws(parts: Ingredients, rng: np.random.Generator) -> tuple[float | None, NDArray[np.float64]]:
    """The ratio, and `BOOTSTRAP_DRAWS` ratios of resampled prompts (NaN where the expert gains nothing)."""
    for vector in (parts.base, parts.expert, parts.composed):
        _check_binary(vector)
    base, expert, composed = (np.asarray(v, dtype=np.int64) for v in (parts.base, parts.expert, parts.composed))
    gain, kept = expert - base, composed - base  # per prompt, in {-1, 0, 1}
    if gain.sum() <= 0:
        return None, np.empty(0)
    kinds = (gain + 1) * 3 + (kept + 1)  # the resampled sums depend only on how often each of 9 kinds is drawn
    counts = np.bincount(kinds, minlength=9)
    drawn = rng.multinomial(len(base), counts / len(base), size=BOOTSTRAP_DRAWS)  # (draws, 9)
    gains = drawn @ (np.arange(9) // 3 - 1)
    keeps = drawn @ (np.arange(9) % 3 - 1)
    ratios = np.where(gains > 0, keeps / np.maximum(gains, 1), np.nan)
    return float(kept.sum() / gain.sum()), ratios


def _percentiles(value: float, draws: NDArray[np.float64], n: int) -> Interval:
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return Interval(value, float(low), float(high), n)


def _tango_z(only_first: int, only_second: int, n: int, difference: float) -> float:
    """Tango's score statistic for a true difference of `difference`; falls as `difference` rises."""
    top = only_first - only_second - n * difference
    a = 2 * n
    b = -only_first - only_second + (2 * n - only_first + only_second) * difference
    c = -only_second * difference * (1 - difference)
    share = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = n * (2 * share + difference * (1 - difference))
    if variance <= 0:
        return 0.0 if abs(top) < 1e-12 else math.copysign(math.inf, top)
    return top / math.sqrt(variance)


def _bisect(holds: Callable[[float], bool], inside: float, outside: float) -> float:
    """The point between `inside`, where `holds` is true, and `outside`, up to which it stays true."""
    if holds(outside):
        return outside
    for _ in range(BISECTIONS):
        middle = (inside + outside) / 2
        if holds(middle):
            inside = middle
        else:
            outside = middle
    return inside


def _check_binary(vector: Sequence[int]) -> None:
    if len(vector) == 0 or any(item not in (0, 1) for item in vector):
        raise ValueError("expected a non-empty vector of zeros and ones")
