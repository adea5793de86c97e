"""What a site remembers of each call, and who may decide about it when."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from fedcompose import wire
from fedcompose.cli import main
from fedcompose.errors import ConfigError, RefusedError
from fedcompose_client import jobs
from fedcompose_client.flower import accept_call
from fedcompose_client.jobs import decide, read_job, record
from tests.flower_sim import FlowerSim


@pytest.fixture
def sim(tmp_path: Path) -> FlowerSim:
    return FlowerSim(tmp_path, sites={"site-a": "math"})


@pytest.fixture
def site(sim: FlowerSim) -> Path:
    """A site that was asked."""
    accept_call(sim.folder("site-a"), sim.call(), sim.now)
    return sim.folder("site-a")


def asked(site: Path) -> str:
    return jobs.jobs(site)[0].call.id


def test_the_states_are_those_of_the_wire() -> None:
    assert get_args(jobs.State) == wire.STATES
    assert set(jobs.STATE_AFTER.values()) == set(wire.STATES)
    assert set(jobs.STATE_AFTER) == set(get_args(jobs.Event))


@pytest.mark.parametrize(
    ("events", "decision", "allowed"),
    [
        ([], "approved", True),
        ([], "refused", True),
        (["refused"], "approved", True),
        (["refused"], "refused", False),
        (["approved"], "approved", False),
        (["approved", "started"], "approved", False),
        (["approved", "started"], "refused", True),
        (["approved", "started", "failed"], "approved", True),
        (["approved", "started", "trained"], "refused", True),
    ],
)
def test_who_may_decide_what_when(
    sim: FlowerSim, site: Path, events: list[jobs.Event], decision: jobs.Decision, allowed: bool
) -> None:
    for event in events:
        record(site, asked(site), event, sim.now)
    if allowed:
        assert decide(site, asked(site), decision, sim.now).state == decision
        return
    with pytest.raises(ConfigError) as refused:
        decide(site, asked(site), decision, sim.now)
    assert refused.value.code == "CALL_STATE"


def test_nothing_is_offered_for_a_call_that_was_refused_meanwhile(sim: FlowerSim, site: Path) -> None:
    decide(site, asked(site), "refused", sim.now)
    with pytest.raises(ConfigError) as refused:
        jobs.sign(site, asked(site), "0" * 64, sim.now)
    assert refused.value.code == "CALL_STATE"
    assert read_job(site, asked(site)).state == "refused"
    decide(site, asked(site), "approved", sim.now)
    jobs.sign(site, asked(site), "0" * 64, sim.now)
    assert read_job(site, asked(site)).offer == "0" * 64


def test_a_half_written_line_is_set_aside(sim: FlowerSim, site: Path) -> None:
    path = next((site / "calls").glob("*.jsonl"))
    path.write_bytes(path.read_bytes() + b'{"half')
    assert read_job(site, asked(site)).state == "asked"
    record(site, asked(site), "approved", sim.now)
    assert read_job(site, asked(site)).state == "approved"


def test_a_changed_line_is_noticed(sim: FlowerSim, site: Path) -> None:
    record(site, asked(site), "refused", sim.now)
    path = next((site / "calls").glob("*.jsonl"))
    path.write_bytes(path.read_bytes().replace(b'"asked"', b'"failed"'))
    with pytest.raises(RefusedError) as refused:
        read_job(site, jobs.call_path(site, path.stem).stem)
    assert refused.value.code == "LEDGER_BROKEN"


def test_approving_twice_begins_a_new_attempt(sim: FlowerSim, site: Path) -> None:
    for event in ("approved", "started", "trained", "failed", "approved"):
        record(site, asked(site), event, sim.now)  # type: ignore[arg-type]
    assert set(read_job(site, asked(site)).since_approval) == {"approved"}


def test_the_commands_decide(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, state in (("approve", "approved"), ("refuse", "refused")):
        with pytest.raises(SystemExit) as ended:
            main(["client", command, *([] if command == "approve" else [asked(site)]), "--site", str(site)])
        assert ended.value.code == 0
        assert state in capsys.readouterr().out
    assert read_job(site, asked(site)).state == "refused"
    with pytest.raises(SystemExit) as ended:
        main(["client", "approve", "--site", str(site)])
    assert ended.value.code == 2
    assert "CALL_AMBIGUOUS" in capsys.readouterr().err


def test_a_call_that_was_carried_by_hand_is_checked_and_kept(
    sim: FlowerSim, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site, brought = sim.folder("site-a"), tmp_path / "call.json"
    brought.write_bytes(sim.call())
    with pytest.raises(SystemExit) as ended:
        main(["client", "import-call", str(brought), "--site", str(site)])
    assert ended.value.code == 0
    assert jobs.jobs(site)[0].state == "asked"
    brought.write_bytes(sim.call().replace(b"payload", b"paylaod", 1))
    with pytest.raises(SystemExit) as ended:
        main(["client", "import-call", str(brought), "--site", str(site)])
    assert ended.value.code == 1


def test_what_was_signed_is_copied_and_nothing_else(
    sim: FlowerSim, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sim.fill_outbox("site-a")
    outbox, stick = sim.outbox("site-a"), tmp_path / "stick"
    (outbox / "adapter" / "data.jsonl").write_text("private")
    with pytest.raises(SystemExit) as ended:
        main(["client", "export", "math", "--out", str(stick), "--site", str(sim.folder("site-a"))])
    assert ended.value.code == 0
    (outbox / "adapter" / "data.jsonl").unlink()
    copied = {path.relative_to(stick / "site-a" / "math") for path in stick.rglob("*") if path.is_file()}
    assert copied == {path.relative_to(outbox) for path in outbox.rglob("*") if path.is_file()}
