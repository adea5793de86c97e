"""One tiny model acting as every method, checked against the models it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedcompose.bases import resolve_base
from fedcompose.files import write_json
from fedcompose.model.composed import ATTENTION_TARGETS, assemble, save_router
from fedcompose.model.lm import load_base, prompt_ids
from fedcompose.model.router import Router
from fedcompose.tasks import get_task, held_out
from fedcompose_coordinator.bench import ModelBench, greedy_answers
from fedcompose_coordinator.evaluation import Domain, Plan, evaluate
from tests.tiny_experts import make_tiny_expert

SITES = ("bank", "archive")


@pytest.fixture(scope="module")
def parts(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bench")
    for seed, site in enumerate(SITES):
        make_tiny_expert(tiny_base, root / site, seed=seed)
    attention = list(ATTENTION_TARGETS)
    for number, name in enumerate(("candidate", "attention_only")):
        make_tiny_expert(tiny_base, root / name / "attention", seed=7 + number, target_modules=attention)
    save_router(root / "candidate" / "router.safetensors", Router(32, len(SITES), seed=3))
    write_json(root / "candidate" / "composition.json", {})
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def bench(tiny_base: Path, parts: dict[str, Path]) -> ModelBench:
    experts = {site: parts[site] for site in SITES}
    return ModelBench(parts["candidate"], experts, resolve_base(str(tiny_base)), parts["attention_only"])


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found.float()


IDS = torch.arange(3, 27)[None]


def test_the_base_is_the_base_bit_for_bit_also_after_other_methods(bench: ModelBench, tiny_base: Path) -> None:
    bench.become("composed", 0)
    bench.become("attention_only", 0)
    plain, _ = load_base(tiny_base)
    assert torch.equal(logits(bench.become("base", 0), IDS), logits(plain, IDS))


def test_composed_is_the_model_that_a_release_loads(bench: ModelBench, tiny_base: Path, parts: dict[str, Path]) -> None:
    folders = [parts[site] for site in SITES]
    released, _ = assemble(resolve_base(str(tiny_base)), folders, parts["candidate"])
    assert torch.equal(logits(bench.become("composed", 0), IDS), logits(released, IDS))


@pytest.mark.parametrize("site", SITES)
def test_an_expert_is_what_peft_makes_of_its_folder(
    bench: ModelBench, tiny_base: Path, parts: dict[str, Path], site: str
) -> None:
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), parts[site])
    found = logits(bench.become(f"expert:{site}", 0), IDS)
    tolerance = 1e-4 if bench.become("base", 0).dtype == torch.float32 else 0.2
    assert torch.allclose(found, logits(alone, IDS), atol=tolerance, rtol=tolerance)
    assert not torch.allclose(found, logits(bench.become("base", 0), IDS), atol=tolerance, rtol=tolerance)


def test_all_methods_differ(bench: ModelBench) -> None:
    names = ("base", "composed", "uniform", "random_router", "attention_only", "expert:bank", "expert:archive")
    found = [logits(bench.become(name, 0), IDS) for name in names]
    assert not any(torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


def test_a_random_router_repeats_with_its_seed(bench: ModelBench) -> None:
    first = logits(bench.become("random_router", 5), IDS)
    assert torch.equal(first, logits(bench.become("random_router", 5), IDS))
    assert not torch.equal(first, logits(bench.become("random_router", 6), IDS))


def test_every_real_token_is_counted_once_per_layer_and_padding_never(bench: ModelBench) -> None:
    task, examples = get_task("numeric"), [*held_out("chain_sum", {}, 3), *held_out("duration", {}, 2)]
    lengths = [len(prompt_ids(bench.tokenizer, task.prompt(example.question))) for example in examples]
    assert len(set(lengths)) > 1, "without padding this test proves nothing"
    greedy_answers(bench.become("composed", 0), bench.tokenizer, task, examples, 1)
    counts = bench.routed()
    assert counts is not None and len(counts) == 2
    assert [sum(layer) for layer in counts] == [sum(lengths)] * 2
    bench.become("uniform", 0)
    assert bench.routed() is None


def test_an_unknown_method_is_a_mistake(bench: ModelBench) -> None:
    with pytest.raises(ValueError, match="no such method"):
        bench.become("magic", 0)


def test_a_whole_evaluation_of_a_tiny_model(bench: ModelBench, tmp_path: Path) -> None:
    domains = [Domain("sums", "bank", "chain_sum", {}), Domain("truth", "archive", "logic", {})]
    names = ("composed", "base", "uniform", "random_router", "attention_only", "expert:bank", "expert:archive")
    plan = Plan(domains, {name: name for name in names}, per_domain=3, max_new_tokens=3)
    found = evaluate(plan, tmp_path, lambda: bench, greedy_answers)
    assert set(found["accuracy"]) == {*names, "best_single"}
    share = found["routing"]["share"]
    assert all(sum(layer) == pytest.approx(1, abs=1e-5) for layers in share.values() for layer in layers)
