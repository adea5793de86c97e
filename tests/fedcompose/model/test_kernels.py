"""Every form of the routed computation against the plain one, and its gradients against autograd through that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from fedcompose.model.controls import NoExpertRouter, UniformRouter
from fedcompose.model.estimators import Estimator, TopK, hard, hard_selected
from fedcompose.model.experts import PackedExperts, Update
from fedcompose.model.kernels import (
    Grouped,
    Loop,
    RoutedLinear,
    SortedMLP,
    plain,
    routed_linear,
    routed_mlp,
    sorted_mlp,
)
from fedcompose.model.router import RoutingContext, RoutingDecision

HIDDEN, WIDE, EXPERTS = 16, 24, 4
EQUAL, MIXED = (8, 8, 8, 8), (3, 8, None, 5)
Ranks = Sequence[int | None]
Sorter = Callable[[RoutingDecision], Loop | Grouped]


def _nobody(scores: Tensor) -> RoutingDecision:
    return NoExpertRouter(EXPERTS)(scores, 0)


def _all_to_one(scores: Tensor) -> RoutingDecision:
    return hard(scores + torch.tensor([0.0, 99, 0, 0]))


def _updates(ranks: Ranks, into: int, out: int, seed: int = 0) -> list[Update | None]:
    generator = torch.Generator().manual_seed(seed)

    def one(rank: int) -> Update:
        a, b = (0.3 * torch.randn(shape, generator=generator) for shape in ((rank, into), (out, rank)))
        return Update(a, b, 1.5)

    return [None if rank is None else one(rank) for rank in ranks]


def _mlp(ranks: Ranks, act: str = "silu", keep: Sequence[int] = range(EXPERTS)) -> Any:
    """A gated MLP of routed linears, with some of the experts."""
    torch.manual_seed(0)
    context, mlp = RoutingContext(UniformRouter(EXPERTS)), nn.Module()
    shapes = {"gate_proj": (HIDDEN, WIDE), "up_proj": (HIDDEN, WIDE), "down_proj": (WIDE, HIDDEN)}
    for seed, (name, (into, out)) in enumerate(shapes.items()):
        linear = nn.Linear(into, out, bias=name == "up_proj").requires_grad_(False)
        updates = _updates(ranks, into, out, seed)
        setattr(mlp, name, RoutedLinear(linear, [updates[index] for index in keep], context))
    mlp.act_fn = ACT2FN[act]
    return mlp


def _plainly(mlp: Any, x: Tensor, weights: Tensor) -> Tensor:
    """The MLP with the plain form in every linear."""

    def project(routed: RoutedLinear, x: Tensor) -> Tensor:
        y: Tensor = routed.linear(x) + plain(routed.experts, x, weights)
        return y

    return project(mlp.down_proj, mlp.act_fn(project(mlp.gate_proj, x)) * project(mlp.up_proj, x))


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(9))


def _scores(*shape: int) -> Tensor:
    return torch.randn(*shape, EXPERTS, generator=torch.Generator().manual_seed(10))


@pytest.mark.parametrize("ranks", [EQUAL, MIXED])
def test_the_plain_form_is_the_sum_over_experts_for_any_weights(ranks: Ranks) -> None:
    updates = _updates(ranks, HIDDEN, WIDE)
    packed = PackedExperts(updates, nn.Linear(HIDDEN, WIDE).double())
    x, weights = _x(2, 5).double(), _scores(2, 5).double()

    by_hand = sum(weights[..., [e]] * (x @ one.delta().double().T) for e, one in enumerate(updates) if one)

    torch.testing.assert_close(plain(packed, x, weights), by_hand, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (3, 20)])
@pytest.mark.parametrize("ranks", [EQUAL, MIXED])
@pytest.mark.parametrize("estimate", [hard, TopK(2), TopK(1), _nobody, _all_to_one])
@torch.no_grad()
def test_a_linear_in_use_says_what_the_plain_form_says(
    shape: tuple[int, ...], ranks: Ranks, estimate: Estimator
) -> None:
    linear = nn.Linear(HIDDEN, WIDE)
    packed, x, decision = PackedExperts(_updates(ranks, HIDDEN, WIDE), linear), _x(*shape), estimate(_scores(*shape))

    said = routed_linear(linear, packed, x, decision)

    torch.testing.assert_close(said, linear(x) + plain(packed, x, decision.weights), rtol=0, atol=1e-5)


@torch.no_grad()
def test_where_nobody_speaks_the_base_is_left_bit_for_bit() -> None:
    linear, x = nn.Linear(HIDDEN, WIDE), _x(3, 20)
    packed = PackedExperts(_updates(MIXED, HIDDEN, WIDE), linear)
    without_rows = hard(torch.tensor([0.0, 0, 1, 0]).expand(3, 20, 4))

    for decision in (_nobody(_scores(3, 20)), without_rows):
        assert torch.equal(routed_linear(linear, packed, x, decision), linear(x))


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (3, 20)])
@pytest.mark.parametrize(("ranks", "by"), [(EQUAL, Loop), (MIXED, Loop), (EQUAL, Grouped)])
@pytest.mark.parametrize("estimate", [hard, _all_to_one])
@torch.no_grad()
def test_a_sorted_mlp_in_use_says_what_the_plain_form_says(
    shape: tuple[int, ...], ranks: Ranks, by: Sorter, estimate: Estimator
) -> None:
    mlp, x, decision = _mlp(ranks), _x(*shape), estimate(_scores(*shape))

    said = sorted_mlp(x.flatten(0, 1), mlp, by(decision)).view(x.shape)

    torch.testing.assert_close(said, _plainly(mlp, x, decision.weights), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("ranks", "by"), [(EQUAL, Loop), (MIXED, Loop), (EQUAL, Grouped)])
@pytest.mark.parametrize("estimate", [hard, hard_selected, _all_to_one])
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_the_function_has_the_gradients_of_the_plain_form(
    ranks: Ranks, by: Sorter, estimate: Estimator, act: str
) -> None:
    mlp, upstream = _mlp(ranks, act), torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(3))
    found = []
    for form in (
        lambda x, decision: SortedMLP.apply(x, decision.weights, mlp, by(decision), decision),
        lambda x, decision: _plainly(mlp, x, decision.weights),
    ):
        x, scores = _x(40).requires_grad_(), _scores(40).requires_grad_()
        y = form(x, estimate(scores))
        (y * upstream).sum().backward()
        found.append((y.detach(), x.grad, scores.grad))

    for ours, plainly in zip(*found, strict=True):
        torch.testing.assert_close(ours, plainly, rtol=1e-4, atol=1e-4)
    assert found[0][2] is not None and (estimate is _all_to_one or found[0][2].abs().max() > 1e-2)


def test_selected_is_the_gradient_of_a_loop_over_masked_experts() -> None:
    """The reference code of arXiv 2606.31413 in one linear: each expert on the tokens that chose it, at its weight."""
    updates, linear = _updates(MIXED, HIDDEN, WIDE), nn.Linear(HIDDEN, WIDE).requires_grad_(False)
    packed, upstream = PackedExperts(updates, linear), torch.randn(40, WIDE)
    ours, theirs = _scores(40).requires_grad_(), _scores(40).requires_grad_()

    (routed_linear(linear, packed, _x(40), hard_selected(ours)) * upstream).sum().backward()

    p = theirs.softmax(-1)
    weights = nn.functional.one_hot(p.argmax(-1), EXPERTS) + p - p.detach()
    y = linear(_x(40))
    for expert, update in enumerate(updates):
        rows = (p.argmax(-1) == expert).nonzero()[:, 0]
        if update is not None and len(rows):
            y = y.index_add(0, rows, weights[rows, expert, None] * (_x(40)[rows] @ update.delta().T))
    (y * upstream).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_training_keeps_two_activations_the_rank_rows_and_the_choice() -> None:
    mlp, kept = _mlp(EQUAL), set()
    x, scores = _x(40).requires_grad_(), _scores(40).requires_grad_()

    def keep(tensor: Tensor) -> Tensor:
        kept.add((tensor.data_ptr(), tuple(tensor.shape)))
        return tensor

    decision = hard_selected(scores)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        routed_mlp(mlp, x, decision)

    assert sorted(shape for _, shape in kept) == [(40, 1)] + [(40, 8)] * 3 + [(40, WIDE)] * 2


def test_nothing_frozen_gets_a_gradient_and_an_input_may_want_none() -> None:
    mlp, x, scores = _mlp(EQUAL), _x(5), _scores(5).requires_grad_()

    routed_mlp(mlp, x, hard(scores)).sum().backward()

    assert scores.grad is not None and x.grad is None
    assert all(tensor.grad is None for tensor in (*mlp.parameters(), *mlp.buffers()))
    assert not any(tensor.requires_grad for tensor in mlp.buffers())


@pytest.mark.parametrize("tokens", [1, 20, 200])
def test_a_bfloat16_base_is_as_exact_as_its_format(tokens: int) -> None:
    """Few tokens are multiplied in float32, many in bfloat16; used and in training."""
    mlp, decision = _mlp(MIXED), hard(_scores(tokens))
    expected = _plainly(mlp, _x(tokens), decision.weights)
    for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        part.linear.to(torch.bfloat16)
    scores = _scores(tokens).requires_grad_()

    with torch.no_grad():
        used = routed_mlp(mlp, _x(tokens).bfloat16(), decision)
        soft = _plainly(mlp, _x(tokens).bfloat16(), decision.weights)
    trained = routed_mlp(mlp, _x(tokens).bfloat16(), hard(scores))
    trained.float().sum().backward()

    for found in (used, soft, trained):
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected).norm() < 0.02 * expected.norm()
    assert scores.grad is not None and scores.grad.isfinite().all()


@torch.no_grad()
def test_an_expert_that_nobody_chose_can_be_taken_out_without_a_trace() -> None:
    decision = hard(_scores(3, 20) - torch.tensor([0.0, 99, 0, 0]))
    smaller = hard(_scores(3, 20)[..., [0, 2, 3]])

    whole, rest = _mlp(EQUAL), _mlp(EQUAL, keep=(0, 2, 3))

    assert torch.equal(routed_mlp(whole, _x(3, 20), decision), routed_mlp(rest, _x(3, 20), smaller))


def test_a_decision_about_other_tokens_is_refused() -> None:
    linear = nn.Linear(HIDDEN, WIDE)
    packed = PackedExperts(_updates(EQUAL, HIDDEN, WIDE), linear)
    with pytest.raises(ValueError, match="met"):
        routed_linear(linear, packed, _x(2, 7), hard(_scores(2, 5)))
