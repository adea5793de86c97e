"""What leaves a site: nothing but a closed list of objects, each in the ledger before it leaves."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcompose import ledger, wire
from fedcompose.cli import main
from fedcompose.delivery import DELIVERY_TYPE, make_receipt, read_receipt
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.ledger import Head
from fedcompose.parts import offer_digest, stream_bytes
from fedcompose.signing import read_envelope_unverified, sign_envelope
from fedcompose.wire import Description, RecordDict, Status, TaskIdentity
from fedcompose_client import egress, egress_ledger, offer
from fedcompose_client.egress import Announced, Code, Window, send
from fedcompose_client.egress_ledger import LEDGER_FILE, departures
from fedcompose_client.flower import SilenceError, accept_call, make_app
from fedcompose_client.jobs import decide, jobs, read_job, record, release
from fedcompose_client.offer import export, outbox_parts
from tests.flower_sim import FlowerSim

CLIENT = Path(egress.__file__).parent
ROOT = CLIENT.parent.parent


@pytest.fixture
def sim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FlowerSim:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    sim = FlowerSim(tmp_path, {"site-a": "math"})
    accept_call(sim.folder("site-a"), sim.call(), sim.now)
    sim.fill_outbox("site-a")
    return sim


@pytest.fixture
def site(sim: FlowerSim) -> Path:
    return sim.folder("site-a")


def window(sim: FlowerSim, start: int = 0, length: int = wire.WINDOW_BYTES) -> Window:
    parts = outbox_parts(sim.outbox("site-a"), ["adapter", "traces"])
    return Window(call_id(sim), "math", offer_digest(parts), start, length)


def call_id(sim: FlowerSim) -> str:
    return jobs(sim.folder("site-a"))[0].call.id


def size_of(content: RecordDict) -> int:
    return sum(len(array.data) for array in content["parts"].values())  # type: ignore[union-attr]


# The broker ---------------------------------------------------------------------------------------


def test_every_object_is_a_line_with_its_size_and_digest(sim: FlowerSim, site: Path) -> None:
    answers = [
        send(site, each, sim.now)
        for each in (
            Description(1, "1.0", "site-a"), Status("ready"), Code("NOT_READY"), Announced(call_id(sim), "math"),
            window(sim, 0, 500), window(sim, 500, 5000), window(sim, 10**6),
        )
    ]  # fmt: skip
    lines = departures(site, None).entries
    assert [line.event for line in lines] == ["description", "status", "code", "offer", "window", "window", "window"]
    assert [line.fields["bytes"] for line in lines[4:]] == [size_of(answer) for answer in answers[4:]]
    assert [wire.read_head(answer) for answer in answers[3:]] == [
        Head(entries=line.n, head=line.sha256) for line in lines[3:]
    ]


def test_the_line_is_there_before_the_answer(sim: FlowerSim, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError

    monkeypatch.setattr(egress, "note", fail)
    for outgoing in (Status("ready"), Announced(call_id(sim), "math"), window(sim)):
        with pytest.raises(OSError):
            send(site, outgoing, sim.now)


@pytest.mark.parametrize(
    "outgoing",
    [{"rows": "private"}, b"private", "private", None, RecordDict(), Path("data.jsonl"), ValueError("private")],
)
def test_what_is_not_on_the_list_does_not_leave(sim: FlowerSim, site: Path, outgoing: Any) -> None:
    with pytest.raises(RefusedError) as refused:
        send(site, outgoing, sim.now)
    assert refused.value.code == "EGRESS_TYPE"
    assert not departures(site, None).entries


@pytest.mark.parametrize(
    "outgoing",
    [
        Status("the patient has a rare disease"),  # type: ignore[arg-type]
        Status("training", step="17 rows of Ann"),  # type: ignore[arg-type]
        Status("training", eta_s=10**30),
        Description(1, "version with a path /home/ann", "site-a"),
        Description(1, "1.0", "Ann's laptop"),
    ],
)
def test_no_text_fits_into_a_small_answer(sim: FlowerSim, site: Path, outgoing: Any) -> None:
    with pytest.raises(RefusedError) as refused:
        send(site, outgoing, sim.now)
    assert refused.value.code == "MESSAGE_INVALID"
    assert not departures(site, None).entries


def test_a_code_outside_the_list_leaves_as_one_that_says_nothing(sim: FlowerSim, site: Path) -> None:
    assert send(site, Code("ROW_17_INVALID"), sim.now)["answer"]["code"] == egress.SITE_ERROR


def test_a_file_that_changes_while_it_is_read_does_not_leave(
    sim: FlowerSim, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, read = window(sim), egress.read_slice

    def exchanged(outbox: Path, piece: Any) -> bytes:
        path = outbox / piece.part.name
        path.write_bytes(b"x" * path.stat().st_size)
        return read(outbox, piece)

    monkeypatch.setattr(egress, "read_slice", exchanged)
    with pytest.raises(RefusedError):
        send(site, asked, sim.now)
    assert not departures(site, None).entries


def test_without_a_ledger_nothing_is_answered(sim: FlowerSim, site: Path) -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    (site / LEDGER_FILE).write_text("no ledger\n")
    message = wire.Message(wire.request(), dst_node_id=2, message_type="query.describe")
    with pytest.raises(SilenceError) as silent:
        make_app(site)(message, wire.Context(1, 2, {}, RecordDict(), {}))
    assert str(silent.value) == "", "Flower would send the text"


SENDERS = {
    "answer",
    "description_answer",
    "status_answer",
    "offer_answer",
    "window_answer",
    "ArrayRecord",
    "RecordDict",
}
TRANSPORTS = {"push_message": {"executor.py"}, "Message": {"flower.py"}}


def used_in(path: Path) -> set[str]:
    """Every name that a module calls."""
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}


def offenders(modules: list[Path]) -> list[str]:
    found = []
    for path in modules:
        used = used_in(path)
        found += [f"{path.name}: {name}" for name in used & SENDERS if path.name != "egress.py"]
        found += [f"{path.name}: {name}" for name, at in TRANSPORTS.items() if name in used and path.name not in at]
    return [each for each in found if each != "executor.py: RecordDict"]  # an empty one, in a context that stays


def test_nothing_else_makes_an_answer_or_hands_one_on(tmp_path: Path) -> None:
    assert offenders(sorted(CLIENT.glob("*.py"))) == []
    planted = tmp_path / "planted.py"
    planted.write_text("from fedcompose import wire\nwire.answer('ACCEPTED', rows=1)\npush_message(1, 2, 3)\n")
    assert len(offenders([planted])) == 2


# The owner's release ------------------------------------------------------------------------------


def held(sim: FlowerSim) -> str:
    """What lies in the outbox, signed and held; its digest."""
    offer = offer_digest(outbox_parts(sim.outbox("site-a"), ["adapter", "traces"]))
    record(sim.folder("site-a"), call_id(sim), "held", sim.now, offer=offer)
    return offer


def code_of(action: Callable[[], object]) -> str:
    with pytest.raises((RefusedError, ConfigError)) as refused:
        action()
    return refused.value.code


def test_what_is_held_leaves_after_its_release_and_not_before(sim: FlowerSim, site: Path) -> None:
    offer = held(sim)
    assert read_job(site, call_id(sim)).state == "held"
    assert code_of(lambda: send(site, Announced(call_id(sim), "math"), sim.now)) == "NOT_READY"
    assert code_of(lambda: send(site, window(sim), sim.now)) == "NOT_READY"
    assert code_of(lambda: release(site, "0" * 64, sim.now)) == "RELEASE_UNKNOWN"
    release(site, offer, sim.now)
    assert size_of(send(site, window(sim), sim.now)) > 0


def test_a_release_is_for_one_digest_only(sim: FlowerSim, site: Path) -> None:
    release(site, held(sim), sim.now)
    sim.outbox("site-a").joinpath("adapter/model.sig").write_bytes(b"signed anew")
    assert code_of(lambda: send(site, window(sim), sim.now)) == "NOT_READY"
    offer = held(sim)
    assert code_of(lambda: send(site, window(sim), sim.now)) == "NOT_READY"
    decide(site, call_id(sim), "refused", sim.now)
    assert code_of(lambda: release(site, offer, sim.now)) == "RELEASE_UNKNOWN"


def command(site: Path, *arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["client", *arguments, "--site", str(site)])
    return int(str(ended.value.code))


# The ledger and its receipts ----------------------------------------------------------------------


@pytest.fixture
def sent(sim: FlowerSim, site: Path) -> FlowerSim:
    """Everything has left in two windows, and the coordinator has signed for it."""
    sim.run("collect", window_bytes=1500)
    return sim


def test_the_coordinator_signs_for_what_it_has_and_both_keep_it(sent: FlowerSim, site: Path) -> None:
    found = departures(site, sent.federation)
    parts = outbox_parts(sent.outbox("site-a"), ["adapter", "traces"])
    (receipt,) = found.receipts
    assert (receipt.offer, receipt.bytes, receipt.site) == (offer_digest(parts), stream_bytes(parts), "site-a")
    assert found.totals["window"][1] == stream_bytes(parts)
    assert [path.read_bytes() for path in (sent.home / "receipts").iterdir()] == [
        path.read_bytes() for path in (site / "receipts").iterdir()
    ]
    assert command(site, "ledger", "verify", "--json") == 0


def lines_of(site: Path) -> list[bytes]:
    return (site / LEDGER_FILE).read_bytes().splitlines(keepends=True)


CHANGES: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "delete": (lambda lines: lines[:1] + lines[2:], "LEDGER_BROKEN"),
    "delete-first": (lambda lines: lines[1:], "LEDGER_BROKEN"),
    "edit": (lambda lines: [lines[0].replace(b'"bytes":', b'"bytes":1'), *lines[1:]], "LEDGER_BROKEN"),
    "reorder": (lambda lines: [lines[1], lines[0], *lines[2:]], "LEDGER_BROKEN"),
    "repeat": (lambda lines: [*lines, lines[-1]], "LEDGER_BROKEN"),
    "truncate": (lambda lines: lines[:2], "LEDGER_TRUNCATED"),
    "empty": (lambda _: [], "LEDGER_TRUNCATED"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_ledger_that_was_changed_is_noticed(sent: FlowerSim, site: Path, change: str) -> None:
    meddle, expected = CHANGES[change]
    (site / LEDGER_FILE).write_bytes(b"".join(meddle(lines_of(site))))
    assert code_of(lambda: departures(site, sent.federation)) == expected


def test_without_a_receipt_a_cut_is_not_noticed(sent: FlowerSim, site: Path) -> None:
    next((site / "receipts").iterdir()).unlink()
    (site / LEDGER_FILE).write_bytes(b"".join(lines_of(site)[:2]))
    assert len(departures(site, sent.federation).entries) == 2, "what the receipts are for"


def test_a_ledger_written_anew_is_noticed(sent: FlowerSim, site: Path) -> None:
    count = len(lines_of(site))
    (site / LEDGER_FILE).unlink()
    for _ in range(count):
        egress_ledger.note(site, "status", sent.now, bytes=1, sha256="0" * 64)
    assert code_of(lambda: departures(site, sent.federation)) == "LEDGER_FORKED"


def receipt(sim: FlowerSim, folder: Path, /, **changes: Any) -> bytes:
    parts = outbox_parts(sim.outbox("site-a"), ["adapter", "traces"])
    facts: dict[str, Any] = {
        "site": "site-a", "call": call_id(sim), "offer": offer_digest(parts), "bytes": stream_bytes(parts),
        "ledger": ledger.head(folder / LEDGER_FILE),
    }  # fmt: skip
    return make_receipt(sim.federation, sim.signer, sim.now, **(facts | changes))


def answered(sim: FlowerSim, site: Path, envelope: bytes) -> str:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    content = sim.request("site-a", receipt=envelope)
    message = wire.Message(content, dst_node_id=2, message_type="query.receipt")
    return str(make_app(site)(message, wire.Context(1, 2, {}, RecordDict(), {})).content["answer"]["code"])


@pytest.mark.parametrize(
    "changes",
    [
        {"site": "site-b"}, {"call": "another"}, {"offer": "0" * 64}, {"ledger": Head(entries=2, head="0" * 64)},
        {"ledger": Head(entries=10**6, head="0" * 64)},
    ],
)  # fmt: skip
def test_a_receipt_for_something_else_is_not_kept(sent: FlowerSim, site: Path, changes: dict[str, Any]) -> None:
    before = sorted(path.read_bytes() for path in (site / "receipts").iterdir())
    assert answered(sent, site, receipt(sent, site, **changes)) == "DELIVERY_INVALID"
    assert sorted(path.read_bytes() for path in (site / "receipts").iterdir()) == before
    assert answered(sent, site, before[0]) == "ACCEPTED"
    assert sorted(path.read_bytes() for path in (site / "receipts").iterdir()) == before


def test_the_first_receipt_for_an_offer_stays(sent: FlowerSim, site: Path) -> None:
    kept = next((site / "receipts").iterdir())
    first, second = kept.read_bytes(), receipt(sent, site)
    assert first != second
    assert answered(sent, site, second) == "DELIVERY_INVALID"
    assert kept.read_bytes() == first
    kept.unlink()
    assert answered(sent, site, second) == "ACCEPTED"


def test_a_receipt_may_come_after_the_next_contribution_was_signed(sent: FlowerSim, site: Path) -> None:
    kept = next((site / "receipts").iterdir())
    late = kept.read_bytes()
    kept.unlink()
    sent.outbox("site-a").joinpath("adapter/model.sig").write_bytes(b"signed anew")
    sent.sign("site-a")
    assert answered(sent, site, late) == "ACCEPTED"
    assert kept.read_bytes() == late


def test_a_receipt_that_nobody_of_the_federation_signed_is_not_kept(sent: FlowerSim, site: Path) -> None:
    payload = read_envelope_unverified(receipt(sent, site), DELIVERY_TYPE)
    assert answered(sent, site, sign_envelope(payload, DELIVERY_TYPE, [sent.site_signer("site-a")])) == "ENVELOPE_KEY"


def test_bytes_that_arrived_and_are_in_no_line_are_noticed(sent: FlowerSim, site: Path) -> None:
    path = next((site / "receipts").iterdir())
    known = read_receipt(path.read_bytes(), sent.federation)
    path.write_bytes(receipt(sent, site, bytes=known.bytes + 1, ledger=known.ledger))
    assert code_of(lambda: departures(site, sent.federation)) == "EGRESS_UNRECORDED"


def test_a_receipt_may_come_by_hand(sent: FlowerSim, site: Path, tmp_path: Path) -> None:
    kept, brought = next((site / "receipts").iterdir()), next((sent.home / "receipts").iterdir())
    kept.unlink()
    assert command(site, "ledger", "keep", str(brought)) == 0
    assert kept.read_bytes() == brought.read_bytes()
    other = tmp_path / "other.json"
    other.write_bytes(receipt(sent, site, site="site-b"))
    assert command(site, "ledger", "keep", str(other)) == 1


def test_a_coordinator_that_cannot_sign_fetches_all_the_same(sim: FlowerSim, site: Path) -> None:
    key = sim.home.parent / "keys" / "hub.key"
    key.write_text(key.read_text().replace("BEGIN PRIVATE", "BEGIN ENCRYPTED PRIVATE"))
    assert sim.run("collect")["site-a"].code == "ACCEPTED"
    assert not (site / "receipts").exists()


def test_files_that_are_carried_by_hand_are_in_the_ledger(sim: FlowerSim, site: Path, tmp_path: Path) -> None:
    export(site, "math", tmp_path / "stick", sim.now)
    (line,) = departures(site, None).entries
    assert line.event == "export"
    assert line.fields["bytes"] == sum(
        path.stat().st_size for path in (tmp_path / "stick").rglob("*") if path.is_file()
    )


def test_files_that_change_while_they_are_copied_are_not_carried_at_all(
    sim: FlowerSim, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a worker signs anew between the line in the ledger and the copy."""
    noted, weights = egress_ledger.note, site / "outbox" / "math" / "adapter" / "adapter_model.safetensors"

    def note_and_change(*arguments: Any, **fields: Any) -> None:
        noted(*arguments, **fields)
        weights.write_bytes(weights.read_bytes() + b" ")

    monkeypatch.setattr(offer, "note", note_and_change)
    assert code_of(lambda: export(site, "math", tmp_path / "stick", sim.now)) == "OFFER_CHANGED"
    assert not (tmp_path / "stick").exists()


def test_the_commands_show_and_verify(sent: FlowerSim, site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(site, "ledger", "show", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert {line["what"] for line in shown} >= {"offer", "window"}
    assert command(site, "ledger", "verify") == 0
    assert "signed for" in capsys.readouterr().out
    (site / LEDGER_FILE).write_bytes(b"".join(lines_of(site)[:1]))
    assert command(site, "ledger", "verify") == 1
    assert "LEDGER_TRUNCATED" in capsys.readouterr().err


# In mid-send --------------------------------------------------------------------------------------

SENDER = """
import sys, time
from datetime import UTC, datetime
from pathlib import Path
from fedcompose_client import egress, egress_ledger, offer

site, call, offer, size, late = Path(sys.argv[1]), *sys.argv[2:4], int(sys.argv[4]), sys.argv[5] == "late"
lines = []
if late:  # a broker that sends first and writes afterwards
    note = egress.note
    egress.note = lambda *args, **fields: lines.append((args, fields)) or egress_ledger.ledger.EMPTY
start = 0
while True:
    content = egress.send(site, egress.Window(call, "math", offer, start % size, 700), datetime.now(UTC))
    for array in content["parts"].values():
        sys.stdout.buffer.write(array.data)
    sys.stdout.buffer.flush()
    start += 700
    if late:
        time.sleep(0.05)
        note(*lines[-1][0], **lines[-1][1])
"""


def missing_after_kill(sim: FlowerSim, site: Path, how: str, after: int) -> int:
    """How many bytes a receiver has, of a sender killed in the middle, of which no line tells."""
    parts = outbox_parts(sim.outbox("site-a"), ["adapter", "traces"])
    arguments = [str(site), call_id(sim), offer_digest(parts), str(stream_bytes(parts)), how]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "client"))}
    with subprocess.Popen([sys.executable, "-c", SENDER, *arguments], stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdout is not None
        received = len(child.stdout.read(after))
        os.kill(child.pid, signal.SIGKILL)
        received += len(child.stdout.read())
    told = sum(int(entry.fields["bytes"]) for entry in departures(site, None).entries)
    assert received >= after, "something was sent"
    return max(0, received - told)


@pytest.mark.parametrize("after", [1, 5_000, 60_000])
def test_killed_in_mid_send_the_ledger_never_tells_less_than_was_sent(sim: FlowerSim, site: Path, after: int) -> None:
    assert missing_after_kill(sim, site, "first", after) == 0


def test_a_broker_that_writes_afterwards_is_found_out(sim: FlowerSim, site: Path) -> None:
    assert missing_after_kill(sim, site, "late", 1) > 0
