"""A site's Flower app, asked by a coordinator that may be anybody."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import fedcompose
from fedcompose.call import CALL_TYPE, COLLECTION_PERIOD, read_own_call
from fedcompose.contribution import KINDS
from fedcompose.files import dump_json
from fedcompose.ledger import Entry, Head
from fedcompose.parts import offer_digest
from fedcompose.signing import read_envelope_unverified, sign_envelope
from fedcompose.wire import (
    ACTIONS,
    PROTOCOL,
    WINDOW_BYTES,
    ConfigRecord,
    Context,
    Description,
    Message,
    RecordDict,
    Status,
    TaskIdentity,
    message_type,
    read_description,
    read_offer,
    read_status,
    read_window,
    request,
)
from fedcompose_client.egress import REFUSALS, SITE_ERROR
from fedcompose_client.flower import ANSWERS, job_status, make_app
from fedcompose_client.jobs import Job, decide, jobs, record
from fedcompose_client.offer import outbox_parts
from tests.flower_sim import FlowerSim, files_of

CANARY = "PRIVATE-CANARY-7f3a"


@pytest.fixture
def sim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FlowerSim:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nothing here has to survive a power cut, and it is slow
    return FlowerSim(tmp_path)


@pytest.fixture
def called(sim: FlowerSim) -> FlowerSim:
    """site-a has accepted a call and put a contribution into its outbox."""
    assert code(ask(sim, "call", request(call=sim.call()))) == "ACCEPTED"
    sim.fill_outbox("site-a")
    return sim


def ask(sim: FlowerSim, action: str, content: RecordDict, now: datetime | None = None) -> RecordDict:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    message = Message(content, dst_node_id=2, message_type=action if "." in action else f"query.{action}")
    app = make_app(sim.folder("site-a"), lambda: now or sim.now)
    return app(message, Context(1, 2, {}, RecordDict(), {})).content


def code(answer: RecordDict) -> str:
    return str(answer["answer"]["code"])


# Calls --------------------------------------------------------------------------------------------


def test_the_same_call_may_come_again(sim: FlowerSim) -> None:
    envelope = sim.call()
    assert [code(ask(sim, "call", request(call=envelope))) for _ in range(2)] == ["ACCEPTED", "ACCEPTED"]
    kept = sim.folder("site-a") / "calls"
    assert [path.read_bytes() for path in kept.glob("*.json")] == [envelope]
    assert len(next(kept.glob("*.jsonl")).read_text().splitlines()) == 1, "it was asked twice and begun once"


def changed(sim: FlowerSim, **changes: Any) -> bytes:
    """The call with other fields, signed by the coordinator all the same."""
    document = json.loads(read_envelope_unverified(sim.call(), CALL_TYPE))
    return sign_envelope(dump_json(document | changes), CALL_TYPE, [sim.signer])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"federation": "urn:uuid:00000000-0000-4000-8000-00000000dead"}, "CALL_FEDERATION"),
        ({"base": {"name": "base", "dirHash": "0" * 64}}, "CALL_BASE"),
        ({"base": {"name": "another", "dirHash": "0" * 64}}, "CALL_BASE"),
        ({"deadline": "2020-01-01T00:00:00Z"}, "CALL_EXPIRED"),
        ({"sites": [{"id": "site-b", "domain": "logic"}]}, "CALL_SITE"),
        ({"sites": [{"id": "site-a", "domain": "logic"}]}, "CALL_SITE"),
        ({"sites": [{"id": "site-a", "domain": "../x"}]}, "CALL_INVALID"),
        ({"sites": [{"id": "site-a", "domain": "math"}] * 2}, "CALL_INVALID"),
        ({"id": "../../x"}, "CALL_INVALID"),
        ({"id": "x/y"}, "CALL_INVALID"),
        ({"want": ["data"]}, "CALL_INVALID"),
        ({"nonce": "short"}, "CALL_INVALID"),
        ({"schema": "fedcompose/call/v2"}, "CALL_INVALID"),
        ({"run": "a command"}, "CALL_INVALID"),
        ({"coordinator": "another"}, "CALL_COORDINATOR"),
        ({"lora": {"rank": 8, "targets": ["gate_proj", "up_proj", "down_proj"]}}, "CALL_SHAPE"),
        ({"lora": {"rank": 64, "targets": ["up_proj"]}}, "CALL_SHAPE"),
        ({"policy": "0" * 64}, "CALL_POLICY"),
        ({"lora": {"rank": 0, "targets": ["up_proj"]}}, "CALL_INVALID"),
        ({"ledger": {"entries": "many", "head": "0" * 64}}, "CALL_INVALID"),
    ],
)
def test_refuses_a_call_that_is_not_for_it(sim: FlowerSim, changes: dict[str, Any], expected: str) -> None:
    assert code(ask(sim, "call", request(call=changed(sim, **changes)))) == expected
    assert not (sim.folder("site-a") / "calls").exists()


def test_refuses_a_call_of_a_foreign_federation(sim: FlowerSim, tmp_path: Path) -> None:
    foreign = FlowerSim(tmp_path / "foreign", federation_id="urn:uuid:00000000-0000-4000-8000-000000000002")
    assert code(ask(sim, "call", request(call=foreign.call()))) == "ENVELOPE_KEY"


def test_refuses_a_call_that_a_site_signed(sim: FlowerSim) -> None:
    payload = read_envelope_unverified(sim.call(), CALL_TYPE)
    forged = sign_envelope(payload, CALL_TYPE, [sim.site_signer("site-b")])
    assert code(ask(sim, "call", request(call=forged))) == "ENVELOPE_KEY"


def test_refuses_a_signed_document_of_another_kind(sim: FlowerSim) -> None:
    federation = (sim.home / "federation.json").read_bytes()
    assert code(ask(sim, "call", request(call=federation))) == "ENVELOPE_TYPE"


def test_refuses_another_call_under_a_known_id(sim: FlowerSim) -> None:
    assert code(ask(sim, "call", request(call=sim.call()))) == "ACCEPTED"
    assert code(ask(sim, "call", request(call=changed(sim, nonce="ab" * 32)))) == "CALL_ID_TAKEN"


def test_refuses_a_call_for_a_base_that_it_does_not_build_on(sim: FlowerSim) -> None:
    envelope = sim.call()
    (sim.base / "config.json").write_bytes(b'{"another": "base"}')
    assert code(ask(sim, "call", request(call=envelope))) == "CALL_BASE"


def test_refuses_a_call_for_a_domain_that_it_has_no_data_for(sim: FlowerSim) -> None:
    config = sim.folder("site-a") / "site.toml"
    config.write_text(config.read_text().replace("domains.math", "domains.chess"))
    assert code(ask(sim, "call", request(call=sim.call()))) == "DOMAIN_UNKNOWN"


def test_keeps_the_heads_of_the_ledger_and_refuses_a_shorter_one(sim: FlowerSim) -> None:
    for day, entries, expected in ((0, 5, "ACCEPTED"), (2, 9, "ACCEPTED"), (1, 7, "ACCEPTED"), (3, 8, "LEDGER_SHRUNK")):
        ledger = Head(entries=entries, head=f"{entries}" * 64)
        call = sim.call(now=sim.now + timedelta(days=day), nonce=bytes([day]) * 32, ledger=ledger)
        assert code(ask(sim, "call", request(call=call), now=sim.now + timedelta(days=day))) == expected
    assert len(list((sim.folder("site-a") / "calls").glob("*.json"))) == 3


def test_refuses_another_ledger_of_the_same_length(sim: FlowerSim) -> None:
    for digit, expected in (("a", "ACCEPTED"), ("a", "ACCEPTED"), ("b", "LEDGER_FORKED")):
        call = sim.call(nonce=secrets.token_bytes(32), ledger=Head(entries=5, head=digit * 64))
        assert code(ask(sim, "call", request(call=call))) == expected


# Requests -----------------------------------------------------------------------------------------


def window(sim: FlowerSim, **changes: Any) -> RecordDict:
    """A request for the whole of site-a's contribution, or with other fields."""
    parts = outbox_parts(sim.outbox("site-a"), KINDS)
    fields = {"offer": offer_digest(parts), "start": 0, "length": WINDOW_BYTES}
    return sim.request("site-a", **(fields | changes))


def test_says_who_it_is(sim: FlowerSim) -> None:
    description = read_description(ask(sim, "describe", request()))
    assert description == Description(PROTOCOL, fedcompose.__version__, "site-a")


def test_hands_over_what_the_site_signed(called: FlowerSim) -> None:
    parts = read_offer(ask(called, "offer", called.request("site-a")), KINDS)
    pieces = read_window(ask(called, "fetch", window(called)), parts, 0, WINDOW_BYTES)
    assert {piece.part.name: data for piece, data in pieces} == files_of(called.outbox("site-a"))


def test_hands_over_exactly_the_window_that_was_asked_for(called: FlowerSim) -> None:
    parts = read_offer(ask(called, "offer", called.request("site-a")), KINDS)
    whole = b"".join(files_of(called.outbox("site-a"))[part.name] for part in parts)
    pieces = read_window(ask(called, "fetch", window(called, start=100, length=5000)), parts, 100, 5000)
    assert b"".join(data for _, data in pieces) == whole[100:5100]


@pytest.mark.parametrize("action", ["offer", "fetch"])
def test_offers_nothing_that_was_put_into_the_outbox_after_signing(called: FlowerSim, action: str) -> None:
    asked = window(called)
    (called.outbox("site-a") / "adapter" / "adapter_model.safetensors").write_text(CANARY)
    assert code(ask(called, action, asked)) == "NOT_READY"


def test_says_that_the_offer_has_changed(called: FlowerSim) -> None:
    asked = window(called)
    called.fill_outbox("site-a", size=4000)
    assert code(ask(called, "fetch", asked)) == "OFFER_CHANGED"
    assert code(ask(called, "fetch", window(called))) == "ACCEPTED"


@pytest.mark.parametrize("action", ["offer", "fetch"])
def test_hands_over_nothing_for_a_call_that_was_refused(called: FlowerSim, action: str) -> None:
    decide(called.folder("site-a"), jobs(called.folder("site-a"))[0].call.id, "refused", called.now)
    assert code(ask(called, action, window(called))) == "NOT_READY"


@pytest.mark.parametrize("action", ["status", "offer", "fetch", "receipt"])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"domain": "../x"}, "DOMAIN_UNKNOWN"),
        ({"domain": "logic"}, "DOMAIN_UNKNOWN"),
        ({"domain": 7}, "DOMAIN_UNKNOWN"),
        ({"call_id": "../site"}, "MESSAGE_INVALID"),
        ({"call_id": "never-made"}, "CALL_UNKNOWN"),
        ({"nonce": "0" * 64}, "CALL_UNKNOWN"),
        ({"nonce": b"x"}, "MESSAGE_INVALID"),
    ],
)
def test_answers_only_for_an_accepted_call(
    called: FlowerSim, action: str, changes: dict[str, Any], expected: str
) -> None:
    answer = ask(called, action, window(called, **changes))
    assert code(answer) == expected
    assert "parts" not in answer


@pytest.mark.parametrize(
    "changes",
    [
        {"start": -1}, {"start": 1 << 62}, {"start": "0"}, {"length": 0}, {"length": -5},
        {"length": WINDOW_BYTES + 1}, {"offer": "x"}, {"offer": b"x"},
    ],
)  # fmt: skip
def test_refuses_windows_outside_the_limits(called: FlowerSim, changes: dict[str, Any]) -> None:
    assert code(ask(called, "fetch", window(called, **changes))) == "MESSAGE_INVALID"


def test_hands_over_for_a_while_after_the_deadline_and_then_no_more(called: FlowerSim) -> None:
    deadline = read_own_call(next((called.home / "calls").glob("*.json")).read_bytes()).deadline
    late = deadline + COLLECTION_PERIOD
    assert code(ask(called, "fetch", window(called), now=late - timedelta(seconds=1))) == "ACCEPTED"
    assert code(ask(called, "fetch", window(called), now=late)) == "CALL_EXPIRED"


def test_files_that_are_no_part_of_a_contribution_stay(called: FlowerSim) -> None:
    (called.outbox("site-a") / "adapter" / "data.jsonl").write_text(CANARY)
    answer = ask(called, "fetch", window(called))
    assert code(answer) == "ACCEPTED"
    assert CANARY not in repr(answer)


def test_a_link_in_the_outbox_is_not_followed(called: FlowerSim, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(CANARY)
    linked = called.outbox("site-a") / "adapter" / "README.md"
    asked = window(called)
    linked.symlink_to(tmp_path / "secret")
    answer = ask(called, "fetch", asked)
    assert code(answer) == SITE_ERROR
    assert CANARY not in repr(answer)


def test_half_a_contribution_is_not_ready(called: FlowerSim) -> None:
    asked = window(called)
    (called.outbox("site-a") / "adapter" / "provenance.json").unlink()
    assert code(ask(called, "fetch", asked)) == "NOT_READY"


def test_answers_the_agreed_actions_and_no_others() -> None:
    assert set(ANSWERS) == {message_type(action) for action in ACTIONS}


@pytest.mark.parametrize(
    "action", ["query.train", "query.shell", "query.contribution", "train", "evaluate.call", "train.call", "query"]
)
def test_refuses_every_other_action(called: FlowerSim, action: str) -> None:
    assert code(ask(called, action, request(call=called.call()))) == "ACTION_UNKNOWN"


@pytest.mark.parametrize(
    "content", [RecordDict(), RecordDict({"request": ConfigRecord()})], ids=["no-record", "no-fields"]
)
@pytest.mark.parametrize("action", ["call", "status", "offer", "fetch", "receipt"])
def test_refuses_messages_of_another_form(called: FlowerSim, action: str, content: RecordDict) -> None:
    assert code(ask(called, action, content)) == "MESSAGE_INVALID"


def test_an_error_leaves_as_a_code_without_its_text(
    called: FlowerSim, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> Mapping[str, Any]:
        raise ValueError(CANARY)

    monkeypatch.setattr("fedcompose_client.flower.job_status", fail)
    answer = ask(called, "status", window(called))
    assert dict(answer["answer"]) == {"code": SITE_ERROR}
    assert CANARY in caplog.text, "the site's own log says why"


def test_a_code_outside_the_list_stays_inside(sim: FlowerSim) -> None:
    (sim.folder("site-a") / "federation.json").unlink()
    answer = ask(sim, "call", request(call=sim.call()))
    assert dict(answer["answer"]) == {"code": SITE_ERROR}
    assert SITE_ERROR not in REFUSALS


# Status -------------------------------------------------------------------------------------------


def progress(folder: Path, *lines: str) -> Path:
    run = folder / "runs" / "math"
    run.mkdir(parents=True, exist_ok=True)
    (run / "progress.jsonl").write_text("\n".join(lines))
    return run


def line(stage: str, step: int, time: float) -> str:
    return json.dumps({"time": time, "stage": stage, "step": step, "steps": 20, "note": CANARY})


def test_status_follows_a_call_from_asked_to_ready(sim: FlowerSim) -> None:
    sim.call()
    answers = [read_status(ask(sim, "call", request(call=sim.newest_call())))]
    site = sim.folder("site-a")
    call_id = jobs(site)[0].call.id
    progress(site, line("warm_up", 20, 0), line("rlvr", 2, 50), line("rlvr", 4, 60), '{"half a li')
    for event in ("approved", "started", "trained", "distilled", "failed", "approved"):
        record(site, call_id, event, sim.now)
        answers.append(read_status(ask(sim, "status", sim.request("site-a"))))
    sim.fill_outbox("site-a")
    answers.append(read_status(ask(sim, "status", sim.request("site-a"))))
    assert [answer.state for answer in answers] == [
        "asked", "approved", "training", "trained", "trained", "failed", "approved", "ready",
    ]  # fmt: skip
    assert answers[2] == Status("training", step=4, steps=20, eta_s=80)


@pytest.mark.parametrize(("decides", "state"), [("refuse", "refused"), ("ask", "asked"), ("run", "approved")])
def test_the_site_says_what_a_call_sets_going(sim: FlowerSim, decides: str, state: str) -> None:
    config = sim.folder("site-a") / "site.toml"
    config.write_text(config.read_text().replace("[domains", f'[calls]\ndecide = "{decides}"\n[domains', 1))
    answers = [ask(sim, "call", request(call=sim.call())) for _ in range(2)]
    assert [read_status(answer).state for answer in answers] == [state, state]


def training(folder: Path) -> Status:
    """The status of a call that is being trained for."""
    started = Entry(1, datetime.now(UTC), "started", {}, "", "")
    return job_status(folder, Job(None, b"", [started]), "math")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "\n", "no json\n", "[1]\n", "\xff\n", "7\n"])
def test_an_unreadable_progress_file_is_no_progress(tmp_path: Path, text: str) -> None:
    progress(tmp_path, text)
    assert training(tmp_path) == Status("training")


def test_a_line_that_a_full_disk_cut_short_does_not_hide_the_others(tmp_path: Path) -> None:
    progress(tmp_path, line("rlvr", 2, 50), line("rlvr", 3, 55)[:20] + line("rlvr", 3, 55), line("rlvr", 4, 60), "")
    assert training(tmp_path) == Status("training", step=4, steps=20, eta_s=80)


@pytest.mark.parametrize("value", ['"x"', "NaN", "-3", "1e99", "null", "[]"])
def test_a_strange_number_in_a_progress_file_is_unknown(tmp_path: Path, value: str) -> None:
    progress(tmp_path, f'{{"stage": "rlvr", "step": {value}, "steps": 5, "time": {value}}}', "")
    assert training(tmp_path) == Status("training", step=-1, steps=5, eta_s=-1)


def test_a_long_progress_file_is_read_from_its_end(tmp_path: Path) -> None:
    many = [line("rlvr", step, 1.0 * step) for step in range(3000)]
    progress(tmp_path, *many, "")
    assert training(tmp_path).step == 2999


def test_notes_do_not_leave(called: FlowerSim) -> None:
    progress(called.folder("site-a"), line("rlvr", 2, 50), "")
    record(called.folder("site-a"), jobs(called.folder("site-a"))[0].call.id, "started", called.now)
    answer = ask(called, "status", window(called))
    assert read_status(answer).step == 2
    assert CANARY not in repr(answer)


def test_the_client_commands_do_not_import_flower() -> None:
    code = "import sys, fedcompose.cli; sys.exit('flwr' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
