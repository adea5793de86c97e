"""What the coordinator's ledger says, who notices when it was tampered with, and the clock."""

from __future__ import annotations

import json
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from fedcompose import ledger
from fedcompose.call import make_call, read_own_call
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.files import write_atomic
from fedcompose.ledger import Entry
from fedcompose_coordinator import commands_ledger
from fedcompose_coordinator.decisions import CLOCK_TOLERANCE, deciding, held_heads
from tests.federation_sim import FederationSim


def entries(sim: FederationSim) -> list[Entry]:
    return ledger.verify(sim.coordinator_home / "ledger.jsonl")


def call(sim: FederationSim, nonce: bytes = b"1" * 32) -> None:
    """As `fedcompose coordinator call` does."""
    with deciding(sim.coordinator_home, sim.now) as decisions:
        envelope = make_call(
            sim.federation, sim.coordinator, "tiny", ["adapter"], deadline=sim.now + timedelta(days=1), now=sim.now,
            nonce=nonce, ledger=decisions.head,
        )  # fmt: skip
        made = read_own_call(envelope)
        decisions.record("called", call=made.id, sha256=made.digest)
        write_atomic(sim.coordinator_home / "calls" / f"{made.id}.json", envelope)


def refusal(sim: FederationSim) -> RefusedError:
    """What every command that decides something says now."""
    with pytest.raises(RefusedError) as caught:
        sim.receive()
    return caught.value


@pytest.fixture
def busy(sim: FederationSim) -> FederationSim:
    """A coordinator that has admitted two adapters, and then made a call."""
    for site in sim.sites:
        sim.receive(sim.contribute(site)[0].path)
    call(sim)
    return sim


def test_every_decision_is_a_line(sim: FederationSim) -> None:
    adapter, _ = sim.contribute("site-a")
    sim.receive(adapter.path)
    received, admitted = entries(sim)
    assert received.event == "received" and received.at == sim.now
    assert dict(received.fields) == {
        "contribution": adapter.dir_hash,
        "site": "site-a",
        "domain": "clock",
        "kind": "adapter",
        "sequence": adapter.provenance.sequence,
        "key": adapter.keyid,
        "bytes": sum(path.stat().st_size for path in adapter.path.iterdir()),
    }
    assert (admitted.event, dict(admitted.fields)) == ("admitted", {"contribution": adapter.dir_hash})


def test_a_refusal_is_a_line_without_a_word_of_the_site(sim: FederationSim) -> None:
    adapter, _ = sim.contribute("site-a")
    document = json.loads((adapter.path / "adapter_config.json").read_bytes()) | {"canary-4711": "canary-4711"}
    (adapter.path / "adapter_config.json").write_text(json.dumps(document))
    write_atomic(adapter.path / "canary-4711", b"canary-4711")
    sim.receive(adapter.path)
    (refused,) = entries(sim)
    assert (refused.event, refused.fields["code"]) == ("refused", "FILE_UNEXPECTED")
    assert b"canary" not in (sim.coordinator_home / "ledger.jsonl").read_bytes()


def test_the_site_is_known_to_a_refusal_only_by_the_digest_of_what_came(sim: FederationSim) -> None:
    adapter, _ = sim.contribute("site-a")
    (adapter.path / "README.md").write_text("unsigned")
    kept = sim.receive(adapter.path)[0].kept
    (refused,) = entries(sim)
    assert kept is not None and kept.name.endswith(refused.fields["contribution"][:16])


def test_receiving_what_is_known_decides_nothing(busy: FederationSim) -> None:
    before = entries(busy)
    busy.receive(busy.sites["site-a"].outbox / "adapter")
    assert entries(busy) == before


def test_an_old_state_file_brings_nothing_back(sim: FederationSim, tmp_path: Path) -> None:
    """The ledger is the record; a state file from a backup cannot make the coordinator forget."""
    sim.receive(sim.contribute("site-a")[0].path)
    shutil.copy(sim.coordinator_home / "state.json", tmp_path)
    old = sim.sites["site-a"].outbox / "adapter"
    shutil.copytree(old, tmp_path / "old")
    sim.receive(sim.contribute("site-a")[0].path)
    newest = [each.dir_hash for each in sim.admitted()]
    shutil.copy(tmp_path / "state.json", sim.coordinator_home)
    assert sim.receive(tmp_path / "old")[0].outcome == "already admitted"
    assert [each.dir_hash for each in sim.admitted()] == newest
    (sim.coordinator_home / "state.json").unlink()
    assert [each.dir_hash for each in sim.admitted()] == newest


# Tampering ----------------------------------------------------------------------------------------


def rewritten(sim: FederationSim, keep: int) -> None:
    """The ledger up to an entry, and from there on another story, well chained."""
    path = sim.coordinator_home / "ledger.jsonl"
    total, kept = len(entries(sim)), path.read_bytes().splitlines(keepends=True)[:keep]
    path.write_bytes(b"".join(kept))
    for _ in range(total - keep):
        ledger.append(path, "refused", sim.now, contribution="0" * 64, code="OTHER")


def cut(sim: FederationSim, keep: int) -> None:
    path = sim.coordinator_home / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:keep]))


def edited(sim: FederationSim, line: int) -> None:
    path = sim.coordinator_home / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line - 1] = lines[line - 1].replace(b'"sequence":1', b'"sequence":2')
    path.write_bytes(b"".join(lines))


def test_the_untouched_ledger_is_no_obstacle(busy: FederationSim) -> None:
    assert busy.receive()[0].outcome == "already admitted"


def test_a_changed_entry_stops_every_decision(busy: FederationSim) -> None:
    edited(busy, 3)
    error = refusal(busy)
    assert (error.code, "entry 3" in error.what) == ("LEDGER_BROKEN", True)
    with pytest.raises(RefusedError):
        busy.admitted()


def test_a_ledger_without_its_end_stops_every_decision(busy: FederationSim) -> None:
    cut(busy, 3)
    error = refusal(busy)
    assert (error.code, "entry 4 is missing" in error.what) == ("LEDGER_TRUNCATED", True)


def test_a_ledger_that_was_written_anew_stops_every_decision(busy: FederationSim) -> None:
    rewritten(busy, 2)
    assert refusal(busy).code == "LEDGER_FORKED"


@pytest.mark.parametrize("tamper", [cut, rewritten])
def test_the_state_file_tells_where_no_call_was_made(busy: FederationSim, tamper: Any) -> None:
    shutil.rmtree(busy.coordinator_home / "calls")
    tamper(busy, 2)
    assert "state.json" in (refusal(busy).expected or "")


@pytest.mark.parametrize("tamper", [cut, rewritten])
def test_the_calls_tell_where_the_state_file_is_gone_too(busy: FederationSim, tamper: Any) -> None:
    tamper(busy, 2)
    (busy.coordinator_home / "state.json").unlink()
    error = refusal(busy)
    assert error.code in ("LEDGER_TRUNCATED", "LEDGER_FORKED")
    assert "by call" in (error.expected or "")


def test_nothing_here_tells_where_calls_and_state_are_gone_too(busy: FederationSim) -> None:
    """Then only what others hold can: see the command."""
    known = f"{len(entries(busy))}:{entries(busy)[-1].sha256}"
    cut(busy, 2)
    shutil.rmtree(busy.coordinator_home / "calls")
    (busy.coordinator_home / "state.json").unlink()
    assert busy.receive()[0].outcome == "already admitted"
    assert command(busy, "verify")[0] == 0
    with pytest.raises(RefusedError) as caught:
        command(busy, "verify", "--head", known)
    assert caught.value.code in ("LEDGER_TRUNCATED", "LEDGER_FORKED")


def test_an_admission_of_what_was_never_received_is_no_decision(sim: FederationSim) -> None:
    ledger.append(sim.coordinator_home / "ledger.jsonl", "admitted", sim.now, contribution="0" * 64)
    assert refusal(sim).code == "LEDGER_BROKEN"


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"schema": "fedcompose/intake/v1", "admitted": {}}'])
def test_a_state_file_that_cannot_be_read_is_no_clean_start(busy: FederationSim, content: bytes) -> None:
    (busy.coordinator_home / "state.json").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        busy.receive()
    assert caught.value.code == "STATE_INVALID"


# The clock ----------------------------------------------------------------------------------------


def test_a_clock_that_was_set_back_is_noticed(busy: FederationSim) -> None:
    later = busy.now
    busy.now = later - CLOCK_TOLERANCE - timedelta(seconds=1)
    before = (busy.coordinator_home / "ledger.jsonl").read_bytes()
    error = refusal(busy)
    assert error.code == "CLOCK_SET_BACK"
    assert f"{later:%Y-%m-%dT%H:%M:%SZ}" in (error.expected or "")
    assert (busy.coordinator_home / "ledger.jsonl").read_bytes() == before


def test_a_clock_may_be_set_right_by_a_little(busy: FederationSim) -> None:
    busy.now -= CLOCK_TOLERANCE
    assert busy.receive(busy.contribute("site-a")[0].path)[0].outcome == "admitted"


def test_the_latest_time_is_remembered_also_where_nothing_was_decided(sim: FederationSim) -> None:
    early = sim.now
    sim.now += timedelta(days=1)
    with deciding(sim.coordinator_home, sim.now):
        pass
    sim.now = early
    assert refusal(sim).code == "CLOCK_SET_BACK"


def test_an_old_state_file_does_not_set_the_clock_back(busy: FederationSim, tmp_path: Path) -> None:
    shutil.copy(busy.coordinator_home / "state.json", tmp_path)
    early = busy.now
    busy.now += timedelta(days=1)
    call(busy, b"2" * 32)
    shutil.copy(tmp_path / "state.json", busy.coordinator_home)
    busy.now = early
    assert refusal(busy).code == "CLOCK_SET_BACK"


def test_a_person_can_say_that_the_clock_was_wrong_before(busy: FederationSim) -> None:
    early, path = busy.now, busy.coordinator_home / "state.json"
    busy.now += timedelta(days=80)
    call(busy, b"2" * 32)
    busy.now = early
    assert refusal(busy).code == "CLOCK_SET_BACK"
    document = json.loads(path.read_bytes()) | {"latest": f"{early:%Y-%m-%dT%H:%M:%SZ}"}
    path.write_text(json.dumps(document))
    assert busy.receive()[0].outcome == "already admitted"


# The commands -------------------------------------------------------------------------------------


def command(sim: FederationSim, *arguments: str) -> tuple[int, Any]:
    app = typer.Typer()
    app.add_typer(commands_ledger.app, name="ledger")
    result = CliRunner().invoke(app, ["ledger", *arguments, "--home", str(sim.coordinator_home), "--json"])
    if isinstance(result.exception, RefusedError | ConfigError):
        raise result.exception
    return result.exit_code, json.loads(result.stdout)


def test_the_commands_verify_and_show(busy: FederationSim) -> None:
    status, verified = command(busy, "verify")
    assert (status, verified["entries"], verified["head"]) == (0, 5, entries(busy)[-1].sha256)
    assert verified["held"] == sorted(held_heads(busy.coordinator_home)) and len(verified["held"]) == 2
    _, shown = command(busy, "show")
    assert [each["event"] for each in shown] == ["received", "admitted", "received", "admitted", "called"]
    assert [each["n"] for each in shown] == [1, 2, 3, 4, 5]


def test_the_command_takes_heads_that_others_hold(busy: FederationSim) -> None:
    second = entries(busy)[1]
    assert len(command(busy, "verify", "--head", f"2:{second.sha256}")[1]["held"]) == 3
    with pytest.raises(RefusedError) as caught:
        command(busy, "verify", "--head", f"2:{'0' * 64}")
    assert caught.value.code == "LEDGER_FORKED"


@pytest.mark.parametrize("head", ["", "2", "2:abc", "x:" + "0" * 64, "-1:" + "0" * 64])
def test_the_command_takes_nothing_else_for_a_head(busy: FederationSim, head: str) -> None:
    with pytest.raises(ConfigError) as caught:
        command(busy, "verify", "--head", head)
    assert caught.value.code == "HEAD_INVALID"


def test_showing_is_for_people_too(busy: FederationSim) -> None:
    app = typer.Typer()
    app.add_typer(commands_ledger.app, name="ledger")
    result = CliRunner().invoke(app, ["ledger", "show", "--home", str(busy.coordinator_home)])
    received = result.stdout.splitlines()[1]
    assert "received" in received and "site site-a" in received and "kind adapter" in received
