"""A site's Flower app, asked by a coordinator that may be anybody."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedcompose.call import CALL_TYPE, COLLECTION_PERIOD, read_own_call
from fedcompose.contribution import KINDS
from fedcompose.files import dump_json
from fedcompose.ledger import Head
from fedcompose.signing import read_envelope_unverified, sign_envelope
from fedcompose.wire import (
    WINDOW_BYTES,
    ConfigRecord,
    Context,
    Message,
    RecordDict,
    Status,
    TaskIdentity,
    read_contribution,
    request,
)
from fedcompose_client.flower import REFUSALS, SITE_ERROR, make_app, read_status
from tests.flower_sim import FlowerSim, files_of

CANARY = "PRIVATE-CANARY-7f3a"


@pytest.fixture
def sim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FlowerSim:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nothing here has to survive a power cut, and it is slow
    return FlowerSim(tmp_path)


@pytest.fixture
def called(sim: FlowerSim) -> FlowerSim:
    """site-a has accepted a call and put a contribution into its outbox."""
    sim.call()
    sim.run("call")
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
    assert list(files_of(sim.folder("site-a") / "calls").values()) == [envelope]


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
    assert len(files_of(sim.folder("site-a") / "calls")) == 3


def test_refuses_another_ledger_of_the_same_length(sim: FlowerSim) -> None:
    for digit, expected in (("a", "ACCEPTED"), ("a", "ACCEPTED"), ("b", "LEDGER_FORKED")):
        call = sim.call(nonce=secrets.token_bytes(32), ledger=Head(entries=5, head=digit * 64))
        assert code(ask(sim, "call", request(call=call))) == expected


# Requests -----------------------------------------------------------------------------------------


def window(sim: FlowerSim, **changes: Any) -> RecordDict:
    return sim.request("site-a", **({"start": 0, "length": WINDOW_BYTES} | changes))


def test_hands_over_what_the_site_signed(called: FlowerSim) -> None:
    answer = ask(called, "contribution", window(called))
    _, pieces = read_contribution(answer, KINDS, 0, WINDOW_BYTES)
    assert {piece.part.name: data for piece, data in pieces} == files_of(called.outbox("site-a"))


@pytest.mark.parametrize("action", ["status", "contribution"])
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


@pytest.mark.parametrize("changes", [{"start": -1}, {"length": 0}, {"length": WINDOW_BYTES + 1}, {"start": "0"}])
def test_refuses_windows_outside_the_limits(called: FlowerSim, changes: dict[str, Any]) -> None:
    assert code(ask(called, "contribution", window(called, **changes))) == "MESSAGE_INVALID"


def test_hands_over_for_a_while_after_the_deadline_and_then_no_more(called: FlowerSim) -> None:
    deadline = read_own_call(next((called.home / "calls").glob("*.json")).read_bytes()).deadline
    late = deadline + COLLECTION_PERIOD
    assert code(ask(called, "contribution", window(called), now=late - timedelta(seconds=1))) == "ACCEPTED"
    assert code(ask(called, "contribution", window(called), now=late)) == "CALL_EXPIRED"


def test_files_that_are_no_part_of_a_contribution_stay(called: FlowerSim) -> None:
    (called.outbox("site-a") / "adapter" / "data.jsonl").write_text(CANARY)
    answer = ask(called, "contribution", window(called))
    assert code(answer) == "ACCEPTED"
    assert CANARY not in repr(answer)


def test_a_link_in_the_outbox_is_not_followed(called: FlowerSim, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(CANARY)
    linked = called.outbox("site-a") / "adapter" / "README.md"
    linked.symlink_to(tmp_path / "secret")
    answer = ask(called, "contribution", window(called))
    assert code(answer) == SITE_ERROR
    assert CANARY not in repr(answer)


def test_half_a_contribution_is_not_ready(called: FlowerSim) -> None:
    (called.outbox("site-a") / "adapter" / "provenance.json").unlink()
    assert code(ask(called, "contribution", window(called))) == "NOT_READY"


@pytest.mark.parametrize("action", ["query.train", "query.shell", "train", "evaluate.call", "train.call", "query"])
def test_refuses_every_other_action(called: FlowerSim, action: str) -> None:
    assert code(ask(called, action, request(call=called.call()))) == "ACTION_UNKNOWN"


@pytest.mark.parametrize(
    "content", [RecordDict(), RecordDict({"request": ConfigRecord()})], ids=["no-record", "no-fields"]
)
@pytest.mark.parametrize("action", ["call", "status", "contribution"])
def test_refuses_messages_of_another_form(called: FlowerSim, action: str, content: RecordDict) -> None:
    assert code(ask(called, action, content)) == "MESSAGE_INVALID"


def test_an_error_leaves_as_a_code_without_its_text(
    called: FlowerSim, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> Mapping[str, Any]:
        raise ValueError(CANARY)

    monkeypatch.setattr("fedcompose_client.flower.read_status", fail)
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


def test_status_follows_a_domain_from_nothing_to_ready(tmp_path: Path) -> None:
    assert read_status(tmp_path, "math") == Status("idle")
    run = progress(tmp_path, line("warm_up", 20, 0), line("rlvr", 2, 50), line("rlvr", 4, 60), '{"half a li')
    assert read_status(tmp_path, "math") == Status("training", step=4, steps=20, eta_s=80)
    (run / "result.json").write_text("{}")
    assert read_status(tmp_path, "math") == Status("trained")
    signature = tmp_path / "outbox" / "math" / "adapter" / "model.sig"
    signature.parent.mkdir(parents=True)
    signature.write_text("{}")
    assert read_status(tmp_path, "math") == Status("ready")


@pytest.mark.parametrize("text", ["", "\n", "no json\n", "[1]\n", "\xff\n", "7\n"])
def test_an_unreadable_progress_file_is_no_progress(tmp_path: Path, text: str) -> None:
    progress(tmp_path, text)
    assert read_status(tmp_path, "math") == Status("idle")


@pytest.mark.parametrize("value", ['"x"', "NaN", "-3", "1e99", "null", "[]"])
def test_a_strange_number_in_a_progress_file_is_unknown(tmp_path: Path, value: str) -> None:
    progress(tmp_path, f'{{"stage": "rlvr", "step": {value}, "steps": 5, "time": {value}}}', "")
    assert read_status(tmp_path, "math") == Status("training", step=-1, steps=5, eta_s=-1)


def test_a_long_progress_file_is_read_from_its_end(tmp_path: Path) -> None:
    many = [line("rlvr", step, 1.0 * step) for step in range(3000)]
    progress(tmp_path, *many, "")
    assert read_status(tmp_path, "math").step == 2999


def test_notes_do_not_leave(called: FlowerSim) -> None:
    progress(called.folder("site-a"), line("rlvr", 2, 50), "")
    assert CANARY not in repr(ask(called, "status", window(called)))


def test_the_client_commands_do_not_import_flower() -> None:
    code = "import sys, fedcompose.cli; sys.exit('flwr' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
