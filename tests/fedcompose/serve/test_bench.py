"""`fedcompose bench serve`: every way to answer gets the same work, and the numbers are those of that work."""

from __future__ import annotations

import json

import pytest
import torch

from fedcompose.cli import main
from fedcompose.commands import bench
from fedcompose.serve.bench import _timing, measure_engine, questions
from fedcompose.serve.engine import Engine
from tests.federation_sim import FederationSim

TOKENS, REQUESTS = 3, 4


def test_both_ways_write_the_same_number_of_tokens_and_are_timed(
    talking_sim: FederationSim, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "TOGETHER", (1, 2))
    folder, base = str(talking_sim.coordinator_home / "release"), str(talking_sim.base.path)
    trust = ["--root-fingerprint", talking_sim.root.keyid, "--base", base]
    with pytest.raises(SystemExit) as ended:
        main(["bench", "serve", folder, *trust, "--tokens", str(TOKENS), "--requests", str(REQUESTS), "--json"])
    assert not ended.value.code
    found = json.loads(capsys.readouterr().out)
    assert [(each["how"], each["together"]) for each in found] == [
        ("fedcompose", 1), ("transformers", 1), ("fedcompose", 2), ("transformers", 2)
    ]  # fmt: skip
    for each in found:
        assert (each["requests"], each["tokens"]) == (REQUESTS, REQUESTS * TOKENS)
        assert each["tokens_per_second"] == each["tokens"] / each["seconds"]
        assert 0 < each["first_token_s"] <= each["first_token_p95_s"] < each["seconds"]
        assert 0 < each["next_token_s"] <= each["next_token_p95_s"] < each["seconds"]
        assert each["cpu_seconds"] > 0


def test_times_are_of_the_first_token_and_between_tokens() -> None:
    found = [[0.0, 2.0, 2.5], [1.0, 2.0, 4.0], [0.0, 5.0, 5.5]]
    timing = _timing("by hand", 3, found, seconds=6.0, cpu=1.0)
    assert (timing.requests, timing.tokens, timing.tokens_per_second) == (3, 6, 1.0)
    assert (timing.first_token_s, timing.first_token_p95_s) == (2.0, 5.0)
    assert (timing.next_token_s, timing.next_token_p95_s) == (0.5, 2.0)


def test_no_end_of_turn_makes_less_work_and_afterwards_it_ends_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = frozenset(range(1000))
    monkeypatch.setitem(engine.__dict__, "ends", everything)
    assert measure_engine(engine, questions(1), 1, TOKENS).tokens == TOKENS
    assert engine.ends == everything


@pytest.mark.parametrize(("asked", "expected"), [(False, torch.float32), (True, torch.bfloat16)])
def test_without_asking_nothing_is_narrower_than_float32(
    talking_sim: FederationSim, monkeypatch: pytest.MonkeyPatch, asked: bool, expected: torch.dtype
) -> None:
    """Also where bfloat16 is faster: answers must not depend on who else is being answered."""
    from fedcompose.commands.serve import load_engine
    from fedcompose.release import ReceivedRelease, verify_release

    monkeypatch.setattr("fedcompose.model.lm.fast_dtype", lambda: torch.bfloat16)
    release = verify_release(ReceivedRelease(talking_sim.coordinator_home / "release"), [talking_sim.root.keyid])
    engine = load_engine(release, str(talking_sim.base.path), asked)
    try:
        assert engine.dtype == expected
    finally:
        engine.close()
