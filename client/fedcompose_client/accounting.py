"""What the steps of a private run cost: ε for a δ, by Opacus' PRV accountant, and the noise that a wanted ε needs.

Every step draws each unit with a fixed probability (Poisson) and adds Gaussian noise once; neighbouring data differ in
one unit more or less. Nothing else in the project computes an ε.
Source: S. Gopi, Y. T. Lee, L. Wutschitz, Numerical composition of differential privacy, NeurIPS 2021.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedcompose.errors import ConfigError, MissingError

LEAST_NOISE = 0.3  # below it ε is in the hundreds: no guarantee worth the name
MOST_NOISE = 200.0
PRECISION = 1.005  # the noise found is at most half a per cent above what is needed


@dataclass(frozen=True)
class Steps:
    """So many steps that each drew every unit with probability `rate`."""

    rate: float
    count: int


def epsilon_of(noise: float, phases: Sequence[Steps], delta: float) -> float:
    """The ε of all phases together; `noise` is in units of the largest change that one unit can make.

    Raises: MissingError: `PACKAGE_MISSING`.
    """
    return _epsilon("prv", noise, phases, delta)


def noise_for(epsilon: float, phases: Sequence[Steps], delta: float) -> float:
    """The smallest noise, to half a per cent, that costs at most `epsilon`.

    Rényi's accountant, which is quick and errs on the safe side, says where to look: asked about noise that is far too
    small, the better one would take all the memory there is.

    Raises: ConfigError: `DP_EPSILON` where no sensible noise does.
    """
    enough = LEAST_NOISE
    while _epsilon("rdp", enough, phases, delta) > epsilon:
        enough *= 1.5
        if enough > MOST_NOISE:
            raise ConfigError(
                "DP_EPSILON",
                f"no noise that leaves anything to learn reaches an epsilon of {epsilon:g}",
                fix="ask for a larger epsilon, or train with fewer steps or on more rows",
            )
    low, high = max(LEAST_NOISE, enough / 2), enough
    while high > low * PRECISION:
        middle = math.sqrt(low * high)
        if epsilon_of(middle, phases, delta) > epsilon:
            low = middle
        else:
            high = middle
    return high


def _epsilon(accountant: str, noise: float, phases: Sequence[Steps], delta: float) -> float:
    try:
        from opacus.accountants import create_accountant
    except ImportError as error:
        raise MissingError(
            "PACKAGE_MISSING",
            "differential privacy needs opacus for its accountant",
            fix="pip install 'fedcompose-client[dp]'",
        ) from error
    chosen = create_accountant(accountant)
    chosen.history = [(noise, phase.rate, phase.count) for phase in phases if phase.count]
    with np.errstate(divide="ignore"), warnings.catch_warnings(action="ignore"):  # about orders at the edge, and rate 1
        return float(chosen.get_epsilon(delta))
