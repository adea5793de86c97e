from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from fedcompose.adapter import Adapter, AdapterConfig, tensor_name
from fedcompose.tensors import StoredTensor
from fedcompose_coordinator.weights import similarity, statistics

Pair = tuple[NDArray[np.float64], NDArray[np.float64]]


def adapter(pairs: Mapping[str, Pair], alpha: float = 8) -> Adapter:
    """An A and a B for each module."""
    tensors = {
        tensor_name(module, side): StoredTensor("F32", each.shape, memoryview(each.astype("<f4").tobytes()))
        for module, pair in pairs.items()
        for side, each in zip("AB", pair, strict=True)
    }
    rank = len(next(iter(pairs.values()))[0])
    return Adapter(AdapterConfig(r=rank, lora_alpha=alpha, target_modules=tuple(pairs)), tensors)


def draw(seed: int, rank: int = 4) -> Pair:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rank, 24)), rng.normal(size=(40, rank))


def test_the_numbers_are_those_of_the_whole_product() -> None:
    pairs = {"m.up": draw(0), "m.down": draw(1)}
    whole = [2 * b @ a for a, b in pairs.values()]  # alpha 8 over rank 4
    found = statistics(adapter(pairs))

    rms = [np.sqrt((each**2).mean()) for each in whole]
    spectra = [np.linalg.svd(each, compute_uv=False) ** 2 for each in whole]
    assert found.rms == pytest.approx(np.sqrt(np.mean(np.square(rms))), rel=1e-5)
    assert found.loudest == pytest.approx(max(rms) / np.median(rms), rel=1e-5)
    assert found.narrow == pytest.approx(np.median([each[0] / each.sum() for each in spectra]), rel=1e-5)


def test_similarity_is_the_cosine_of_the_whole_products() -> None:
    one, other = {"m.up": draw(0), "m.down": draw(1)}, {"m.up": draw(2), "m.down": draw(1)}
    flat = [np.concatenate([(b @ a).ravel() for a, b in each.values()]) for each in (one, other)]
    expected = abs(flat[0] @ flat[1]) / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    assert similarity(adapter(one), adapter(other)) == pytest.approx(expected, rel=1e-5)


def test_the_same_change_in_other_factors_and_of_another_size_is_as_alike_as_can_be() -> None:
    a, b = draw(3)
    mix = np.random.default_rng(4).normal(size=(4, 4))
    assert similarity(adapter({"m.up": (a, b)}), adapter({"m.up": (mix @ a, -3 * b @ np.linalg.inv(mix))})) == (
        pytest.approx(1, abs=1e-5)
    )
    assert similarity(adapter({"m.up": (a, b)}), adapter({"m.up": draw(5)})) < 0.3
    assert similarity(adapter({"m.up": (a, b)}), adapter({"m.down": (a, b)})) == 0
    assert similarity(adapter({"m.up": (a, 0 * b)}), adapter({"m.up": (a, b)})) == 0
