from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import fedcompose
from fedcompose.bases import Base, resolve_base
from fedcompose.composition import ATTENTION_FOLDER, ROUTER_FILE
from fedcompose.errors import MissingError, RefusedError
from fedcompose.model import composed
from fedcompose.model.controls import FixedRouter, UniformRouter
from fedcompose.model.experts import Expert, Update, load_expert
from fedcompose.model.learned import Router, save_router
from fedcompose.model.lm import load_base, prompt_ids
from fedcompose.model.placement import compose_model
from tests.federation_sim import FederationSim
from tests.tiny import make_tiny_base
from tests.tiny_experts import make_tiny_expert, make_tiny_router


@pytest.fixture(scope="module")
def experts(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three unlike experts: plain; rsLoRA without up_proj; another rank with patterns."""
    folder = tmp_path_factory.mktemp("experts")
    return [
        make_tiny_expert(tiny_base, folder / "plain", seed=1),
        make_tiny_expert(
            tiny_base, folder / "rslora", seed=2, strength=0.2, r=2, use_rslora=True,
            target_modules=["gate_proj", "down_proj"],
        ),
        make_tiny_expert(
            tiny_base, folder / "patterns", seed=3, r=6, lora_alpha=3, rank_pattern={"up_proj": 3},
            alpha_pattern={"model.layers.1.mlp.down_proj": 9},
        ),
    ]  # fmt: skip


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return resolve_base(tiny_base)


def _compose(base: Base, folders: list[Path], router: torch.nn.Module) -> Any:
    model, _ = load_base(base.path, torch.float32)
    return compose_model(model, [load_expert(folder) for folder in folders], router)


def _router(folders: list[Path]) -> Router:
    """Large enough that every expert is chosen somewhere."""
    return make_tiny_router(len(folders), seed=5, strength=50).requires_grad_(False)


def _ids(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(8))


@torch.no_grad()
def test_a_forced_expert_is_that_expert_as_peft_runs_it(base: Base, experts: list[Path]) -> None:
    model = _compose(base, experts, _router(experts))
    for index, folder in enumerate(experts):
        alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), folder)
        with model.routing.using(FixedRouter(index, 3)):
            logits = model(_ids()).logits

        torch.testing.assert_close(logits, alone(_ids()).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_uniform_router_is_the_average_of_the_deltas(base: Base, experts: list[Path]) -> None:
    model = _compose(base, experts, UniformRouter(3))
    merged, _ = load_base(base.path, torch.float32)
    for folder in experts:
        for name, update in load_expert(folder).updates.items():
            merged.get_submodule(name).weight += update.delta() / 3

    torch.testing.assert_close(model(_ids()).logits, merged(_ids()).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_order_of_the_experts_matters_only_with_the_router_rows(base: Base, experts: list[Path]) -> None:
    router = _router(experts)
    permuted = make_tiny_router(3)
    permuted.scorer.weights[0].data = router.scorer.weights[0][[2, 0, 1]]

    logits = _compose(base, experts, router)(_ids()).logits
    same = _compose(base, [experts[2], experts[0], experts[1]], permuted)(_ids()).logits
    other = _compose(base, [experts[2], experts[0], experts[1]], router)(_ids()).logits

    torch.testing.assert_close(logits, same, rtol=0, atol=1e-5)
    assert (logits - other).abs().max() > 1e-3


@torch.no_grad()
def test_cached_generation_says_what_a_full_forward_says(base: Base, experts: list[Path]) -> None:
    model = _compose(base, experts, _router(experts))
    ids = _ids(rows=1)

    written = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=-1)
    for length in range(ids.shape[1], written.shape[1]):
        assert model(written[:, :length]).logits[0, -1].argmax() == written[0, length]

    with model.routing.recording() as cached:
        model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=-1)
    with model.routing.recording() as whole:
        model(written[:, :-1])
    assert torch.equal(torch.cat(cached.choices, dim=-1), whole.choices[0])
    assert whole.choices[0].unique().tolist() == [0, 1, 2]


@torch.no_grad()
def test_padding_changes_nothing(base: Base, experts: list[Path]) -> None:
    model = _compose(base, experts, _router(experts))
    ids, pad = _ids(rows=1), torch.zeros(1, 4, dtype=torch.long)
    mask = torch.cat([torch.zeros_like(pad), torch.ones_like(ids)], dim=1)
    alone = model(ids).logits

    left = model(torch.cat([pad, ids], 1), attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0)).logits
    right = model(torch.cat([ids, pad], 1), attention_mask=mask.flip(1)).logits

    torch.testing.assert_close(left[:, 4:], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(right[:, :-4], alone, rtol=0, atol=1e-5)


def test_the_router_is_registered_once_and_is_all_that_can_be_trained(base: Base, experts: list[Path]) -> None:
    model = _compose(base, experts, make_tiny_router(3))

    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert trainable == {"router.scorer.weights.0"}
    assert [key for key in model.state_dict() if "router" in key] == ["router.scorer.weights.0"]


@torch.no_grad()
def test_a_block_without_experts_is_left_alone(base: Base, experts: list[Path]) -> None:
    whole = load_expert(experts[0])
    upper = {name: update for name, update in whole.updates.items() if name.startswith("model.layers.1.")}
    model, _ = load_base(base.path, torch.float32)
    compose_model(model, [Expert("upper", upper)], make_tiny_router(1))

    with model.routing.recording() as record:
        model(_ids())

    assert type(model.get_submodule("model.layers.0.mlp")).__name__ == "LlamaMLP"
    assert tuple(record.choices[0].shape) == (1, 2, 9)


def test_refuses_an_expert_of_what_is_no_linear_in_a_block(base: Base) -> None:
    model, _ = load_base(base.path)
    for name in ("lm_head", "model.layers.0.mlp", "model.layers.7.mlp.up_proj", "model.embed_tokens"):
        stranger = Expert("stranger", {name: Update(torch.zeros(4, 32), torch.zeros(259, 4), 1.0)})
        with pytest.raises(RefusedError) as refusal:
            compose_model(model, [stranger], make_tiny_router(1))
        assert refusal.value.code == "COMPOSE_TARGETS"


def test_refuses_an_expert_of_another_width(base: Base) -> None:
    name = "model.layers.0.mlp.up_proj"
    stranger = Expert("stranger", {name: Update(torch.zeros(4, 16), torch.zeros(64, 4), 1.0)})
    model, _ = load_base(base.path)

    with pytest.raises(RefusedError) as refusal:
        compose_model(model, [stranger], make_tiny_router(1))
    assert refusal.value.code == "COMPOSE_SHAPES"


def _trained(base: Base, experts: list[Path]) -> Any:
    """A composed model with an attention LoRA that does something, as training leaves it."""
    model, _ = load_base(base.path, torch.float32)
    for index, weight in enumerate(composed.add_attention(model, rank=3, alpha=6, seed=0)):
        weight.data = 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(index))
    return compose_model(model, [load_expert(folder) for folder in experts], _router(experts))


def _save(model: Any, folder: Path) -> Path:
    save_router(folder / ROUTER_FILE, model.router)
    composed.save_attention(folder / ATTENTION_FOLDER, model)
    return folder


@torch.no_grad()
def test_saved_and_assembled_again_it_says_the_same(base: Base, experts: list[Path], tmp_path: Path) -> None:
    model = _trained(base, experts)
    again, _ = composed.assemble(base, experts, _save(model, tmp_path), dtype=torch.float32)

    torch.testing.assert_close(again(_ids()).logits, model(_ids()).logits, rtol=0, atol=1e-5)
    assert torch.equal(again.router.scorer.weights[0], model.router.scorer.weights[0])


@torch.no_grad()
def test_the_attention_folder_is_a_plain_peft_adapter(base: Base, tmp_path: Path) -> None:
    model = _trained(base, [])
    folder = _save(model, tmp_path) / ATTENTION_FOLDER

    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), folder)

    torch.testing.assert_close(alone(_ids()).logits, model(_ids()).logits, rtol=0, atol=1e-5)


def test_the_attention_lora_is_float32_on_a_bfloat16_base_and_repeats_with_its_seed(base: Base) -> None:
    model, again = (load_base(base.path, torch.bfloat16)[0] for _ in range(2))
    torch.manual_seed(1)
    first = composed.add_attention(model, rank=2, alpha=4, seed=0)
    torch.manual_seed(2)
    second = composed.add_attention(again, rank=2, alpha=4, seed=0)

    assert {parameter.dtype for parameter in first} == {torch.float32} and len(first) == 2 * 4 * 2
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert model(_ids()).logits.dtype == torch.bfloat16


def test_refuses_an_attention_lora_that_changes_the_mlp(base: Base, experts: list[Path]) -> None:
    model, _ = load_base(base.path)

    with pytest.raises(RefusedError) as refusal:
        composed.merge_attention(model, experts[0])
    assert refusal.value.code == "COMPOSE_TARGETS"


@torch.no_grad()
def test_a_release_loads_into_a_model_that_generates_with_its_cache(sim: FederationSim) -> None:
    release = sim.released()

    model, tokenizer = fedcompose.load(release.path, [sim.root.keyid], base=sim.base.path)

    candidate = sim.coordinator_home / "candidate"
    again, _ = composed.assemble(sim.base, [each.path for each in sim.experts()], candidate)
    assert torch.equal(model(_ids()).logits, again(_ids()).logits)
    ids = torch.tensor([prompt_ids(tokenizer, "hello")])
    with model.routing.recording() as record:
        written = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=-1)
    assert written.shape[1] == ids.shape[1] + 6 and len(record.choices) == 6


def test_a_release_is_verified_before_anything_is_loaded(sim: FederationSim) -> None:
    release = sim.released()
    router = release.path / "router.safetensors"
    router.chmod(0o644)
    router.write_bytes(router.read_bytes()[:-1] + b"?")

    for load in (
        lambda: fedcompose.load(release.path, [sim.root.keyid], base=sim.base.path),
        lambda: composed.load_release(release, base=sim.base),
    ):
        with pytest.raises(RefusedError) as refusal:
            load()
        assert refusal.value.code == "FILE_CHANGED"


def test_a_release_loads_only_on_its_own_base(sim: FederationSim, tmp_path: Path) -> None:
    release = sim.released()
    other = resolve_base(make_tiny_base(tmp_path / "other", seed=1))

    with pytest.raises(RefusedError) as refusal:
        composed.load_release(release, base=other)
    assert refusal.value.code == "BASE_MISMATCH"

    with pytest.raises(MissingError) as missing:
        composed.load_release(release)
    assert missing.value.code == "BASE_NOT_FOUND"
