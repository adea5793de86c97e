"""How a decision travels from whoever makes it to those who follow, and into a record."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedcompose.model.controls import FixedRouter, StaticRouter
from fedcompose.model.estimators import TopK, hard
from fedcompose.model.router import Point, RoutedBlock, RoutingContext, RoutingDecision, RoutingRecord
from tests.tiny_experts import make_tiny_router


class _Stack(nn.Module):
    """Two routed blocks that do nothing, one after the other."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.context = RoutingContext(router, [Point("a", 8), Point("b", 8)])
        self.blocks = nn.ModuleList(RoutedBlock(nn.Identity(), point, self.context) for point in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def test_recording_keeps_one_entry_per_forward_call_and_nothing_outside() -> None:
    stack = _Stack(make_tiny_router(3, hidden=8))
    stack(torch.randn(1, 4, 8))

    with torch.no_grad(), stack.context.recording() as record:
        stack(torch.randn(2, 5, 8))
        stack(torch.randn(2, 1, 8))
    stack(torch.randn(1, 4, 8))

    assert [tuple(each.shape) for each in record.choices] == [(2, 2, 5), (2, 2, 1)]
    assert record.probabilities == []


def test_recording_while_training_keeps_probabilities_with_their_gradient() -> None:
    stack = _Stack(make_tiny_router(3, hidden=8))

    with stack.context.recording() as record:
        stack(torch.randn(2, 5, 8))

    assert tuple(record.probabilities[0].shape) == (2, 2, 5, 3) and record.probabilities[0].requires_grad


def test_points_that_rest_in_a_call_are_missing_from_it_only() -> None:
    """As the keys and values of an encoder are computed in the first call of generation alone."""
    record, decision = RoutingRecord(), hard(torch.zeros(1, 1, 2))
    for point in (0, 1, 2, 1, 1, 2):
        record.add(point, decision)

    assert [list(call) for call in record.calls] == [[0, 1, 2], [1], [1, 2]]


def test_another_router_decides_only_inside_using() -> None:
    stack = _Stack(FixedRouter(0, 3))

    with stack.context.recording() as record:
        with stack.context.using(FixedRouter(2, 3)):
            stack(torch.randn(1, 1, 8))
        stack(torch.randn(1, 1, 8))

    assert [each.flatten().tolist() for each in record.choices] == [[2, 2], [0, 0]]


def test_a_block_finds_its_input_by_position_or_by_name() -> None:
    class Block(nn.Module):
        def forward(self, hidden_states: Tensor, other: int = 0) -> Tensor:
            return hidden_states + other

    block = RoutedBlock(Block(), 0, RoutingContext(FixedRouter(0, 3)))
    hidden = torch.randn(1, 2, 8)
    assert torch.equal(block(hidden), block(other=0, hidden_states=hidden))


def test_a_decision_does_not_outlive_its_block() -> None:
    stack = _Stack(make_tiny_router(3, hidden=8))
    stack(torch.randn(1, 4, 8))

    with pytest.raises(RuntimeError, match="outside its routed block"):
        _ = stack.context.decision


def test_a_block_inside_a_block_gives_the_decision_back() -> None:
    context = RoutingContext(FixedRouter(0, 3))
    outer, inner = (hard(torch.zeros(1, 2)) for _ in range(2))
    with context.decided(outer):
        with context.decided(inner):
            assert context.decision is inner
        assert context.decision is outer


@pytest.mark.parametrize(
    "decision",
    [
        hard(torch.randn(3, 20, 4, generator=torch.Generator().manual_seed(0))),
        TopK(2)(torch.randn(3, 20, 4, generator=torch.Generator().manual_seed(0))),
        FixedRouter(2, 4)(torch.zeros(3, 20, 8), 0),
        StaticRouter([0.0, -1.5, 0.0, 0.5])(torch.zeros(3, 20, 8), 0),
    ],
    ids=["hard", "top_k", "fixed", "static"],
)
def test_segments_are_the_weights_in_another_order(decision: RoutingDecision) -> None:
    segments, weights = decision.segments, torch.zeros(60, 4)
    for expert, start, stop in segments.parts:
        rows = torch.arange(start, stop) if segments.tokens is None else segments.tokens[start:stop]
        weights[rows, expert] = 1.0 if segments.weights is None else segments.weights[start:stop, 0]

    assert torch.equal(weights, decision.weights.flatten(0, 1))
    assert decision.segments is segments
