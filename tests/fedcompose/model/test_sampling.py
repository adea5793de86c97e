"""Sampling draws from the model's own distribution at the temperature asked for, and from nothing else."""

from __future__ import annotations

import pytest
import torch

from fedcompose.model.sampling import _choose

ROWS = 20_000
LOGITS = torch.tensor([1.0, 0.0, -1.0, -torch.inf, 2.0, -torch.inf])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_the_model_says(temperature: float) -> None:
    drawn = _choose(LOGITS.repeat(ROWS, 1), temperature, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=len(LOGITS))
    possible = LOGITS.isfinite()
    assert counts[~possible].sum() == 0
    chance = torch.softmax(LOGITS / temperature, -1)
    deviations = (counts - ROWS * chance) / (ROWS * chance * (1 - chance)).sqrt()
    assert deviations[possible].abs().max() < 4  # standard deviations


def test_temperature_zero_is_the_likeliest_token() -> None:
    assert _choose(LOGITS.repeat(3, 1), 0, torch.Generator()).tolist() == [4, 4, 4]


def test_half_precision_draws_no_impossible_token() -> None:
    logits = torch.full((2000, 1000), -60.0, dtype=torch.bfloat16)
    logits[:, :2] = 0.0
    drawn = _choose(logits, 1.0, torch.Generator().manual_seed(1))
    assert set(drawn.tolist()) == {0, 1}
