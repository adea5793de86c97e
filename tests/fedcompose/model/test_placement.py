"""Experts in unmodified transformers models of many kinds: against PEFT, and against themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from fedcompose.errors import ConfigError, RefusedError
from fedcompose.model.controls import FixedRouter, NoExpertRouter, SequenceRouter
from fedcompose.model.experts import Expert, Update, load_expert
from fedcompose.model.kernels import RoutedLinear, RoutedMLP
from fedcompose.model.learned import make_router
from fedcompose.model.placement import (
    base_name,
    compose_model,
    decision_points,
    is_gated_mlp,
    linear_of,
    routed_modules,
)
from fedcompose.model.router import RoutedBlock
from fedcompose.routing import Decides, RouterConfig
from tests.tiny_architectures import ATTENTION, MLP, TARGETS, make_tiny

# Experts that differ in all that may differ: plain; rsLoRA that leaves a target alone; other ranks and alphas.
EXPERTS = 3
CASES: list[tuple[str, tuple[str, ...], Decides]] = [
    *((name, targets, "block") for name, targets in TARGETS.items() if name != "T5"),
    *((name, TARGETS[name], "linear") for name in ("T5", "Mamba", "Llama")),
    ("Llama", ATTENTION, "block"),
    ("Qwen3", ATTENTION, "linear"),
    ("Gemma3Text", (*ATTENTION, *MLP), "block"),
]
each_case = pytest.mark.parametrize(("name", "targets", "decides"), CASES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of an architecture and targets, three expert folders that PEFT wrote; made once."""
    made: dict[tuple[str, tuple[str, ...]], list[Path]] = {}

    def get(name: str, targets: tuple[str, ...]) -> list[Path]:
        if (name, targets) not in made:
            root = tmp_path_factory.mktemp(name)
            last = next(n for n, _ in reversed(list(make_tiny(name).named_modules())) if n.endswith(targets))
            options: list[dict[str, Any]] = [
                {"r": 4, "lora_alpha": 8, "target_modules": list(targets)},
                {"r": 2, "lora_alpha": 8, "use_rslora": True, "target_modules": list(targets[1:])},
                {"r": 6, "lora_alpha": 3, "target_modules": list(targets), "rank_pattern": {targets[0]: 3},
                 "alpha_pattern": {last: 9}},
            ]  # fmt: skip
            made[name, targets] = [
                _save(name, root / str(seed), seed, settings) for seed, settings in enumerate(options)
            ]
        return made[name, targets]

    return get


def _save(name: str, folder: Path, seed: int, settings: dict[str, Any]) -> Path:
    model: Any = get_peft_model(make_tiny(name), LoraConfig(**settings, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def _composed(name: str, folders: list[Path], decides: Decides, order: tuple[int, ...] = (0, 1, 2)) -> Any:
    """The experts in `order`, with a router that chooses every one somewhere, its rows in the same order."""
    model = make_tiny(name)
    experts = [load_expert(folder) for folder in folders]
    config = RouterConfig(decides=decides, sharing="layer" if decides == "block" else "module")
    router = make_router(config, decision_points(model, experts, decides), EXPERTS, seed=3)
    for weight in router.scorer.weights:
        weight.data = 50 * weight.data[list(order)]
    return compose_model(model, [experts[index] for index in order], router.requires_grad_(False), decides)


def _ids(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(8))


def _logits(model: Any, ids: Tensor, **more: Any) -> Tensor:
    if model.config.is_encoder_decoder:
        more |= {"decoder_input_ids": ids[:, :5]}
    with torch.no_grad():
        found: Tensor = model(ids, **more).logits
    return found


@each_case
def test_one_expert_alone_is_that_expert_as_peft_runs_it(
    folders: Any, name: str, targets: tuple[str, ...], decides: Decides
) -> None:
    paths = folders(name, targets)
    model, base = _composed(name, paths, decides), _logits(make_tiny(name), _ids())
    for index, folder in enumerate(paths):
        expected = _logits(PeftModel.from_pretrained(make_tiny(name), folder), _ids())
        with model.routing.using(FixedRouter(index, EXPERTS)):
            found = _logits(model, _ids())

        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert (expected - base).abs().max() > 0.01, "this expert does nothing, so this test proves nothing"


@each_case
def test_where_nobody_speaks_the_base_is_left_bit_for_bit(
    folders: Any, name: str, targets: tuple[str, ...], decides: Decides
) -> None:
    model = _composed(name, folders(name, targets), decides)
    with model.routing.using(NoExpertRouter(EXPERTS)):
        assert torch.equal(_logits(model, _ids()), _logits(make_tiny(name), _ids()))


@each_case
def test_the_order_of_experts_matters_only_with_the_router(
    folders: Any, name: str, targets: tuple[str, ...], decides: Decides
) -> None:
    paths = folders(name, targets)
    model, permuted = (_composed(name, paths, decides, order) for order in ((0, 1, 2), (2, 0, 1)))
    with model.routing.recording() as record:
        logits = _logits(model, _ids())

    torch.testing.assert_close(_logits(permuted, _ids()), logits, rtol=1e-5, atol=1e-5)
    chosen = torch.cat([each.choice.flatten() for each in record.calls[0].values()])
    assert chosen.unique().tolist() == [0, 1, 2] and len(record.calls[0]) == len(model.routing.points)


@each_case
@torch.no_grad()
def test_cached_generation_says_what_a_full_forward_says(
    folders: Any, name: str, targets: tuple[str, ...], decides: Decides
) -> None:
    model, ids = _composed(name, folders(name, targets), decides), _ids(rows=1)
    new = 10  # beyond the sliding window
    found = model.generate(
        ids, max_new_tokens=new, do_sample=False, eos_token_id=-1, output_logits=True, return_dict_in_generate=True
    )
    written, steps = found.sequences, torch.stack(found.logits, dim=1)

    if model.config.is_encoder_decoder:
        whole = model(ids, decoder_input_ids=written[:, :-1]).logits
    else:
        whole = model(written[:, :-1]).logits
    torch.testing.assert_close(steps, whole[:, -new:], rtol=1e-4, atol=1e-4)


@each_case
def test_padding_and_other_rows_change_nothing(
    folders: Any, name: str, targets: tuple[str, ...], decides: Decides
) -> None:
    model, ids, pad = _composed(name, folders(name, targets), decides), _ids(), torch.zeros(2, 4, dtype=torch.long)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(pad)], dim=1)
    alone = torch.cat([_logits(model, row[None]) for row in ids])

    batched = _logits(model, ids)
    right = _logits(model, torch.cat([ids, pad], 1), attention_mask=mask)

    torch.testing.assert_close(batched, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(right[:, : alone.shape[1]], alone, rtol=1e-4, atol=1e-4)


@each_case
def test_every_point_of_a_router_learns(folders: Any, name: str, targets: tuple[str, ...], decides: Decides) -> None:
    model = _composed(name, folders(name, targets), decides)
    for weight in model.router.scorer.weights:
        weight.data /= 50  # as large as untrained, or a softmax so steep has no gradient
        weight.requires_grad_()
    more = {"decoder_input_ids": _ids()[:, :5]} if model.config.is_encoder_decoder else {}

    model(_ids(), **more).logits.square().mean().backward()

    silent = [
        point.name
        for point, weight in zip(model.routing.points, model.router.scorer.weights, strict=True)
        if weight.grad is None or not 1e-9 < weight.grad.norm() < 1e9
    ]
    assert not silent


def test_left_padding_changes_nothing_either(folders: Any) -> None:
    for name in ("Llama", "Mamba"):
        model, ids, pad = _composed(name, folders(name, TARGETS[name]), "block"), _ids(), torch.zeros(2, 4).long()
        mask = torch.cat([torch.zeros_like(pad), torch.ones_like(ids)], dim=1)
        more = {} if name == "Mamba" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        left = _logits(model, torch.cat([pad, ids], 1), attention_mask=mask, **more)
        torch.testing.assert_close(left[:, 4:], _logits(model, ids), rtol=1e-4, atol=1e-4)


def test_rows_of_a_batch_can_have_experts_of_their_own(folders: Any) -> None:
    model, ids = _composed("Llama", folders("Llama", MLP), "block"), _ids()
    with model.routing.using(SequenceRouter([2, 0], EXPERTS)):
        both = _logits(model, ids)
    for row, expert in enumerate((2, 0)):
        with model.routing.using(FixedRouter(expert, EXPERTS)):
            torch.testing.assert_close(both[row], _logits(model, ids)[row], rtol=1e-5, atol=1e-5)


def test_mamba_out_proj_which_peft_refuses_equals_merged_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    name = "backbone.layers.1.mixer.out_proj"
    a, b = (0.2 * torch.randn(shape, generator=generator) for shape in ((4, 64), (32, 4)))
    update = Update(a, b, 2.0)
    merged = make_tiny("Mamba")
    linear_of(merged, name).weight.data += update.delta()  # type: ignore[union-attr]

    model = compose_model(make_tiny("Mamba"), [Expert("one", {name: update})], FixedRouter(0, 1))

    torch.testing.assert_close(_logits(model, _ids()), _logits(merged, _ids()), rtol=1e-5, atol=1e-5)


def test_every_gated_mlp_is_recognised_by_what_it_says_and_nothing_else_is() -> None:
    for name in ("Llama", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "Mistral"):
        block = make_tiny(name).get_submodule("model.layers.0.mlp")
        assert is_gated_mlp(block)
        block.forward = lambda x, block=block: block.down_proj(block.act_fn(block.up_proj(x)) * block.gate_proj(x))
        assert not is_gated_mlp(block)
    assert not is_gated_mlp(make_tiny("Mamba").get_submodule("backbone.layers.0.mixer"))


def test_blocks_and_linears_keep_their_names_in_the_base(folders: Any) -> None:
    targets = (*ATTENTION, *MLP)
    model = _composed("Gemma3Text", folders("Gemma3Text", targets), "block")

    assert [point.name for point in model.routing.points] == [
        f"model.layers.{layer}.{block}" for layer in range(2) for block in ("self_attn", "mlp")
    ]
    assert {name.rpartition(".")[2] for name, _ in routed_modules(model)} == set(targets)
    for name, module in model.named_modules():
        if isinstance(module, RoutedMLP | RoutedBlock | RoutedLinear):
            assert "block" not in base_name(model, name) and "linear" not in base_name(model, name)


def test_t5_attention_reads_two_sequences_so_its_block_cannot_decide(folders: Any) -> None:
    experts = [load_expert(folder) for folder in folders("T5", TARGETS["T5"])]
    with pytest.raises(ConfigError) as error:
        decision_points(make_tiny("T5"), experts, "block")
    assert error.value.code == "ROUTER_BLOCK"


def test_an_expert_of_another_model_is_refused() -> None:
    for name, code in (
        ("model.layers.0.mlp.up_proj", "COMPOSE_SHAPES"),
        ("model.layers.9.mlp.up_proj", "COMPOSE_TARGETS"),
        ("model.layers.0.mlp.act_fn", "COMPOSE_TARGETS"),
        ("lm_head", "COMPOSE_TARGETS"),
    ):
        stranger = Expert("stranger", {name: Update(torch.zeros(4, 16), torch.zeros(64, 4), 1.0)})
        with pytest.raises(RefusedError) as refusal:
            decision_points(make_tiny("Llama"), [stranger])
        assert refusal.value.code == code
