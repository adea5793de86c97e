"""The private steps: how much one unit can change, that they learn the right thing, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedcompose.errors import ConfigError
from fedcompose.tasks import Example
from fedcompose_client import accounting, private
from fedcompose_client.accounting import Steps, epsilon_of, noise_for
from fedcompose_client.config import Dp, Training
from fedcompose_client.packed import Tree, backward
from fedcompose_client.private import check_sound, gradient_alone, learn_privately, noisy_sum, public_count, units_of
from fedcompose_client.run import trainable
from fedcompose_client.train import train
from tests.client.small_site import make_site, silent

SHAPES = [torch.Size([3, 4]), torch.Size([5])]


def random_gradient(seed: int, size: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [size * torch.randn(shape, generator=generator) for shape in SHAPES]


def length(gradient: list[torch.Tensor]) -> float:
    return float(torch.cat([part.flatten() for part in gradient]).norm())


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e30, float("inf"), float("nan")])
def test_one_unit_more_changes_the_sum_by_at_most_the_clip_norm(size: float) -> None:
    def gradient(trees: Any) -> list[torch.Tensor]:
        return random_gradient(*trees[0])

    groups: list[Any] = [[(seed, 1.0)] for seed in range(5)]
    with_it, without = (noisy_sum(each, gradient, SHAPES, 0.5, 0.0) for each in ([*groups, [(9, size)]], groups))
    change = length([a - b for a, b in zip(with_it, without, strict=True)])
    assert change <= 0.5 * (1 + 1e-12)
    if np.isfinite(size) and size >= 1:
        assert change > 0.49  # the bound is reached: clipping, not something smaller, holds it


def test_the_noise_has_the_stated_size_also_where_nobody_was_drawn() -> None:
    (noise,) = noisy_sum([], lambda trees: [], [torch.Size([20_000])], 0.5, 3.0)
    assert float(noise.std()) == pytest.approx(1.5, rel=0.03)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.06)
    again = noisy_sum([], lambda trees: [], [torch.Size([20_000])], 0.5, 3.0)[0]
    assert not torch.equal(noise, again)
    tails = private.normal(200_000)
    assert np.mean(np.abs(tails) > 1.96) == pytest.approx(0.05, abs=0.003)


def test_no_seed_repeats_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0), np.random.seed(0)
    first = private.normal(8)
    torch.manual_seed(0), np.random.seed(0)
    assert not np.array_equal(first, private.normal(8))
    monkeypatch.setattr("os.urandom", lambda count: bytes(range(256)) * count)  # the control: entropy is what decides
    assert np.array_equal(private.uniform(4), private.uniform(4))


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> Any:
    from peft import LoraConfig, get_peft_model

    from fedcompose.model.lm import load_base

    frozen, _ = load_base(tiny_base, torch.float32)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(frozen, lora)


TREES = [
    Tree((5, 9, 17, 30), (((40, 41, 2), 0.5), ((50, 2), -0.5))),
    Tree((7, 8), (((44, 2), 1.0),)),
    Tree((11, 12, 13, 14, 15), (((70, 2), -0.25), ((71, 72, 73, 74), 0.25))),
]


def test_without_noise_and_clipping_it_is_the_gradient_of_the_plain_loop(model: Any) -> None:
    weights = trainable(model)
    model.zero_grad(set_to_none=True)
    backward(model, TREES, 7.0, 0)
    plain = torch.cat([weight.grad.flatten() for weight in weights])

    def gradient(trees: Any) -> list[torch.Tensor]:
        return gradient_alone(model, weights, trees, 7.0, 0)

    summed = noisy_sum([[tree] for tree in TREES], gradient, [weight.shape for weight in weights], 1e9, 0.0)
    ours = torch.cat([part.flatten() for part in summed]).float()
    assert float((ours - plain).norm() / plain.norm()) < 1e-6
    assert float(plain.norm()) > 0


def test_a_units_gradient_is_the_same_to_the_bit_whoever_else_was_drawn(model: Any) -> None:
    weights = trainable(model)
    first = gradient_alone(model, weights, TREES[:1], 7.0, 0)
    gradient_alone(model, weights, TREES[1:], 7.0, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, gradient_alone(model, weights, TREES[:1], 7.0, 0), strict=True))


def test_rows_of_a_question_or_of_a_user_are_one_unit() -> None:
    rows = [Example("a", "1"), Example("A ", "2"), Example("b", "3")]
    assert units_of(rows, None) == [(rows[0], rows[1]), (rows[2],)]
    assert units_of(rows, {id(rows[0]): "x", id(rows[1]): "y", id(rows[2]): "x"}) == [(rows[0], rows[2]), (rows[1],)]


def test_units_are_drawn_independently_and_large_ones_in_part() -> None:
    units = [(Example(str(number), "1"),) for number in range(2000)]
    counts = [len(private.draw_units(units, 0.1)) for _ in range(20)]
    assert np.mean(counts) == pytest.approx(200, abs=12)
    assert len(set(counts)) > 5  # not a shuffle, which would draw the same number each time
    (drawn,) = private.draw_units([tuple(Example(str(number), "1") for number in range(50))], 1.0)
    assert len(drawn) == private.ROWS_PER_UNIT


def test_the_accountant_is_as_good_as_when_it_was_chosen() -> None:
    """Against dp-accounting 0.6's privacy loss distributions: 4.48; Rényi's bound would be 5.11."""
    pytest.importorskip("opacus")
    assert epsilon_of(1.0, [Steps(0.064, 100)], 1e-5) == pytest.approx(4.48, abs=0.03)
    together = epsilon_of(0.8, [Steps(0.02, 12), Steps(0.01, 36)], 1e-5)
    assert epsilon_of(0.8, [Steps(0.01, 36)], 1e-5) < together < 2.0
    noise = noise_for(3.0, [Steps(64 / 2000, 200)], 2.3e-4)
    assert noise == pytest.approx(0.88, abs=0.01)
    assert epsilon_of(noise, [Steps(64 / 2000, 200)], 2.3e-4) <= 3.0
    with pytest.raises(ConfigError) as caught:
        noise_for(1e-4, [Steps(0.5, 1000)], 1e-9)
    assert caught.value.code == "DP_EPSILON"


def test_what_is_stated_follows_from_public_numbers() -> None:
    assert [public_count(units) for units in (7, 99, 123, 1299, 20_999)] == [7, 99, 120, 1200, 20_000]


@pytest.mark.parametrize(
    ("settings", "request_", "units", "config", "words"),
    [
        ({"engine": "trl"}, {}, 1000, {}, "TRL"),
        ({}, {"delta": 0.01}, 1000, {}, "delta"),
        ({"warm_up_batch": 64}, {"delta": 1e-3}, 50, {}, "draws more units"),
        ({}, {}, 1000, {"router_aux_loss_coef": 0.01}, "influence"),
    ],
)
def test_refuses_what_would_make_the_guarantee_untrue(
    settings: dict[str, Any], request_: dict[str, Any], units: int, config: dict[str, Any], words: str
) -> None:
    model = SimpleNamespace(config=SimpleNamespace(**config), modules=lambda: [torch.nn.Linear(1, 1)])
    with pytest.raises(ConfigError) as caught:
        check_sound(model, Training(**settings), Dp(epsilon=8.0, **request_), units)
    assert caught.value.code == "DP_UNSOUND" and words in caught.value.what
    plain = SimpleNamespace(config=SimpleNamespace(), modules=model.modules)
    check_sound(plain, Training(), Dp(epsilon=8.0), 1000)  # the control
    with pytest.raises(ConfigError):
        norm = SimpleNamespace(config=SimpleNamespace(), modules=lambda: [torch.nn.BatchNorm1d(3)])
        check_sound(norm, Training(), Dp(epsilon=8.0), 1000)


def known_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """For machines without the accountant: what is tested with it is not how ε is computed."""
    try:
        import opacus  # noqa: F401
    except ImportError:
        monkeypatch.setattr(private, "noise_for", lambda *_: 1.0)
        monkeypatch.setattr(private, "epsilon_of", lambda *_: 7.5)


@pytest.mark.parametrize("asked_by", ["options", "settings"])  # as site.toml does when a call is worked on
def test_a_private_run_ends_with_an_expert_and_a_statement(
    tmp_path: Path, teachable_base: Path, monkeypatch: pytest.MonkeyPatch, asked_by: str
) -> None:
    known_noise(monkeypatch)
    site = tmp_path / "site"
    config = make_site(site, teachable_base, warm_up_steps=6, steps=3)
    asked = Dp(epsilon=8.0, delta=1e-3)
    domain = config.domain("order").model_copy(update={"dp": asked if asked_by == "settings" else None})
    settled = config.model_copy(update={"domains": {"order": domain}})
    result = train(site, settled, "order", silent, dp=asked if asked_by == "options" else None)
    assert result["kept"] == "rlvr" and result["validation"] == {}  # nothing was chosen by private rows
    assert result["dp"]["unit"] == "prompt" and result["dp"]["epsilon"] <= 8.0
    assert [phase["steps"] for phase in result["dp"]["phases"]] == [6, 3]
    assert result["dp"]["units"] == 29  # 49 questions, 20 held out
    assert (site / "runs/order/expert/adapter_model.safetensors").is_file()
    with pytest.raises(ConfigError) as caught:
        train(site, config, "order", silent)  # the same folder without privacy is another run
    assert caught.value.code == "RUN_OTHER_SETTINGS"


def test_privacy_by_user_keeps_each_persons_rows_together(
    tmp_path: Path, teachable_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_noise(monkeypatch)
    site = tmp_path / "site"
    config = make_site(site, teachable_base, warm_up_steps=1, steps=0, warm_up_batch=1)
    request = Dp(epsilon=8.0, delta=1e-3, unit="user")
    with pytest.raises(ConfigError) as caught:
        train(site, config, "order", silent, dp=request)
    assert caught.value.code == "DP_UNSOUND"
    rows = [json.loads(line) for line in (site / "rows.jsonl").read_text().splitlines()]
    rows = [{**row, "owner": f"p{number % 40}"} for number, row in enumerate(rows)]
    (site / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    domain = config.domains["order"].model_copy(update={"user": "owner"})
    config = config.model_copy(update={"domains": {"order": domain}})
    result = train(site, config, "order", silent, dp=request)
    assert result["dp"]["units"] == 20  # of 40 people, 20 held out
    assert result["dp"]["unit"] == "user" and result["kept"] == "warmup"


def test_the_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    with pytest.raises(Exception, match="opacus") as caught:
        accounting.epsilon_of(1.0, [Steps(0.1, 1)], 1e-5)
    assert caught.value.code == "PACKAGE_MISSING"  # type: ignore[attr-defined]


def test_learning_with_hardly_any_noise_learns(tmp_path: Path, teachable_base: Path, monkeypatch: Any) -> None:
    """The steps do what they are for: with the noise turned down, the warm-up teaches what earns reward."""
    draws = random.Random(0)  # in place of the operating system's entropy, so that the test ends the same every time
    monkeypatch.setattr(private, "os", SimpleNamespace(urandom=draws.randbytes))
    monkeypatch.setattr(private, "secrets", SimpleNamespace(SystemRandom=lambda: draws, randbits=draws.getrandbits))
    monkeypatch.setattr(private, "noise_for", lambda *_: 1e-3)
    monkeypatch.setattr(private, "epsilon_of", lambda *_: 1.0)

    def earned(warm_up_steps: int) -> float:
        site = tmp_path / f"site-{warm_up_steps}"
        config = make_site(site, teachable_base, steps=4, warm_up_steps=warm_up_steps)
        return sum(train(site, config, "order", silent, dp=Dp(epsilon=8.0, delta=1e-3))["rewards"])

    assert earned(0) == 0
    assert earned(150) > 0.1
    assert learn_privately.__module__ == "fedcompose_client.private"
