from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fedcompose.model.controls import UniformRouter
from fedcompose.model.experts import PackedExperts, Update, load_expert
from fedcompose.model.kernels import RoutedLinear
from fedcompose.model.router import RoutingContext
from tests.tiny_experts import make_tiny_expert

IN, OUT = 12, 20


def _updates(ranks: tuple[int | None, ...]) -> list[Update | None]:
    generator = torch.Generator().manual_seed(3)

    def one(rank: int, scale: float) -> Update:
        return Update(torch.randn(rank, IN, generator=generator), torch.randn(OUT, rank, generator=generator), scale)

    return [one(rank, 0.5 + index) if rank else None for index, rank in enumerate(ranks)]


def test_experts_of_any_rank_lie_one_after_the_other_with_their_scale() -> None:
    updates = _updates((4, None, 7, 1))
    packed = PackedExperts(updates, nn.Linear(IN, OUT).double())

    assert packed.offsets == [0, 4, 4, 11, 12] and packed.a.shape == (12, IN) and packed.b.shape == (12, OUT)
    for index, update in enumerate(updates):
        a, b = packed.each[index]
        expected = torch.zeros(OUT, IN).double() if update is None else update.delta().double()
        torch.testing.assert_close((a @ b).T, expected, rtol=1e-6, atol=1e-6)


def test_experts_stay_float32_on_a_cpu_and_follow_a_base_that_is_moved() -> None:
    packed = PackedExperts(_updates((4,)), nn.Linear(IN, OUT, dtype=torch.bfloat16))
    assert packed.a.dtype == packed.b.dtype == packed.each[0][0].dtype == torch.float32

    packed.to(torch.bfloat16)
    assert packed.each[0][0].dtype == torch.bfloat16


def test_a_linear_can_decide_for_itself() -> None:
    context = RoutingContext(UniformRouter(2))
    linear, x = nn.Linear(IN, OUT), torch.randn(5, IN)
    first, second = (update.delta() for update in _updates((4, 3)) if update)

    said = RoutedLinear(linear, _updates((4, 3)), context, point=0)(x)

    torch.testing.assert_close(said, linear(x) + x @ (first + second).T / 2, rtol=1e-4, atol=1e-4)


def test_code_that_multiplies_by_the_weight_itself_fails_instead_of_leaving_experts_out() -> None:
    with pytest.raises(AttributeError):
        _ = RoutedLinear(nn.Linear(IN, OUT), _updates((4,)), RoutingContext(UniformRouter(1))).weight


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
