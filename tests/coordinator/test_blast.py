"""An expert that was never asked leaves no trace in an answer, and neither do the other prompts of a batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedcompose.bases import resolve_base
from fedcompose.files import write_json
from fedcompose.model.learned import save_router
from fedcompose_coordinator import blast
from fedcompose_coordinator.bench import ModelBench
from fedcompose_coordinator.blast import Reading, blast_radius, read_alone, sequences
from fedcompose_coordinator.grid import Method
from fedcompose_coordinator.questions import Domain
from tests.tiny_experts import make_tiny_expert, make_tiny_router

SITES = ("bank", "archive", "clinic")
DOMAINS = [Domain("sums", "bank", "chain_sum", {}, 10), Domain("truth", "archive", "logic", {}, 10)]
NEVER = 2  # the expert that the router below never asks


@pytest.fixture(scope="module")
def bench(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelBench:
    root = tmp_path_factory.mktemp("experts")
    experts = {site: make_tiny_expert(tiny_base, root / site, seed=seed) for seed, site in enumerate(SITES)}
    return ModelBench(experts, resolve_base(str(tiny_base)))


def candidate(folder: Path, **router: str) -> Method:
    """Two experts share the tokens; the score of the third is always between theirs, so it is never asked."""
    weights = make_tiny_router(len(SITES), seed=3)
    rows = weights.scorer.weights[0].data
    rows[NEVER] = (rows[0] + rows[1]) / 2
    save_router(folder / "router.safetensors", weights)
    experts = [{"site": site, "domain": site, "dirHash": site} for site in SITES]
    write_json(
        folder / "composition.json", {"method": "hard", "router": {"scorer": "linear", **router}, "experts": experts}
    )
    return Method("learned", "", folder)


def read_all(bench: ModelBench, method: Method) -> list[Reading]:
    model = bench.become(method)
    return [read_alone(model, ids) for ids in sequences(bench.tokenizer, DOMAINS)]


def test_an_expert_that_was_never_asked_can_be_deleted_bit_for_bit(bench: ModelBench, tmp_path: Path) -> None:
    found = blast_radius(candidate(tmp_path), bench, DOMAINS)
    assert found and found["sequences"] == 2 * blast.PER_DOMAIN
    assert found["never_asked"] >= found["sequences"] and found["same_without"] == found["never_asked"]


def test_an_answer_does_not_depend_on_the_other_prompts(bench: ModelBench, tmp_path: Path) -> None:
    found = blast_radius(candidate(tmp_path), bench, DOMAINS)
    assert found and found["same_tokens"] == found["tokens"] > 100


def test_deleting_an_expert_that_was_asked_is_noticed(bench: ModelBench, tmp_path: Path) -> None:
    method = candidate(tmp_path)
    asked = [reading for reading in read_all(bench, method) if 0 in reading.asked]
    assert asked and blast.same_without(SITES[0], asked, method, bench) == 0


def test_prompts_that_leak_into_one_another_are_noticed(bench: ModelBench, tmp_path: Path) -> None:
    method = candidate(tmp_path)
    readings = [replace(each, logits=torch.roll(each.logits, 1, -1)) for each in read_all(bench, method)]
    assert blast.same_together(bench.become(method), readings, 0) < sum(len(each.ids) for each in readings)


def test_where_all_experts_are_mixed_nobody_is_spared(bench: ModelBench, tmp_path: Path) -> None:
    found = blast_radius(candidate(tmp_path, estimator="soft"), bench, DOMAINS)
    assert found and found["never_asked"] == 0


def test_a_router_of_whole_prompts_has_nothing_to_show(bench: ModelBench, tmp_path: Path) -> None:
    assert blast_radius(candidate(tmp_path, granularity="prompt"), bench, DOMAINS) is None
