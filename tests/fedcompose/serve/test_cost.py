"""What answering together saves, and what telling who speaks costs. Processor time: other processes do not count."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch

from fedcompose.model.controls import PinnedRouter
from fedcompose.model.experts import load_expert
from fedcompose.model.lm import load_base
from fedcompose.model.placement import compose_model
from fedcompose.model.router import NO_EXPERT
from fedcompose.serve.batching import Worker
from fedcompose.serve.sampling import Sampling
from fedcompose.serve.writing import Job, Writing
from tests.tiny import make_tiny_base
from tests.tiny_experts import make_tiny_expert, make_tiny_router

pytestmark = pytest.mark.slow

LAYERS = 8
TOKENS = 24


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A model whose weights do not fit into a processor's cache, as those of real ones do not."""
    folder = tmp_path_factory.mktemp("cost")
    base = make_tiny_base(folder / "base", layers=LAYERS, hidden=768)
    experts = [load_expert(make_tiny_expert(base, folder / str(seed), seed=seed)) for seed in range(3)]
    model, _ = load_base(base, torch.float32)
    compose_model(model, experts, make_tiny_router(3, hidden=768))
    worker = Worker(model, PinnedRouter(model.routing.router, 3), 512)
    yield worker
    worker.close()


def start(worker: Worker, number: int) -> Writing:
    job = Job([5 + number] * 20, TOKENS, Sampling(), (), (NO_EXPERT,) * LAYERS)
    writing = Writing(job, ("a", "b", "c"), frozenset(), lambda tokens: "x" * len(tokens), None)
    worker.submit(writing)
    return writing


def together(worker: Worker) -> None:
    for writing in [start(worker, number) for number in range(8)]:
        writing.answer.result(timeout=120)


def in_turn(worker: Worker) -> None:
    for number in range(8):
        start(worker, number).answer.result(timeout=120)


def seconds(act: Callable[[Worker], None], worker: Worker) -> float:
    start = time.process_time()
    act(worker)
    return time.process_time() - start


def test_eight_together_cost_at_most_half_of_eight_in_turn(worker: Worker) -> None:
    together(worker)
    pairs = [(seconds(together, worker), seconds(in_turn, worker)) for _ in range(3)]
    assert min(each for each, _ in pairs) <= 0.5 * min(each for _, each in pairs)


def test_telling_who_speaks_costs_little(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is that of the claim, 5 %, and as much again for what the clock makes of equal work."""
    silent: list[float] = []
    told: list[float] = []
    routing = worker._model.routing
    together(worker)
    for _ in range(6):
        told.append(seconds(together, worker))
        with monkeypatch.context() as patch:
            patch.setattr(routing, "_record", None)
            patch.setattr(worker, "_routes", lambda tokens: (worker._router.unpin(), [[0] * LAYERS for _ in tokens])[1])
            silent.append(seconds(together, worker))
    assert min(told) <= 1.10 * min(silent)
