"""What becomes of scores, and which gradient they get: against formulas written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedcompose.model.estimators import Gumbel, Sampled, Soft, TopK, constant_weight, hard, hard_selected, plackett_luce

LEARNED = [hard, hard_selected, Gumbel()]


def _scores(rows: int = 7, experts: int = 4, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, experts, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.mark.parametrize("estimate", LEARNED)
def test_the_chosen_expert_has_weight_exactly_one_also_while_learning(estimate: object) -> None:
    scores = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()

    decision = estimate(scores)  # type: ignore[operator]

    assert decision.hard and torch.equal(decision.weights, functional.one_hot(decision.choice, 5).float())


def test_ties_go_to_the_lower_index() -> None:
    scores = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0], [3.0, 3.0, 3.0]])

    assert hard(scores).choice.tolist() == [0, 1, 0]
    assert hard(scores.requires_grad_()).choice.tolist() == [0, 1, 0]


def test_dense_straight_through_asks_all_experts() -> None:
    """dL/dscore_i = Σ_e p_e (δ_ei − p_i) h_e."""
    scores, upstream = _scores(), _scores(seed=2).detach()

    (hard(scores).weights * upstream).sum().backward()

    p = scores.detach().softmax(-1)
    by_hand = torch.einsum("te,tei,te->ti", p, torch.eye(4).double() - p[:, None, :], upstream)
    torch.testing.assert_close(scores.grad, by_hand, rtol=0, atol=1e-15)


def test_selected_straight_through_asks_the_chosen_expert_only() -> None:
    """dL/dscore_i = p_j (δ_ij − p_i) h_j."""
    scores, upstream = _scores(), _scores(seed=2).detach()

    decision = hard_selected(scores)
    (decision.weights * upstream).sum().backward()

    p, j = scores.detach().softmax(-1), decision.choice[:, None]
    by_hand = p.gather(1, j) * (functional.one_hot(j[:, 0], 4) - p) * upstream.gather(1, j)
    torch.testing.assert_close(scores.grad, by_hand, rtol=0, atol=1e-15)
    assert decision.selected


def test_in_use_nothing_is_random_and_no_probabilities_are_made() -> None:
    scores = _scores().detach()
    for estimate in (hard, hard_selected, Gumbel(), Soft(), TopK(2), Sampled(2, 0.5)):
        decision, again = estimate(scores), estimate(scores)
        assert decision.probabilities is None and decision.log_prob is None
        assert torch.equal(decision.weights, again.weights) and torch.equal(decision.choice, scores.argmax(-1))


def test_gumbel_draws_experts_as_often_as_the_softmax_says() -> None:
    scores = torch.tensor([1.0, 0.0, -1.0]).expand(20_000, 3).clone().requires_grad_()
    torch.manual_seed(0)
    decision = Gumbel()(scores)

    assert (decision.weights.mean(0) - scores[0].softmax(-1)).abs().max() < 0.015
    torch.manual_seed(0)
    assert torch.equal(Gumbel(tau=0.1)(scores).choice, decision.choice)


def test_a_lower_temperature_sharpens_the_gumbel_gradient_only() -> None:
    scores = _scores()
    gradients = []
    for tau in (1.0, 0.5):
        torch.manual_seed(3)
        noisy = scores.detach() - torch.empty_like(scores.detach()).exponential_().log()
        p = (noisy / tau).softmax(-1)
        by_hand = (
            torch.einsum("te,tei,te->ti", p, torch.eye(4).double() - p[:, None, :], torch.ones(7, 4).cumsum(1).double())
            / tau
        )
        torch.manual_seed(3)
        scores.grad = None
        (Gumbel(tau)(scores).weights * torch.ones(7, 4).cumsum(1)).sum().backward()
        torch.testing.assert_close(scores.grad, by_hand, rtol=0, atol=1e-14)
        gradients.append(scores.grad)
    assert not torch.allclose(*gradients)


def test_top_k_keeps_the_largest_probabilities() -> None:
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)

    plain, normalised = TopK(2)(p.log()), TopK(2, normalise=True)(p.log())

    torch.testing.assert_close(plain.weights, torch.tensor([[0.5, 0.3, 0, 0]], dtype=torch.float64))
    torch.testing.assert_close(normalised.weights, torch.tensor([[0.625, 0.375, 0, 0]], dtype=torch.float64))
    assert plain.choice.item() == 0 and not plain.hard


def test_soft_mixes_all_while_learning_and_the_best_in_use() -> None:
    scores, mix = _scores(), Soft(k=2)

    assert torch.equal(mix(scores).weights, scores.softmax(-1))
    assert (mix(scores.detach()).weights > 0).sum(-1).unique().tolist() == [2]


def test_sampling_draws_k_without_replacement_at_a_constant_weight() -> None:
    decision = Sampled(2, 0.7)(_scores(rows=500))

    assert ((decision.weights == 0.7).sum(-1) == 2).all() and ((decision.weights == 0).sum(-1) == 2).all()
    assert not decision.weights.requires_grad and decision.log_prob is not None and decision.log_prob.requires_grad


def test_draws_are_as_likely_as_their_log_probability_says() -> None:
    """All six ordered pairs of three experts, against 20,000 draws; their probabilities by hand as well."""
    q = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    torch.manual_seed(0)
    decision = Sampled(2, 1.0)(q.log().expand(20_000, 3).clone().requires_grad_())
    assert decision.log_prob is not None
    found = decision.log_prob.detach()

    total = 0.0
    for first in range(3):
        for second in {0, 1, 2} - {first}:
            by_hand = float(q[first] * q[second] / (1 - q[first]))
            exact = plackett_luce(q.log(), torch.tensor([first, second])).exp().item()
            drawn = (found - math.log(by_hand)).abs() < 1e-9
            assert exact == pytest.approx(by_hand)
            assert drawn.double().mean().item() == pytest.approx(by_hand, abs=4 * (by_hand / 20_000) ** 0.5)
            total += by_hand
    assert total == pytest.approx(1)


def test_constant_weights() -> None:
    assert [constant_weight(scale, 4) for scale in ("unit", "1/k", "1/sqrt(k)")] == [1, 0.25, 0.5]
