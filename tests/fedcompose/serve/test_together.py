"""Many answers at once: each is what it is alone, whoever else is answered and whom they force to speak."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedcompose.bases import resolve_base
from fedcompose.errors import ConfigError, MissingError, RefusedError
from fedcompose.model.lm import load_base
from fedcompose.release import VerifiedRelease
from fedcompose.serve import batching, sequential
from fedcompose.serve.engine import Engine, Pin, Settings
from fedcompose.serve.sampling import Sampling
from fedcompose.serve.writing import Answer, Job, Writing
from tests.federation_sim import FederationSim

LONG = "All the same beginning, longer than a page of the cache. " * 2
REQUESTS = [
    (prompt, Settings(model, max_tokens=12, **more))
    for prompt in ("Hello you", LONG, LONG + "x")
    for model, more in (
        ("auto", {}),
        ("expert:site-a", {}),
        ("expert:site-b", {}),
        ("site-b", {"temperature": 1.0, "seed": 5, "top_p": 0.9}),
        ("base", {}),
        ("auto", {"force": "site-a"}),
        ("auto", {"pins": (Pin("site-b", 0, 0),)}),
        ("expert:site-b", {"pins": (Pin("site-a", 1, 1),)}),
        ("auto", {"temperature": 1.0, "seed": 7}),
    )
]

Said = tuple[str, tuple[tuple[int, ...], ...]]


def ask(engine: Engine, prompt: str, settings: Settings) -> Future[Answer]:
    return engine.submit(engine.prepare([{"role": "user", "content": prompt}], settings))


def said(answer: Future[Answer]) -> Said:
    done = answer.result(timeout=60)
    return done.text, tuple(token.layers for token in done.tokens)


@pytest.fixture(scope="module")
def alone(engine: Engine) -> list[Said]:
    return [said(ask(engine, *request)) for request in REQUESTS]


def mixed(engine: Engine, seed: int, count: int = 40) -> Iterator[tuple[int, Said]]:
    """What is said to requests of all kinds at the same time."""
    picked = random.Random(seed).choices(range(len(REQUESTS)), k=count)
    answers = [ask(engine, *REQUESTS[number]) for number in picked]
    for number, answer in zip(picked, answers, strict=True):
        yield number, said(answer)


@pytest.mark.parametrize("seed", range(3))
def test_nobody_notices_who_else_is_answered(engine: Engine, alone: list[Said], seed: int) -> None:
    assert all(told == alone[number] for number, told in mixed(engine, seed))


def test_what_is_forced_is_what_speaks(engine: Engine, alone: list[Said]) -> None:
    routes = {number: set(told[1]) for number, told in enumerate(alone)}

    assert routes[1] == routes[5] == {(0, 0)}
    assert routes[2] == routes[3] == {(1, 1)}
    assert routes[4] == {()}
    assert {rows[0] for rows in routes[6]} == {1}
    assert routes[7] == {(1, 0)}
    assert {row for rows in routes[0] for row in rows} == {0, 1}, "auto that never changes would not show a leak"
    assert len({told[0] for told in alone[:3]}) == 3


def test_a_neighbours_wish_would_be_noticed(engine: Engine, alone: list[Said], monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: each row of a step is given the wish of the row before it."""
    original = batching.Worker._wish

    def shifted(worker: batching.Worker, row: Any) -> Any:
        rows = worker._rows
        return original(worker, rows[rows.index(row) - 1])

    monkeypatch.setattr(batching.Worker, "_wish", shifted)
    assert any(told != alone[number] for number, told in mixed(engine, 0))


def test_a_shared_cache_would_be_noticed(engine: Engine, alone: list[Said]) -> None:
    """The control: equal prompts share their pages, whoever was forced to read them."""
    allocators = engine._worker._processor.cache.cache_allocators.values()
    cache = engine._worker._processor.cache
    assert not cache.use_prefix_sharing
    for allocator in allocators:
        allocator.use_block_sharing = True
    cache.use_prefix_sharing = cache.allow_block_sharing = True
    try:
        told = [said(ask(engine, *REQUESTS[number])) for number in (10, 11)]
    finally:
        cache.use_prefix_sharing = cache.allow_block_sharing = False
        for allocator in allocators:
            allocator.use_block_sharing = False
        cache.evict_cached_blocks()
    assert told != [alone[10], alone[11]]


def test_one_at_a_time_says_the_same(release: VerifiedRelease, talking_sim: FederationSim, alone: list[Said]) -> None:
    """What `generate` writes for the models that cannot be answered together."""
    slow = Engine(release, talking_sim.base, torch.float32, together=False)
    try:
        assert [said(ask(slow, *request)) for request in REQUESTS[:9]] == alone[:9]
    finally:
        slow.close()


@pytest.mark.parametrize(
    ("choices", "most"), [([[0, 0, 0], [2, 0, 2]], 2), ([[1], [0]], 1), ([[-1, -1], [-1, -1]], 1), ([[5, -1, 0]], 3)]
)
def test_the_experts_of_a_step_are_those_of_its_busiest_point(choices: list[list[int]], most: int) -> None:
    assert batching._distinct(torch.tensor(choices)) == most


def test_the_cache_is_empty_when_all_is_said(engine: Engine) -> None:
    answers = [ask(engine, *REQUESTS[number % len(REQUESTS)]) for number in range(30)]
    jobs = [engine.prepare([{"role": "user", "content": LONG}], Settings(max_tokens=300)) for _ in range(10)]
    answers += [engine.submit(job) for job in jobs]
    for job in jobs[::2]:
        job.cancel()
    engine.cancel_all()
    wait(answers, timeout=60)
    assert {answer.result().finish for answer in answers} >= {"cancelled"}
    said(ask(engine, "one more step, in which pages are freed", Settings(max_tokens=3)))
    said(ask(engine, "and another", Settings(max_tokens=1)))
    assert engine.waiting == 0
    assert engine.cache_free > 0.99


def test_a_cache_that_ran_full_is_open_again_when_answers_ended_early(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "CACHED_TOKENS", 0)
    model, _ = load_base(tiny_base, torch.float32)
    worker = batching.Worker(model, None, 128)
    blocked: list[bool] = []
    model.register_forward_pre_hook(lambda *_: blocked.append(worker._processor.scheduler.block_new_requests))

    def start(number: int) -> Writing:
        job = Job([5 + number] * 20, 100, Sampling(), ("x" * 60,), None)
        writing = Writing(job, (), frozenset(), lambda tokens: "x" * len(tokens), None)
        worker.submit(writing)
        return writing

    try:
        writings = [start(number) for number in range(4)]  # each fits, all together do not
        assert {writing.answer.result(timeout=60).finish for writing in writings} == {"stop"}
        assert any(blocked), "a cache that is never full shows nothing"
        assert start(4).answer.result(timeout=60).finish == "stop"
    finally:
        worker.close()


def test_who_is_cancelled_before_the_manager_knows_of_him_is_cancelled_when_it_does(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manager empties its queue of requests first: a request and its end can come between that and the other."""
    manager, lost = engine._worker._manager, []
    cancel = manager.cancel_request
    monkeypatch.setattr(manager, "cancel_request", lambda name: cancel(name) if lost else lost.append(name))
    job = engine.prepare([{"role": "user", "content": "Hello"}], Settings(max_tokens=400))
    answer = engine.submit(job)
    job.cancel()
    assert answer.result(timeout=60).finish == "cancelled"
    requests = engine._worker._processor.scheduler
    said(ask(engine, "some steps, in which it may be noticed", Settings(max_tokens=8)))
    assert lost and not set(lost) & (requests.active_requests.keys() | requests.waiting_requests.keys())


def test_a_prompt_longer_than_a_step_is_read_in_parts(engine: Engine) -> None:
    long = "y" * (engine.context - 40)
    both = [ask(engine, long, Settings(max_tokens=4)) for _ in range(3)]
    assert len({said(answer) for answer in both}) == 1


def test_what_cannot_fit_is_not_routed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router of prompts would take all of it into memory."""
    monkeypatch.setattr(engine, "_wish", lambda *_: pytest.fail("routed"))
    with pytest.raises(ConfigError) as caught:
        engine.prepare_text("x" * engine.context, Settings(max_tokens=1))
    assert caught.value.code == "CONTEXT_LENGTH_EXCEEDED"


def test_what_cannot_fit_is_not_even_read(engine: Engine) -> None:
    longest = max(engine._tokenizer.get_vocab(), key=len)
    for text in (longest * engine.context, longest * engine.context + "x"):
        with pytest.raises(ConfigError) as caught:
            engine.prepare_text(text, Settings(max_tokens=1))
        assert caught.value.code == "CONTEXT_LENGTH_EXCEEDED"
        assert ("characters" in str(caught.value.got)) is text.endswith("x")


@pytest.mark.parametrize(
    "settings",
    [
        Settings("base", force="site-a"),
        Settings(force="nobody"),
        Settings(pins=(Pin("site-a", 1, 0),)),
        Settings(pins=(Pin("site-a", 0, 2),)),
    ],
)
def test_a_wish_that_cannot_be_is_refused(engine: Engine, settings: Settings) -> None:
    with pytest.raises(ConfigError) as caught:
        ask(engine, "hi", settings)
    assert caught.value.code == "PIN_INVALID"


def test_a_masked_expert_never_speaks_again(release: VerifiedRelease, talking_sim: FederationSim) -> None:
    engine = Engine(release, talking_sim.base, torch.float32)
    try:
        both = said(ask(engine, "Hello you", Settings(max_tokens=12)))[1]
        early = engine.prepare([{"role": "user", "content": "Hello you"}], Settings("site-a"))
        under_way = ask(engine, "Hello you", Settings("site-b", max_tokens=400))
        engine.mask({"site-a"})
        assert under_way.result(timeout=60).finish == "cancelled"
        with pytest.raises(ConfigError, match="no such model"):
            engine.submit(early)
        under_way = ask(engine, "Hello you", Settings("site-b", max_tokens=60))
        engine.mask({"site-a"})
        assert under_way.result(timeout=60).finish != "cancelled", "a judgement that changes nothing ends nothing"
        left = said(ask(engine, "Hello you", Settings(max_tokens=12)))[1]
        assert {row for rows in both for row in rows} == {0, 1}
        assert {row for rows in left for row in rows} == {1}
        for settings, code in ((Settings("site-a"), "MODEL_NOT_FOUND"), (Settings(force="site-a"), "PIN_INVALID")):
            with pytest.raises(ConfigError) as caught:
                ask(engine, "hi", settings)
            assert caught.value.code == code
        with pytest.raises(RefusedError) as refused:
            engine.mask({"site-a", "site-b"})
        assert refused.value.code == "EXPERT_UNMASKABLE"
        engine.mask(())
        assert said(ask(engine, "Hello you", Settings(max_tokens=12)))[1] == both
    finally:
        engine.close()


def test_what_was_prepared_before_the_release_was_refused_is_not_answered(engine: Engine) -> None:
    early = engine.prepare([{"role": "user", "content": "Hello you"}], Settings(max_tokens=4))
    under_way = ask(engine, "Hello you", Settings(max_tokens=400))
    engine.refuse("USE_EXPIRED")
    try:
        assert under_way.result(timeout=60).finish == "cancelled"
        for job in (early, replace(early, wish=None)):
            with pytest.raises(RefusedError) as caught:
                engine.submit(job)
            assert caught.value.code == "USE_EXPIRED"
    finally:
        engine.mask(())
    assert engine.submit(early).result(timeout=60).finish == "length"


@pytest.mark.parametrize(("estimator", "masks"), [("hard", True), ("sampled", False), ("identity", False)])
def test_who_always_speaks_cannot_be_masked(
    engine: Engine, release: VerifiedRelease, monkeypatch: pytest.MonkeyPatch, estimator: str, masks: bool
) -> None:
    router = {"estimator": estimator, "top_k": 2 if estimator == "sampled" else None}
    router |= {"scorer": "static"} if estimator == "identity" else {}
    other = {**release.composition, "router": {**release.composition["router"], **router}}
    monkeypatch.setattr(engine, "release", replace(release, composition=other))
    try:
        with nullcontext() if masks else pytest.raises(RefusedError, match="cannot answer without"):
            engine.mask({"site-a"})
        assert engine.masked == ({"site-a"} if masks else set())
    finally:
        engine.mask(())


def test_an_engine_that_died_says_so(release: VerifiedRelease, talking_sim: FederationSim) -> None:
    engine = Engine(release, talking_sim.base, torch.float32)
    try:
        assert engine.alive

        def fail(*_: Any) -> None:
            raise RuntimeError("out of memory")

        engine._model.register_forward_pre_hook(fail)
        for _ in range(2):  # the second may be refused at once, or taken and lost
            with pytest.raises(MissingError) as caught:
                ask(engine, "Hello", Settings(max_tokens=4)).result(timeout=60)
            assert caught.value.code == "ENGINE_DEAD"
        assert not engine.alive
        with pytest.raises(MissingError):
            ask(engine, "Hello", Settings())
    finally:
        engine.close()


def test_a_base_that_was_changed_since_the_start_is_not_loaded(
    release: VerifiedRelease, talking_sim: FederationSim, tmp_path: Path
) -> None:
    base = resolve_base(shutil.copytree(talking_sim.base.path, tmp_path / "base"))
    engine = Engine(release, base, torch.float32)
    try:
        config = base.path / "generation_config.json"
        config.write_text(config.read_text() + "\n")
        with pytest.raises(RefusedError) as caught:
            ask(engine, "Hello", Settings("base", max_tokens=1))
        assert caught.value.code == "BASE_MISMATCH"
        assert said(ask(engine, "Hello", Settings(max_tokens=1)))
    finally:
        engine.close()


def test_a_model_that_cannot_be_answered_together_is_answered_one_at_a_time(
    release: VerifiedRelease, talking_sim: FederationSim, alone: list[Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found out at the start, by a token, and not by whoever asks first."""

    def fail(*_: Any) -> None:
        raise RuntimeError("this attention does not read pages")

    monkeypatch.setattr(batching.Worker, "_sample", fail)
    engine = Engine(release, talking_sim.base, torch.float32)
    try:
        assert isinstance(engine._worker, sequential.Worker)
        assert said(ask(engine, *REQUESTS[0])) == alone[0]
    finally:
        engine.close()
