"""Draws follow the probabilities, repeat with their seed, and stay within top_p."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from fedcompose.serve.sampling import Sampling, choose

LOGITS = torch.tensor([0.0, 2.0, 1.0, -torch.inf, 1.5])


def draws(sampling: Sampling, count: int = 4000, choice: int = 0) -> list[int]:
    generator = sampling.generator(choice)
    return [choose(LOGITS, sampling, generator).id for _ in range(count)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_probabilities(temperature: float) -> None:
    counts = Counter(draws(Sampling(temperature, seed=1)))
    for token, probability in enumerate((LOGITS / temperature).softmax(-1).tolist()):
        assert counts[token] / 4000 == pytest.approx(probability, abs=0.03)
    assert counts[3] == 0


def test_top_p_keeps_the_fewest_likely_tokens_that_reach_it() -> None:
    probabilities = LOGITS.softmax(-1)
    two = float(probabilities[1] + probabilities[4])
    assert set(draws(Sampling(1.0, two - 0.01, seed=1), 500)) == {1, 4}
    assert set(draws(Sampling(1.0, two + 0.01, seed=1), 500)) == {1, 2, 4}
    assert set(draws(Sampling(1.0, 1e-6, seed=1), 100)) == {1}


def test_a_seed_repeats_and_each_choice_has_its_own_numbers() -> None:
    first, again, second = (draws(Sampling(1.0, seed=4), 50, choice) for choice in (0, 0, 1))
    assert first == again != second
    assert draws(Sampling(1.0), 50) != draws(Sampling(1.0), 50)
    assert draws(Sampling(1.0, seed=-(2**63)), 50) != draws(Sampling(1.0, seed=2**63 - 1), 50)


def test_greedy_takes_the_first_of_equals_and_tells_what_the_model_found_likely() -> None:
    sampling = Sampling(logprobs=2)
    chosen = choose(torch.tensor([1.0, 3.0, 3.0]), sampling, sampling.generator())
    expected = torch.tensor([1.0, 3.0, 3.0]).log_softmax(-1)
    assert chosen.id == 1
    assert chosen.logprob == pytest.approx(float(expected[1]))
    assert [logprob for _, logprob in chosen.top] == pytest.approx([float(expected[1])] * 2)
