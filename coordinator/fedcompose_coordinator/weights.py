"""What an expert's weights look like, from small matrices: the product B·A itself is never formed.

Of each module, with B = Q·R and Aᵀ = P·S, the change scale·B·A has the singular values of the small scale·R·Sᵀ. How
loud it is, how much of it goes in one direction, and how alike two experts are, all follow without their full size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcompose.adapter import Adapter

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Statistics:
    """Of one expert: the root mean square of an entry of its change; its loudest module, as a multiple of the median
    one; the share of a median module's energy that lies in its strongest direction."""

    rms: float
    loudest: float
    narrow: float


def statistics(adapter: Adapter) -> Statistics:
    """The numbers of one expert."""
    spectra = [_spectrum(adapter, module) for module in adapter.modules()]
    rms = np.array([np.sqrt((values**2).sum() / size) for values, size in spectra])
    tops = [values[0] ** 2 / (values**2).sum() for values, _ in spectra if values.any()]
    median = float(np.median(rms))
    return Statistics(
        rms=float(np.sqrt((rms**2).mean())),
        loudest=float(rms.max() / median) if median else float("inf"),
        narrow=float(np.median(tops)) if tops else 0.0,
    )


def similarity(one: Adapter, other: Adapter) -> float:
    """|cosine| between the changes of two experts, over all modules together; 0 where they share none."""
    shared = [module for module in one.modules() if module in other.modules()]
    product = sum(_product(one, other, module) for module in shared)
    lengths = [np.sqrt(sum(_product(each, each, module) for module in each.modules())) for each in (one, other)]
    return abs(float(product)) / float(lengths[0] * lengths[1]) if all(lengths) else 0.0


def _spectrum(adapter: Adapter, module: str) -> tuple[Matrix, int]:
    """The singular values of the module's change, largest first, and how many entries the change has."""
    a, b = _factors(adapter, module)
    left, right = (np.asarray(np.linalg.qr(each, mode="r")) for each in (b, a.T))
    return np.linalg.svd(left @ right.T, compute_uv=False), a.shape[1] * b.shape[0]


def _product(one: Adapter, other: Adapter, module: str) -> float:
    """The sum over all entries of one change times the other: tr((B·A)ᵀ·B'·A') by products of rank size."""
    (a, b), (c, d) = _factors(one, module), _factors(other, module)
    if a.shape[1] != c.shape[1] or b.shape[0] != d.shape[0]:
        return 0.0
    return float(((b.T @ d) * (a @ c.T)).sum())


def _factors(adapter: Adapter, module: str) -> Sequence[Matrix]:
    """A, and B with the scale in it."""
    a, b = (stored.float32().astype(np.float64) for stored in adapter.pair(module))
    return a, adapter.config.scale(module) * b
