"""One tiny base acting as every method, checked against the models it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedcompose.bases import resolve_base
from fedcompose.files import write_json
from fedcompose.model.composed import ATTENTION_TARGETS, assemble
from fedcompose.model.controls import SequenceRouter
from fedcompose.model.learned import PromptRouter, save_router
from fedcompose.model.lm import load_base, prompt_ids
from fedcompose.model.router import RoutingDecision
from fedcompose.model.scorers import LinearScorer
from fedcompose_coordinator.bench import TOGETHER, ModelBench, RoutedTally
from fedcompose_coordinator.evaluation import Plan, summarise
from fedcompose_coordinator.grid import Method, fill
from fedcompose_coordinator.questions import Domain, Prompt
from tests.tiny_experts import make_tiny_expert, make_tiny_router

SITES = ("bank", "archive")
IDS = torch.arange(3, 27)[None]
PROMPTS = [Prompt("What is 3 + 4?", "bank"), Prompt("Is 3 a prime number, or is it not?", "archive")]


@pytest.fixture(scope="module")
def parts(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bench")
    for seed, site in enumerate(SITES):
        make_tiny_expert(tiny_base, root / site, seed=seed)
    make_tiny_expert(tiny_base, root / "merged" / "merged", seed=5)
    for number, name in enumerate(("candidate", "attention_only")):
        make_tiny_expert(tiny_base, root / name / "attention", seed=7 + number, target_modules=list(ATTENTION_TARGETS))
    save_router(root / "candidate" / "router.safetensors", make_tiny_router(len(SITES), seed=3))
    per_prompt = {"granularity": "prompt", "bias": True}
    classifier = LinearScorer((32,), len(SITES), 4, bias=True)
    (root / "prompt").mkdir()
    save_router(root / "prompt" / "router.safetensors", PromptRouter(classifier))
    for name, router in (("candidate", {}), ("attention_only", None), ("prompt", per_prompt), ("merged", None)):
        write_json(root / name / "composition.json", {"router": router})
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def bench(tiny_base: Path, parts: dict[str, Path]) -> ModelBench:
    return ModelBench({site: parts[site] for site in SITES}, resolve_base(str(tiny_base)))


@pytest.fixture
def methods(parts: dict[str, Path]) -> dict[str, Method]:
    candidate, control = parts["candidate"], parts["attention_only"]
    found = {
        "composed": Method("learned", "", candidate, candidate),
        "composed, no attention LoRA": Method("learned", "", candidate),
        "attention_only": Method("none", "", candidate, control),
        "merged": Method("learned", "", parts["merged"]),
        "prompt": Method("learned", "", parts["prompt"]),
    }
    routers = ("none", "uniform", "random", "oracle", "expert:bank", "expert:archive")
    return found | {name: Method(name, "", candidate) for name in routers}


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found.float()


def test_the_base_is_the_base_bit_for_bit_also_after_other_methods(
    bench: ModelBench, methods: dict[str, Method], tiny_base: Path
) -> None:
    for name in ("composed", "attention_only"):
        bench.become(methods[name])
    plain, _ = load_base(tiny_base)
    assert torch.equal(logits(bench.become(methods["none"]), IDS), logits(plain, IDS))


def test_composed_is_the_model_that_a_release_loads(
    bench: ModelBench, methods: dict[str, Method], tiny_base: Path, parts: dict[str, Path]
) -> None:
    folders = [parts[site] for site in SITES]
    released, _ = assemble(resolve_base(str(tiny_base)), folders, parts["candidate"])
    assert torch.equal(logits(bench.become(methods["composed"]), IDS), logits(released, IDS))


@pytest.mark.parametrize(("name", "folder"), [("expert:bank", "bank"), ("expert:archive", "archive"), ("merged", "")])
def test_an_expert_or_a_merge_is_what_peft_makes_of_its_folder(
    bench: ModelBench, methods: dict[str, Method], tiny_base: Path, parts: dict[str, Path], name: str, folder: str
) -> None:
    path = parts[folder] if folder else parts["merged"] / "merged"
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), path)
    found = logits(bench.become(methods[name]), IDS)
    tolerance = 1e-4 if bench.become(methods["none"]).dtype == torch.float32 else 0.2
    assert torch.allclose(found, logits(alone, IDS), atol=tolerance, rtol=tolerance)
    assert not torch.allclose(found, logits(bench.become(methods["none"]), IDS), atol=tolerance, rtol=tolerance)


def test_all_methods_that_decide_by_token_differ(bench: ModelBench, methods: dict[str, Method]) -> None:
    apart = [method for name, method in methods.items() if name not in ("oracle", "prompt")]
    found = [logits(bench.become(method), IDS) for method in apart]
    assert not any(torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


def test_a_random_router_repeats_with_its_seed(bench: ModelBench, parts: dict[str, Path]) -> None:
    first, again, other = (
        logits(bench.become(Method("random", "", parts["candidate"], seed=seed)), IDS) for seed in (5, 5, 6)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_oracle_lets_each_prompts_own_expert_speak(bench: ModelBench, methods: dict[str, Method]) -> None:
    alone = {}
    for site in SITES:
        bench.become(methods[f"expert:{site}"])
        alone[site] = bench.ask(PROMPTS, 6)
    bench.become(methods["oracle"])
    assert bench.ask(PROMPTS, 6) == [alone["bank"][0], alone["archive"][1]]
    assert alone["bank"] != alone["archive"]
    counts = bench.routed()["routed"]
    assert all(min(layer) > 0 for layer in counts)


def test_a_classifier_of_prompts_lets_one_expert_answer_the_whole_prompt(
    bench: ModelBench, methods: dict[str, Method]
) -> None:
    model = bench.become(methods["prompt"])
    found = bench.ask(PROMPTS[:1], 4)
    ids = torch.tensor([prompt_ids(bench.tokenizer, PROMPTS[0].text)])
    embedded = model.get_input_embeddings()(ids)
    (expert,) = bench.router.choose(embedded, torch.ones(ids.shape))
    counts = bench.routed()["routed"]
    assert all(layer[1 - expert] == 0 < layer[expert] for layer in counts)
    bench.become(methods[f"expert:{SITES[expert]}"])
    assert bench.ask(PROMPTS[:1], 4) == found


def test_every_real_token_is_counted_once_per_layer_and_padding_never(
    bench: ModelBench, methods: dict[str, Method]
) -> None:
    bench.become(methods["composed"])
    lengths = [len(prompt_ids(bench.tokenizer, prompt.text)) for prompt in PROMPTS]
    assert len(set(lengths)) > 1, "without padding this test proves nothing"
    bench.ask(PROMPTS, 1)
    assert [sum(layer) for layer in bench.routed()["routed"]] == [sum(lengths)] * 2
    bench.become(methods["uniform"])
    bench.ask(PROMPTS, 1)
    assert bench.routed()["routed"] is None


def test_distinct_experts_are_those_of_eight_rows_that_decode_together() -> None:
    tally = RoutedTally(points=1, experts=4)
    router = SequenceRouter([0] * TOGETHER + [0, 1, 2, 2, 2, 2, 2, 2] + [3], 4)
    step = router(torch.zeros(2 * TOGETHER + 1, 1, 8), 0)
    tally.add([step], None)
    assert tally.mean_distinct() == pytest.approx((1 + 3) / 2), "the row left over belongs to no group of eight"
    few = RoutingDecision(step.weights[:3], step.choice[:3])
    lonely = RoutedTally(1, 4)
    lonely.add([few], None)
    assert lonely.mean_distinct() is None


def test_what_a_method_holds_in_memory(bench: ModelBench, methods: dict[str, Method]) -> None:
    held = {}
    for name in ("none", "expert:bank", "composed"):
        bench.become(methods[name])
        held[name] = bench.routed()["held"]
    one = held["expert:bank"] - held["none"]
    assert held["none"] > 0 and one > 0
    assert held["composed"] - held["none"] == 2 * one + 4 * 2 * 32  # the router is float32


def test_an_unknown_router_is_a_mistake(bench: ModelBench) -> None:
    with pytest.raises(ValueError, match="no such router"):
        bench.become(Method("magic", ""))


def test_a_whole_evaluation_of_a_tiny_model(bench: ModelBench, methods: dict[str, Method], tmp_path: Path) -> None:
    domains = [Domain("sums", "bank", "chain_sum", {}, 3), Domain("truth", "archive", "logic", {}, 3)]
    named = {
        "composed": methods["composed"], "base": methods["none"], "uniform": methods["uniform"],
        "random_router": methods["random"], "attention_only": methods["attention_only"],
        **{f"expert:{site}": methods[f"expert:{site}"] for site in SITES},
    }  # fmt: skip
    plan = Plan({name: Method(m.router, name, m.candidate, m.attention) for name, m in named.items()}, domains, 3)
    fill(plan.cells(), tmp_path, lambda: bench)
    found = summarise(plan, tmp_path)
    assert set(found["accuracy"]) == {*named, "best_single"}
    share = found["routing"]["share"]
    assert all(sum(layer) == pytest.approx(1, abs=1e-5) for layers in share.values() for layer in layers)
