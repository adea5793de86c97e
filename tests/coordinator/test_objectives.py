from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fedcompose_coordinator.objectives import (
    balance_loss,
    consistency_loss,
    entropy_loss,
    guidance_loss,
    preserve_loss,
    rloo_loss,
)

# Two points, three tokens, two experts.
P = torch.tensor([[[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], [[0.5, 0.5], [0.7, 0.3], [0.3, 0.7]]])


def _nats(*p: float) -> float:
    return -sum(each * math.log(each) for each in p)


def test_balance_by_hand() -> None:
    """Point 0: p̄ = (1.7/3, 1.3/3), f = (2/3, 1/3). Point 1: p̄ = (.5, .5), the tie goes to the first, f as above."""
    first = 2 * (1.7 / 3 * 2 / 3 + 1.3 / 3 * 1 / 3)
    assert float(balance_loss(P, top_k=1)) == pytest.approx((first + 1.0) / 2)
    assert float(balance_loss(P, top_k=2)) == pytest.approx(1.0)  # both are always chosen
    assert float(balance_loss(torch.tensor([[[1.0, 0, 0, 0]] * 5]), top_k=1)) == pytest.approx(4.0)  # collapse: K


def test_balance_takes_probability_from_the_expert_that_is_chosen_most() -> None:
    logits = P.log().requires_grad_()
    balance_loss(logits.softmax(-1), top_k=1).backward()
    assert logits.grad is not None and (logits.grad[0, :, 0] > 0).all() and (logits.grad[0, :, 1] < 0).all()


def test_entropy_by_hand_in_its_three_forms() -> None:
    rows = [_nats(*row) for row in P.reshape(-1, 2).tolist()]
    marginal = (_nats(1.7 / 3, 1.3 / 3) + _nats(0.5, 0.5)) / 2
    assert float(entropy_loss(P, "sharpen")) == pytest.approx(sum(rows) / 6)
    assert float(entropy_loss(P, "explore")) == pytest.approx(-sum(rows) / 6)
    assert float(entropy_loss(P, "inform")) == pytest.approx(sum(rows) / 6 - marginal)
    with pytest.raises(ValueError, match="no such form"):
        entropy_loss(P, "flatten")  # type: ignore[arg-type]


def test_inform_prefers_clear_and_balanced_to_clear_and_collapsed() -> None:
    balanced = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    collapsed = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    assert float(entropy_loss(balanced, "inform")) == pytest.approx(-math.log(2))
    assert float(entropy_loss(collapsed, "inform")) == 0
    assert entropy_loss(balanced, "sharpen") == entropy_loss(collapsed, "sharpen") == 0


def test_a_probability_that_became_0_does_no_harm() -> None:
    logits = torch.tensor([[[200.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    p = logits.softmax(-1)
    (entropy_loss(p, "sharpen") + guidance_loss(p, torch.tensor([[0, 1], [0, 1]]))).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_consistency_by_hand_for_tokens_and_for_sequences() -> None:
    tokens = [1 - 0.7**2 - 0.3**2, 1 - 0.65**2 - 0.35**2, 1 - 0.25**2 - 0.75**2]
    assert float(consistency_loss(P)) == pytest.approx(sum(tokens) / 3)
    first, second = (0.7 + 0.65) / 2, 0.25  # tokens 0 and 1 are one sequence, token 2 is another
    by_hand = (1 - first**2 - (1 - first) ** 2 + 1 - second**2 - (1 - second) ** 2) / 2
    assert float(consistency_loss(P, torch.tensor([7, 7, 3]))) == pytest.approx(by_hand)
    assert float(consistency_loss(torch.tensor([[[0.0, 1.0]]] * 4))) == 0


def test_guidance_by_hand() -> None:
    """Token 0 belongs to expert 0, token 1 to both, token 2 to nobody."""
    own = torch.tensor([[1, 0], [1, 1], [0, 0]])
    assert float(guidance_loss(P, own)) == pytest.approx(-(math.log(0.9) + math.log(0.5)) / 4, rel=1e-5)
    assert float(guidance_loss(P, torch.zeros(3, 2))) == 0


def test_preserve_by_hand() -> None:
    trained, shipped = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])], [torch.zeros(2), torch.tensor([[5.0]])]
    assert float(preserve_loss(trained, shipped)) == 1 + 4 + 4
    assert float(preserve_loss(shipped, shipped)) == 0


# --- RLOO against exact enumeration ---------------------------------------------------------------

TOY = torch.tensor([[0.5, -0.3, 0.1], [-0.2, 0.4, 0.0]], dtype=torch.float64)  # two points, three experts, pick two
DRAWS = 20_000


def _selections() -> list[tuple[tuple[int, int], tuple[int, int]]]:
    orders = list(itertools.permutations(range(3), 2))
    return list(itertools.product(orders, orders))


def _log_q(logits: Tensor, selection: tuple[tuple[int, int], tuple[int, int]]) -> Tensor:
    """Plackett–Luce by its definition: Π q_i / (1 − what was taken before)."""
    total = logits.new_zeros(())
    for q, (first, second) in zip(logits.softmax(-1), selection, strict=True):
        total = total + q[first].log() + (q[second] / (1 - q[first])).log()
    return total


def _loss(selection: tuple[tuple[int, int], tuple[int, int]]) -> float:
    """Anything that depends on the two sets together."""
    (a, b), (c, d) = selection
    return (a + b) * 1.5 - (c * d) + (2.0 if {a, b} == {c, d} else 0.0)


def test_plackett_luce_is_a_distribution_over_ordered_selections() -> None:
    assert float(sum(_log_q(TOY, each).exp() for each in _selections())) == pytest.approx(1.0)


def _z_scores(selections_per_estimate: int, baseline: bool = True) -> Tensor:
    """How many standard errors the mean estimate is away from the exact gradient, per logit."""
    logits = TOY.clone().requires_grad_()
    log_q = torch.stack([_log_q(logits, each) for each in _selections()])
    losses = torch.tensor([_loss(each) for each in _selections()], dtype=torch.float64)
    (exact,) = torch.autograd.grad((log_q.exp() * losses).sum(), logits, retain_graph=True)
    gradients = torch.stack([torch.autograd.grad(each, logits, retain_graph=True)[0] for each in log_q])
    generator = torch.Generator().manual_seed(0)
    shape = (DRAWS, selections_per_estimate)
    drawn = torch.multinomial(
        log_q.detach().exp(), DRAWS * selections_per_estimate, replacement=True, generator=generator
    )
    picked = losses[drawn].view(shape)
    leaves = torch.zeros(shape[::-1], dtype=torch.float64, requires_grad=True)
    credited = picked.T if baseline else picked.T - picked.T.max(0).values  # a baseline that selections do touch
    if baseline:
        rloo_loss(credited, leaves).backward()
        credit = leaves.grad
    else:
        credit = credited / selections_per_estimate
    assert credit is not None
    estimates = torch.einsum("md,dmij->dij", credit, gradients[drawn].view(*shape, *TOY.shape))
    return (estimates.mean(0) - exact) / (estimates.std(0) / math.sqrt(DRAWS))


@pytest.mark.parametrize("selections", [2, 4])
def test_rloo_is_unbiased(selections: int) -> None:
    """The largest of six z scores is below 4; an unbiased estimator misses that once in 2,600, and the seed is set."""
    assert _z_scores(selections).abs().max() < 4


def test_the_z_test_finds_a_biased_estimator() -> None:
    assert _z_scores(4, baseline=False).abs().max() > 10


def test_leave_one_out_needs_another_one() -> None:
    with pytest.raises(ValueError, match="two selections"):
        rloo_loss(torch.zeros(1, 3), torch.zeros(1, 3))
