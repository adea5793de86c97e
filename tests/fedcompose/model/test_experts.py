from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fedcompose.model.experts import PackedExperts, RoutedLinear, Update, load_expert
from fedcompose.model.router import RoutingContext, RoutingDecision, UniformRouter, hard_top1
from tests.tiny_experts import make_tiny_expert

IN, OUT = 12, 20


def _updates(ranks: tuple[int | None, ...]) -> list[Update | None]:
    generator = torch.Generator().manual_seed(3)

    def one(rank: int, scale: float) -> Update:
        return Update(torch.randn(rank, IN, generator=generator), torch.randn(OUT, rank, generator=generator), scale)

    return [one(rank, 0.5 + index) if rank else None for index, rank in enumerate(ranks)]


def test_rank_space_equals_the_sum_over_experts_for_any_weights_and_mixed_ranks() -> None:
    updates = _updates((4, None, 7, 1))
    packed = PackedExperts(updates, like=torch.empty(0, dtype=torch.float64))
    x, weights = torch.randn(2, 5, IN).double(), torch.randn(2, 5, 4)

    present = [(index, update) for index, update in enumerate(updates) if update]
    by_hand = sum(
        weights[..., [index]].double() * update.scale * (x @ update.a.double().T @ update.b.double().T)
        for index, update in present
    )

    assert packed.owner.tolist() == [0] * 4 + [2] * 7 + [3]
    torch.testing.assert_close(packed(x, weights), by_hand, rtol=1e-12, atol=1e-12)


def test_an_expert_without_rows_leaves_the_linear_exactly_as_it_was() -> None:
    linear, context = nn.Linear(IN, OUT), RoutingContext(UniformRouter(2))
    routed, x = RoutedLinear(linear, _updates((4, None)), context), torch.randn(3, IN)

    with context.decided(RoutingDecision(torch.tensor([0.0, 1.0]).expand(3, 2), torch.ones(3))):
        assert torch.equal(routed(x), linear(x))


def test_the_router_gradient_is_the_textbook_formula_over_all_experts() -> None:
    """dL/dlogit_i = Σ_e p_e (δ_ei − p_i) ⟨h, D_e(x)⟩ in float64, experts not chosen included."""
    updates, context = _updates((4, 7, 1)), RoutingContext(UniformRouter(3))
    routed = RoutedLinear(nn.Linear(IN, OUT).double(), updates, context)
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    x, h = torch.randn(6, IN).double(), torch.randn(6, OUT).double()

    with context.decided(hard_top1(logits)):
        (routed(x) * h).sum().backward()

    p = logits.detach().softmax(-1)
    says = [update.scale * (x @ update.a.double().T @ update.b.double().T) for update in updates if update]
    inner = torch.stack([(h * said).sum(-1) for said in says], dim=-1)
    by_hand = torch.einsum("te,tei,te->ti", p, torch.eye(3).double() - p[:, None, :], inner)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, by_hand, rtol=1e-10, atol=1e-10)


def test_backward_makes_no_gradient_for_anything_frozen() -> None:
    context = RoutingContext(UniformRouter(2))
    routed = RoutedLinear(nn.Linear(IN, OUT).requires_grad_(False), _updates((4, 3)), context)
    x = torch.randn(5, IN, requires_grad=True)

    with context.decided(context.decide(0, x)):
        routed(x).sum().backward()

    assert x.grad is not None
    assert all(tensor.grad is None for tensor in (*routed.parameters(), *routed.buffers()))
    assert not any(tensor.requires_grad for tensor in routed.buffers())


def test_experts_take_the_number_format_of_the_base() -> None:
    packed = PackedExperts(_updates((4,)), like=torch.empty(0, dtype=torch.bfloat16))

    assert packed.a.dtype == packed.b.dtype == torch.bfloat16
    assert packed(torch.randn(2, IN).bfloat16(), torch.ones(2, 1)).dtype == torch.bfloat16


@pytest.mark.parametrize("rslora", [False, True])
def test_scales_come_from_the_adapter_itself(tiny_base: Path, tmp_path: Path, rslora: bool) -> None:
    folder = make_tiny_expert(
        tiny_base, tmp_path / "expert", strength=0.2, r=4, lora_alpha=6, use_rslora=rslora,
        rank_pattern={"up_proj": 9}, alpha_pattern={"model.layers.1.mlp.gate_proj": 5},
    )  # fmt: skip

    updates = load_expert(folder).updates

    def root(rank: int) -> float:
        return rank**0.5 if rslora else rank

    assert updates["model.layers.0.mlp.gate_proj"].scale == pytest.approx(6 / root(4))
    assert updates["model.layers.1.mlp.gate_proj"].scale == pytest.approx(5 / root(4))
    assert updates["model.layers.1.mlp.up_proj"].scale == pytest.approx(6 / root(9))
    assert updates["model.layers.1.mlp.up_proj"].a.shape[0] == 9
