"""Scores, against the formulas of those who proposed them."""

from __future__ import annotations

import pytest
import torch

from fedcompose.model.estimators import hard
from fedcompose.model.scorers import COMPARE, LinearScorer, StaticScorer, VectorScorer


def test_a_linear_scores_in_float32_whatever_it_reads() -> None:
    scorer, hidden = LinearScorer((8,), 3, bias=True), torch.randn(2, 6, 8).bfloat16()
    scorer.biases[0].data = torch.tensor([0.0, 1.0, 2.0])

    scores = scorer(hidden, point=5)

    torch.testing.assert_close(scores, hidden.float() @ scorer.weights[0].T + torch.tensor([0.0, 1.0, 2.0]))


def test_one_linear_serves_all_points_or_each_has_its_own() -> None:
    shared, own, x = LinearScorer((8,), 3), LinearScorer((8, 8), 3), torch.randn(4, 8)

    assert torch.equal(shared(x, 0), shared(x, 1)) and not torch.equal(own(x, 0), own(x, 1))
    assert len(list(shared.parameters())) == 1 and len(list(own.parameters())) == 2


X = torch.tensor([[1.0, 2.0, 3.0, -1.0]])
V = torch.tensor([[0.5, -0.5, 0.0, 0.5], [-1.0, -2.0, -3.0, 1.0]])
BY_HAND = {
    "arrow": [[1.0, 15.0]],  # |0.5 − 1 − 0.5|, |−15|
    "centroid": [[-1 / (15 * 0.75) ** 0.5, -1.0]],
    # (x − 1.25) · (v − 0.125) over both deviations and √4
    "phatgoose": [[-1.625 / (2.1875 * 0.171875) ** 0.5 / 2, -2.0]],
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_fixed_vectors_are_compared_as_their_authors_do(kind: str) -> None:
    scorer = VectorScorer((4,), 2, COMPARE[kind])
    scorer.weights[0].data = V

    torch.testing.assert_close(scorer(X, 0), torch.tensor(BY_HAND[kind]), rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in scorer.parameters())


def test_an_expert_without_a_vector_is_never_chosen() -> None:
    scorer = VectorScorer((4, 4), 2, COMPARE["centroid"])
    scorer.weights[1].data = torch.stack([torch.zeros(4), -X[0]])

    assert hard(scorer(X, 1)).choice.tolist() == [1]


def test_static_weights_start_uniform_and_are_the_same_for_all() -> None:
    assert torch.equal(StaticScorer(4)(torch.randn(2, 3, 8), 7), torch.full((2, 3, 4), 0.25))
