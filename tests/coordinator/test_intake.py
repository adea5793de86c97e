from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedcompose import ledger
from fedcompose.bases import Base
from fedcompose.call import CALL_TYPE, COLLECTION_PERIOD, Call, WantedLora, make_call, parse_call, read_own_call
from fedcompose.contribution import Kind, ReceivedContribution, VerifiedContribution
from fedcompose.document import format_time
from fedcompose.errors import ConfigError, MissingError, RefusedError
from fedcompose.federation import Federation
from fedcompose.files import dump_json, folder_digests, write_atomic
from fedcompose.revocations import RevokedKey, no_revocations, with_revocations
from fedcompose.signing import sign_envelope, sign_files
from fedcompose.traces import Trace, decode, is_plain_text
from fedcompose_client.contribute import contribute
from fedcompose_client.firewall import write_passed
from fedcompose_coordinator import decisions, intake
from fedcompose_coordinator.decisions import Decisions, deciding
from tests.federation_sim import FederationSim, make_traces


def test_admits_every_kind_from_every_site_and_lists_them(sim: FederationSim) -> None:
    made = [each for site in sim.sites for each in sim.contribute(site)]
    receipts = sim.receive()
    assert [receipt.outcome for receipt in receipts] == ["admitted"] * 4
    assert {each.dir_hash for each in sim.admitted()} == {each.dir_hash for each in made}
    assert [(each.site, each.kind) for each in sim.admitted()] == [
        ("site-a", "adapter"), ("site-a", "traces"), ("site-b", "adapter"), ("site-b", "traces"),
    ]  # fmt: skip


def test_the_store_is_private_and_read_only_and_the_quarantine_is_empty_again(sim: FederationSim) -> None:
    sim.contribute("site-a")
    sim.receive(sim.sites["site-a"].outbox)
    store = sim.coordinator_home / "store"
    assert stat.S_IMODE(store.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in store.glob("*/*")} == {0o400}
    assert list((sim.coordinator_home / "quarantine").iterdir()) == []


def test_changing_the_original_after_intake_changes_nothing(sim: FederationSim) -> None:
    adapter, _ = sim.contribute("site-a")
    sim.receive(adapter.path)
    (adapter.path / "adapter_config.json").write_bytes(b"{}")
    assert [each.dir_hash for each in sim.admitted()] == [adapter.dir_hash]


def test_receiving_the_same_folder_again_is_no_error(sim: FederationSim) -> None:
    adapter, _ = sim.contribute("site-a")
    first, second = (sim.receive(adapter.path)[0] for _ in range(2))
    assert (first.outcome, second.outcome) == ("admitted", "already admitted")
    assert second.contribution == first.contribution


def test_an_older_contribution_is_a_replay_and_a_newer_one_takes_over(sim: FederationSim, tmp_path: Path) -> None:
    first, _ = sim.contribute("site-a")
    shutil.copytree(first.path, tmp_path / "old")
    newer, _ = sim.contribute("site-a")
    assert newer.provenance.sequence > first.provenance.sequence
    sim.receive(newer.path)
    refusal = sim.receive(tmp_path / "old")[0].refusal
    assert refusal is not None and refusal.code == "REPLAYED"
    assert [each.dir_hash for each in sim.admitted()] == [newer.dir_hash]


def test_a_refusal_is_kept_with_its_reason_and_does_not_stop_the_others(sim: FederationSim) -> None:
    bad, good = sim.contribute("site-a")[0], sim.contribute("site-b")[0]
    (bad.path / "adapter_config.json").write_bytes(b"{}")
    refused, admitted = sim.receive(bad.path, good.path)
    assert (refused.outcome, admitted.outcome) == ("refused", "admitted")
    assert refused.kept is not None and refused.kept.parent == sim.coordinator_home / "quarantine"
    assert json.loads((refused.kept / "reason.json").read_bytes())["code"] == "FILE_CHANGED"
    assert (refused.kept / "adapter_config.json").read_bytes() == b"{}"


def test_an_altered_store_is_noticed(sim: FederationSim) -> None:
    adapter, _ = sim.contribute("site-a")
    sim.receive(adapter.path)
    path = sim.coordinator_home / "store" / adapter.dir_hash / "adapter_config.json"
    path.chmod(0o600)
    path.write_bytes(path.read_bytes().replace(b"8", b"9"))
    with pytest.raises(RefusedError) as refusal:
        sim.admitted()
    assert refusal.value.code == "FILE_CHANGED"


def test_a_folder_swapped_in_the_store_is_noticed(sim: FederationSim) -> None:
    ours, theirs = (sim.contribute(site)[0] for site in sim.sites)
    sim.receive(ours.path, theirs.path)
    store = sim.coordinator_home / "store"
    shutil.rmtree(store / ours.dir_hash)
    shutil.copytree(store / theirs.dir_hash, store / ours.dir_hash)
    with pytest.raises(RefusedError, match="does not hold what was received"):
        sim.admitted()


def test_a_folder_that_is_not_there_is_a_usage_error(sim: FederationSim, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        sim.receive(tmp_path / "nowhere")
    assert error.value.code == "FOLDER_MISSING"
    assert not (sim.coordinator_home / "ledger.jsonl").exists()


def test_a_source_that_is_swapped_after_it_was_copied_changes_nothing(
    sim: FederationSim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attacker wins the race: the files it hands over are other ones by the time they are verified."""
    (adapter, _), verify = sim.contribute("site-a"), intake.verify_contribution
    verified = []

    def swap_then_verify(received: ReceivedContribution, *arguments: Any, **options: Any) -> VerifiedContribution:
        (adapter.path / "adapter_config.json").write_bytes(b"{}")
        verified.append(received.path.parent)
        return verify(received, *arguments, **options)

    monkeypatch.setattr(intake, "verify_contribution", swap_then_verify)
    assert sim.receive(adapter.path)[0].outcome == "admitted"
    assert [each.dir_hash for each in sim.admitted()] == [adapter.dir_hash]
    assert verified == [sim.coordinator_home / "quarantine", sim.coordinator_home / "store"]
    with pytest.raises(RefusedError):  # had the source been verified, it would have been refused
        verify(ReceivedContribution(adapter.path), sim.federation, now=sim.now)


def test_a_source_that_changes_while_it_is_copied_is_refused(
    sim: FederationSim, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, _ = sim.contribute("site-a")
    copy_file = intake.copy_file

    def swap_then_copy(folder: Path, name: str, *arguments: Any) -> str:
        if name == "adapter_model.safetensors":
            (folder / name).write_bytes((folder / name).read_bytes()[:-4] + b"\0\0\0\0")
        return copy_file(folder, name, *arguments)

    monkeypatch.setattr(intake, "copy_file", swap_then_copy)
    assert code(sim.receive(adapter.path)) == "FILE_CHANGED"
    assert not (sim.coordinator_home / "store").exists()


def test_a_store_that_others_could_read_is_closed_again(sim: FederationSim) -> None:
    (sim.coordinator_home / "store").mkdir(mode=0o755)
    sim.receive(sim.contribute("site-a")[0].path)
    assert stat.S_IMODE((sim.coordinator_home / "store").stat().st_mode) == 0o700


def test_no_package_that_composes_or_serves_lets_peft_read_a_folder() -> None:
    """Experts are read by our own reader; PEFT gets values that we checked, and never a file of a site."""
    root = Path(intake.__file__).parents[2]
    sources = {path: path.read_text() for part in ("fedcompose", "coordinator") for path in (root / part).rglob("*.py")}
    reads = re.compile(r"Peft(Model|Config)|load_adapter|load_peft_weights|LoraConfig\.from_")
    assert not [path for path, text in sources.items() if reads.search(text)]
    assert reads.search((root / "client/fedcompose_client/distill.py").read_text())  # a site reads its own


# Calls --------------------------------------------------------------------------------------------


def make(sim: FederationSim, want: Sequence[Kind] = ("adapter", "traces"), **changes: Any) -> Call:
    """A call of this coordinator, in its folder."""
    options = {"deadline": sim.now + timedelta(days=1), "now": sim.now, "nonce": b"1" * 32} | changes
    envelope = make_call(sim.federation, sim.coordinator, "tiny", want, **options)
    call = read_own_call(envelope)
    write_atomic(sim.coordinator_home / "calls" / f"{call.id}.json", envelope)
    return call


def code(receipts: list[intake.Receipt]) -> str:
    (receipt,) = receipts
    assert receipt.refusal is not None
    return receipt.refusal.code


def test_an_answer_to_a_call_of_this_coordinator_is_admitted(sim: FederationSim) -> None:
    answers = sim.contribute("site-a", call=make(sim))
    assert [each.outcome for each in sim.receive(*(each.path for each in answers))] == ["admitted"] * 2


def test_an_answer_to_a_call_that_was_never_made_is_refused(sim: FederationSim) -> None:
    call = make(sim)
    (sim.coordinator_home / "calls" / f"{call.id}.json").unlink()
    assert code(sim.receive(sim.contribute("site-a", call=call)[0].path)) == "CALL_UNKNOWN"


def test_an_answer_to_other_words_than_the_call_had_is_refused(sim: FederationSim) -> None:
    """Somebody showed the site a call of the same id and nonce that asks for something else."""
    shown = make(sim, lora=WantedLora(rank=512))
    (sim.coordinator_home / "calls" / f"{shown.id}.json").unlink()
    assert make(sim).id == shown.id
    assert code(sim.receive(sim.contribute("site-a", call=shown)[0].path)) == "CALL_UNKNOWN"


def test_a_call_is_answered_once_with_each_kind(sim: FederationSim, tmp_path: Path) -> None:
    call = make(sim)
    adapter, traces = sim.contribute("site-a", call=call)
    shutil.copytree(adapter.path, tmp_path / "first")
    assert [each.outcome for each in sim.receive(adapter.path, traces.path)] == ["admitted"] * 2
    assert sim.receive(tmp_path / "first")[0].outcome == "already admitted"
    again, _ = sim.contribute("site-a", call=call)
    assert again.dir_hash != adapter.dir_hash
    assert code(sim.receive(again.path)) == "CALL_ANSWERED"
    other = make(sim, nonce=b"2" * 32)
    assert sim.receive(sim.contribute("site-a", call=other)[0].path)[0].outcome == "admitted"
    assert sim.receive(sim.contribute("site-b", call=call)[0].path)[0].outcome == "admitted"


@pytest.mark.parametrize(
    ("late", "outcome"), [(timedelta(seconds=-1), "admitted"), (timedelta(0), "CALL_EXPIRED")], ids=["in-time", "late"]
)
def test_an_answer_is_received_until_the_end_of_the_collection_period(
    sim: FederationSim, late: timedelta, outcome: str
) -> None:
    call = make(sim)
    adapter, _ = sim.contribute("site-a", call=call)
    alter_provenance(sim, adapter.path, expires="2126-01-01T00:00:00Z")  # a site that would like more time
    sim.now = call.deadline + COLLECTION_PERIOD + late
    receipt = sim.receive(adapter.path)[0]
    assert (receipt.refusal.code if receipt.refusal else receipt.outcome) == outcome


def alter_provenance(sim: FederationSim, folder: Path, **parameters: Any) -> None:
    """A dishonest site: it claims something else, and signs that."""
    path = folder / "provenance.json"
    document = json.loads(path.read_bytes())
    document["predicate"]["buildDefinition"]["externalParameters"].update(parameters)
    write_atomic(path, dump_json(document))
    (folder / "model.sig").unlink()
    write_atomic(folder / "model.sig", sign_files("x", folder_digests(folder), sim.sites["site-a"].signer))


# What the call asks for, and what it then says about the same contribution.
ASKED: dict[str, tuple[dict[str, Any], str]] = {
    "as much as there is": ({"lora": WantedLora(rank=4)}, "admitted"),
    "a smaller rank": ({"lora": WantedLora(rank=3)}, "CALL_SHAPE"),
    "fewer modules": ({"lora": WantedLora(targets=("up_proj",))}, "CALL_SHAPE"),
    "other modules": ({"lora": WantedLora(targets=("q_proj",))}, "CALL_SHAPE"),
    "modules of one layer": (
        {"lora": WantedLora(targets=tuple(f"layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")))},
        "CALL_SHAPE",
    ),
    "another kind": ({"want": ["traces"]}, "CALL_KIND"),
    "another site": ({"sites": [{"id": "site-b", "domain": "ordering"}]}, "CALL_SITE"),
    "another domain": ({"sites": [{"id": "site-a", "domain": "ordering"}]}, "CALL_SITE"),
    "another base": ({"base": {"name": "tiny", "dirHash": "0" * 64}}, "CALL_BASE"),
    "an answer made before it ended": ({"deadline": timedelta(seconds=1)}, "admitted"),
    "an answer made earlier": ({"deadline": timedelta(seconds=-1)}, "CALL_EXPIRED"),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_contribution_is_what_its_call_asked_for(sim: FederationSim, name: str) -> None:
    """Judged by the coordinator, whatever the site thought of it; and by an honest site before it signs."""
    wanted, outcome = ASKED[name]
    document = json.loads(make(sim).payload) | wanted
    if "deadline" in wanted:
        document["deadline"] = format_time(sim.now + wanted["deadline"])
    document["lora"] = wanted.get("lora", WantedLora()).model_dump(mode="json")
    asked = parse_call(dump_json(document))
    envelope = sign_envelope(asked.payload, CALL_TYPE, [sim.coordinator])
    write_atomic(sim.coordinator_home / "calls" / f"{asked.id}.json", envelope)
    adapter, _ = sim.contribute("site-a")
    reference = {"id": asked.id, "nonce": asked.nonce, "sha256": asked.digest}
    alter_provenance(sim, adapter.path, call=reference, expires="2126-01-01T00:00:00Z")
    receipt = sim.receive(adapter.path)[0]
    assert (receipt.refusal.code if receipt.refusal else receipt.outcome) == outcome
    if outcome == "CALL_SHAPE":
        with pytest.raises(RefusedError) as refusal:
            sim.contribute("site-a", call=asked)
        assert refusal.value.code == outcome


# Traces -------------------------------------------------------------------------------------------


@pytest.fixture
def base_with_tokens(sim: FederationSim, tmp_path: Path) -> FederationSim:
    """The same federation on a base whose tokenizer knows a marker that no pattern of ours knows."""
    folder = tmp_path / "base"
    shutil.copytree(sim.base.path, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    tokenizer["added_tokens"].append({"id": 300, "content": "<file_sep>", "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    sim.base = Base(sim.base.name, folder, sim.base.digest)
    return sim


def test_traces_with_a_control_token_of_the_base_are_refused(base_with_tokens: FederationSim) -> None:
    sim = base_with_tokens
    run = sim.sites["site-a"].folder / "runs" / "clock"
    trace = decode((run / "traces.jsonl").read_bytes())[0].model_copy(update={"completion": "1 <file_sep> 2"})
    assert is_plain_text(trace.completion)
    write_passed(run, [trace])
    with pytest.raises(RefusedError) as refusal:
        sim.contribute("site-a")
    assert refusal.value.code == "TRACES_CONTROL_TOKENS"
    site = sim.sites["site-a"]
    made = contribute(site.folder, "clock", site.signer, sim.federation, sim.now, traces=True)
    assert code(sim.receive(made[1].path)) == "TRACES_CONTROL_TOKENS"


@pytest.mark.parametrize(
    "change", [{"completion": "Answer: 99:99"}, {"generator": "no-such"}, {"task": "numeric"}, {"config": {"x": 1}}]
)
def test_traces_are_made_again_and_one_that_does_not_hold_refuses_them(
    sim: FederationSim, change: dict[str, Any]
) -> None:
    right = make_traces(4)
    write_passed(sim.sites["site-a"].folder / "runs" / "clock", [*right[:3], right[3].model_copy(update=change)])
    (receipt,) = sim.receive(sim.contribute("site-a")[1].path)
    assert code([receipt]) == "TRACES_UNVERIFIED" and receipt.refusal and "line 4" in receipt.refusal.what
    write_passed(sim.sites["site-a"].folder / "runs" / "clock", right)
    assert sim.receive(sim.contribute("site-a")[1].path)[0].outcome == "admitted"


def test_a_generator_that_is_not_installed_here_refuses_the_traces_and_stops_nothing_else(
    sim: FederationSim, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(trace: Trace) -> None:
        raise MissingError("PACKAGE_MISSING", "problems of reasoning-gym need a package that is not installed")

    monkeypatch.setattr(intake, "rederive", missing)
    traces, adapter = sim.receive(*(each.path for each in sim.contribute("site-a")[::-1]))
    assert code([traces]) == "TRACES_UNVERIFIED" and adapter.outcome == "admitted"


def test_ordinary_traces_pass_on_such_a_base(base_with_tokens: FederationSim) -> None:
    made = base_with_tokens.contribute("site-a")[1]
    assert base_with_tokens.receive(made.path)[0].outcome == "admitted"


def test_a_contribution_for_another_base_of_the_federation_is_refused(sim: FederationSim) -> None:
    adapter, _ = sim.contribute("site-a")
    sim.base = Base("other", sim.base.path, "0" * 64)
    assert code(sim.receive(adapter.path)) == "BASE_MISMATCH"


# Limits -------------------------------------------------------------------------------------------


def test_a_site_cannot_fill_the_store(sim: FederationSim, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = sim.contribute("site-a")[0], sim.contribute("site-b")[0]
    size = sum(path.stat().st_size for path in first.path.iterdir())
    monkeypatch.setattr(intake, "MAX_SITE_BYTES", size + 1000)
    assert sim.receive(first.path)[0].outcome == "admitted"
    assert code(sim.receive(sim.contribute("site-a")[0].path)) == "SITE_QUOTA"
    assert sim.receive(other.path)[0].outcome == "admitted"  # what one site sent does not count for another


def test_refusals_cannot_fill_the_disk(sim: FederationSim, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, _ = sim.contribute("site-a")
    (adapter.path / "adapter_config.json").write_bytes(b"{}")
    monkeypatch.setattr(intake, "MAX_QUARANTINE_BYTES", 1000)
    kept = sim.receive(adapter.path)[0].kept
    assert kept is not None and [path.name for path in kept.iterdir()] == ["reason.json"]


# Withdrawn trust ----------------------------------------------------------------------------------


def withdrawn(sim: FederationSim, reason: str, at: datetime) -> Federation:
    """The federation once a revocation list with site-a's key was accepted."""
    entry = RevokedKey(keyid=sim.sites["site-a"].signer.keyid, at=at, reason=reason)  # type: ignore[arg-type]
    accepted = no_revocations(sim.federation.id).model_copy(update={"keys": (entry,)})
    return with_revocations(sim.federation, accepted)


@pytest.mark.parametrize("reason", ["rotated", "compromised"])
def test_what_comes_after_a_revocation_is_refused(
    sim: FederationSim, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = sim.contribute("site-a")[0], sim.contribute("site-b")[0]
    monkeypatch.setattr(FederationSim, "federation", withdrawn(sim, reason, sim.now))
    refused, passed = sim.receive(ours.path, theirs.path)
    assert refused.refusal is not None and refused.refusal.code == "KEY_REVOKED"
    assert passed.outcome == "admitted"


@pytest.mark.parametrize(("since", "composed"), [(timedelta(seconds=-1), ["site-b"]), (timedelta(1), None)])
def test_what_was_received_after_a_revocation_is_left_out_of_composing(
    sim: FederationSim,
    since: timedelta,
    composed: list[str] | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The list may come later than what it speaks of; what was received before the key's end still counts."""
    for site in sim.sites:
        sim.receive(sim.contribute(site)[0].path)
    monkeypatch.setattr(FederationSim, "federation", withdrawn(sim, "compromised", sim.now + since))
    assert [each.site for each in sim.admitted()] == (composed or ["site-a", "site-b"])
    assert ("is reported compromised" in caplog.text) == (composed is None)
    assert ("left out: KEY_REVOKED" in caplog.text) == (composed is not None)


# Crashes ------------------------------------------------------------------------------------------


def killed(action: Callable[[], object]) -> None:
    """Run `action` in a copy of this process that ends without tidying up anything."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, "it was not killed where it should have been"


def die(*_: object, **__: object) -> None:
    os._exit(9)


def die_before(event: str) -> Callable[..., None]:
    record = Decisions.record

    def recording(self: Decisions, what: str, **fields: Any) -> None:
        if what == event:
            os._exit(9)
        record(self, what, **fields)

    return recording


def half_a_line(descriptor: int, line: bytes) -> None:
    os.write(descriptor, line[: len(line) // 2])
    os._exit(9)


CRASHES: dict[str, tuple[object, str, object]] = {
    "while it was verified": (intake, "verify_contribution", die),
    "in the store, not yet written down": (Decisions, "record", die_before("received")),
    "in the middle of a line": (ledger, "_write", half_a_line),
    "received, not yet admitted": (Decisions, "record", die_before("admitted")),
    "written down, the state not yet": (decisions, "_remember", die),
}


@pytest.mark.parametrize("name", CRASHES)
def test_after_a_crash_receiving_again_repairs_everything(
    sim: FederationSim, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, adapter = sim.contribute("site-b")[0], sim.contribute("site-a")[0]
    sim.receive(first.path)
    with monkeypatch.context() as crash:
        place, attribute, replacement = CRASHES[name]
        crash.setattr(place, attribute, replacement)
        killed(lambda: sim.receive(adapter.path))
    complete = name == "written down, the state not yet"
    assert [each.site for each in admitted_after_repair(sim)] == (["site-a"] if complete else []) + ["site-b"]
    assert sim.receive(adapter.path)[0].outcome == ("already admitted" if complete else "admitted")
    assert [each.site for each in sim.admitted()] == ["site-a", "site-b"]
    assert list((sim.coordinator_home / "quarantine").iterdir()) == []
    assert len(list((sim.coordinator_home / "store").iterdir())) == 2
    events = [entry.event for entry in ledger.verify(sim.coordinator_home / "ledger.jsonl")]
    assert events.count("admitted") == 2
    assert ("repaired" in events) == (name == "in the middle of a line")


def admitted_after_repair(sim: FederationSim) -> list[VerifiedContribution]:
    """What the next command finds; every command opens the ledger for writing first."""
    with deciding(sim.coordinator_home, sim.now):
        pass
    return sim.admitted()


def test_after_a_crash_while_refusing_the_ledger_says_why_and_the_copy_is_gone(
    sim: FederationSim, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, _ = sim.contribute("site-a")
    (adapter.path / "adapter_config.json").write_bytes(b"{}")
    with monkeypatch.context() as crash:
        crash.setattr(intake, "write_json", die)
        killed(lambda: sim.receive(adapter.path))
    quarantine = sim.coordinator_home / "quarantine"
    assert [path.name.startswith(".receiving-") for path in quarantine.iterdir()] == [True]
    sim.receive(sim.contribute("site-b")[0].path)
    assert list(quarantine.iterdir()) == []
    (entry, *_) = ledger.verify(sim.coordinator_home / "ledger.jsonl")
    assert (entry.event, entry.fields["code"]) == ("refused", "FILE_CHANGED")


def test_two_that_receive_at_once_take_turns(sim: FederationSim) -> None:
    folders = [each.path for site in sim.sites for each in sim.contribute(site)]
    children = []
    for folder in folders:
        children.append(os.fork())
        if children[-1] == 0:
            os._exit(sim.receive(folder)[0].outcome != "admitted")
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert len(sim.admitted()) == 4
    assert [entry.event for entry in ledger.verify(sim.coordinator_home / "ledger.jsonl")] == [
        "received", "admitted",
    ] * 4  # fmt: skip
