from __future__ import annotations

import pytest
import torch
from torch import nn

from fedcompose.model.router import (
    NO_EXPERT,
    FixedRouter,
    RandomRouter,
    RoutedBlock,
    Router,
    RoutingContext,
    UniformRouter,
    hard_top1,
)


def test_the_chosen_expert_has_weight_exactly_one_also_while_training() -> None:
    logits = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()

    decision = hard_top1(logits)

    assert torch.equal(decision.weights, nn.functional.one_hot(logits.argmax(-1), 5).float())


def test_ties_go_to_the_lower_index() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0], [3.0, 3.0, 3.0]])

    assert hard_top1(logits).choice.tolist() == [0, 1, 0]
    assert hard_top1(logits.requires_grad_()).choice.tolist() == [0, 1, 0]


def test_the_straight_through_gradient_is_the_textbook_one() -> None:
    logits = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    upstream = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    (hard_top1(logits).weights * upstream).sum().backward()

    p = logits.detach().softmax(-1)
    by_hand = torch.einsum("te,tei,te->ti", p, torch.eye(4).double() - p[:, None, :], upstream)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, by_hand, rtol=0, atol=1e-15)


def test_inference_needs_no_probabilities_and_chooses_the_same() -> None:
    router = Router(hidden=8, experts=3, seed=4)
    hidden = torch.randn(2, 6, 8)
    trained = router(hidden)

    with torch.no_grad():
        decision = router(hidden)

    assert decision.probabilities is None and trained.probabilities is not None
    assert torch.equal(decision.choice, trained.choice) and torch.equal(decision.weights, trained.weights)


def test_the_router_scores_in_float32_whatever_the_block_reads() -> None:
    router = Router(hidden=8, experts=3)
    hidden = torch.randn(2, 6, 8).bfloat16()

    assert router(hidden).weights.dtype == torch.float32
    assert torch.equal(router(hidden).choice, (hidden.float() @ router.weight.T).argmax(-1))


def test_a_seed_repeats_a_router_and_another_seed_does_not() -> None:
    assert torch.equal(Router(8, 3, seed=1).weight, Router(8, 3, seed=1).weight)
    assert not torch.equal(Router(8, 3, seed=1).weight, Router(8, 3, seed=2).weight)


def test_a_random_router_is_uniform_and_repeats_with_its_seed() -> None:
    hidden = torch.zeros(1, 6000, 8)
    first, again, other = (RandomRouter(3, seed)(hidden) for seed in (0, 0, 1))

    assert torch.equal(first.choice, again.choice) and not torch.equal(first.choice, other.choice)
    assert (first.weights.mean((0, 1)) - 1 / 3).abs().max() < 0.03


def test_forced_and_uniform_routers_do_as_they_say() -> None:
    hidden = torch.randn(2, 3, 8)

    assert FixedRouter(1, 3)(hidden).weights.unique(dim=1).tolist() == [[[0, 1, 0]], [[0, 1, 0]]]
    assert torch.equal(UniformRouter(4)(hidden).weights, torch.full((2, 3, 4), 0.25))
    assert UniformRouter(4)(hidden).choice.unique().tolist() == [NO_EXPERT]


class _Stack(nn.Module):
    """Two routed blocks that do nothing, one after the other."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.context = RoutingContext(router)
        self.context.layers = 2
        self.blocks = nn.ModuleList(RoutedBlock(nn.Identity(), layer, self.context) for layer in range(2))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def test_recording_keeps_one_tensor_per_forward_call_and_nothing_outside() -> None:
    stack = _Stack(Router(8, 3))
    stack(torch.randn(1, 4, 8))

    with torch.no_grad(), stack.context.recording() as record:
        stack(torch.randn(2, 5, 8))
        stack(torch.randn(2, 1, 8))
    stack(torch.randn(1, 4, 8))

    assert [tuple(each.shape) for each in record.choices] == [(2, 2, 5), (2, 2, 1)]
    assert record.probabilities == []


def test_recording_while_training_keeps_probabilities_too() -> None:
    stack = _Stack(Router(8, 3))

    with stack.context.recording() as record:
        stack(torch.randn(2, 5, 8))

    assert tuple(record.probabilities[0].shape) == (2, 2, 5, 3) and not record.probabilities[0].requires_grad


def test_another_router_decides_only_inside_using() -> None:
    stack = _Stack(FixedRouter(0, 3))

    with stack.context.recording() as record:
        with stack.context.using(FixedRouter(2, 3)):
            stack(torch.randn(1, 1, 8))
        stack(torch.randn(1, 1, 8))

    assert [each.flatten().tolist() for each in record.choices] == [[2, 2], [0, 0]]


def test_a_decision_does_not_outlive_its_block() -> None:
    stack = _Stack(Router(8, 3))
    stack(torch.randn(1, 4, 8))

    with pytest.raises(RuntimeError, match="outside its routed block"):
        _ = stack.context.decision
