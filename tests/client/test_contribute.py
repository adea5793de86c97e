from __future__ import annotations

import json
import shutil
from datetime import timedelta
from pathlib import Path

import pytest

from fedcompose.call import make_call, read_own_call
from fedcompose.contribution import KINDS, ReceivedContribution, verify_contribution
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.files import folder_digests
from fedcompose.traces import Trace, encode
from fedcompose_client.claims import run_digest
from fedcompose_client.config import Privacy
from fedcompose_client.firewall import write_passed
from fedcompose_client.offer import outbox_parts
from tests.fedcompose.test_provenance import DP
from tests.federation_sim import FederationSim, make_traces


def test_signs_exactly_the_files_of_the_two_formats(sim: FederationSim) -> None:
    adapter, traces = sim.contribute("site-a")
    assert adapter.path == sim.sites["site-a"].outbox / "adapter"
    assert sorted(path.name for path in adapter.path.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "model.sig", "provenance.json",
    ]  # fmt: skip
    assert sorted(path.name for path in traces.path.iterdir()) == ["model.sig", "provenance.json", "traces.jsonl"]


def test_nothing_about_the_machine_or_the_run_leaves(
    sim: FederationSim, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Names too long to stand in random weights or signatures by chance, as a machine called "vm" does.
    monkeypatch.setattr("socket.gethostname", lambda: "canary-host-4711")
    monkeypatch.setattr("platform.node", lambda: "canary-host-4711")
    monkeypatch.setenv("USER", "canary-user-4711")
    monkeypatch.setenv("LOGNAME", "canary-user-4711")
    site = sim.sites["site-a"]
    result = site.folder / "runs" / "clock" / "result.json"
    result.write_text(json.dumps({**json.loads(result.read_text()), "note": "canary-4711", "seconds": {"total": 1}}))
    sim.contribute("site-a")
    shipped = b"".join(path.read_bytes() for path in sorted(site.outbox.rglob("*")) if path.is_file())
    before = (site.folder / "runs" / "clock" / "expert" / "adapter_config.json").read_text()
    assert str(tiny_base) in before  # PEFT did write the path
    for secret in (str(tiny_base), str(sim.folder), "canary-4711", "canary-host-4711", "canary-user-4711"):
        assert secret.encode() not in shipped


def test_only_listed_numbers_leave_and_rounded(sim: FederationSim) -> None:
    adapter, _ = sim.contribute("site-a")
    assert dict(adapter.provenance.metrics) == {"base_accuracy": 0.7123, "rlvr_accuracy": 0.7123, "test_count": 200}


def test_sequence_numbers_rise_also_when_the_state_file_was_lost(sim: FederationSim) -> None:
    site = sim.sites["site-a"]
    numbers = [each.provenance.sequence for _ in range(2) for each in sim.contribute("site-a")]
    assert numbers == sorted(set(numbers))
    (site.folder / "contribute-state.json").unlink()
    sim.now += timedelta(minutes=1)
    assert sim.contribute("site-a")[0].provenance.sequence > numbers[-1]


def test_a_call_decides_what_leaves_and_is_answered_by_its_nonce(sim: FederationSim) -> None:
    envelope = make_call(
        sim.federation, sim.coordinator, "tiny", ["adapter"],
        deadline=sim.now + timedelta(days=3), now=sim.now, nonce=b"n" * 32,
    )  # fmt: skip
    call = read_own_call(envelope)
    (adapter,) = sim.contribute("site-a", call=call)
    assert adapter.provenance.call is not None and adapter.provenance.call.nonce == call.nonce
    assert adapter.provenance.call.sha256 == call.digest
    assert adapter.provenance.expires > call.deadline


@pytest.mark.parametrize("provenance_class", ["E", "F"])
def test_traces_of_private_questions_stay_unless_declared_non_private(
    sim: FederationSim, provenance_class: str
) -> None:
    site = sim.sites["site-a"]
    question = {"question": "q", "answer": "a"} if provenance_class == "F" else {}
    trace = Trace.model_validate(
        {"provenance_class": provenance_class, "task": "exact", "completion": "Answer: a", **question}
    )
    write_passed(site.folder / "runs" / "clock", [trace])
    with pytest.raises(RefusedError) as refusal:
        sim.contribute("site-a")
    assert refusal.value.code == "TRACES_CLASS"
    assert not (site.outbox / "traces").exists()
    assert sim.contribute("site-a", non_private=True)[1].traces() == [trace]


def test_only_traces_that_the_firewall_let_through_leave(sim: FederationSim) -> None:
    site = sim.sites["site-a"]
    run = site.folder / "runs" / "clock"
    (run / "traces.jsonl").write_bytes(encode(make_traces(2)))
    with pytest.raises(RefusedError) as refusal:
        sim.contribute("site-a")
    assert refusal.value.code == "TRACES_UNREVIEWED"
    (run / "review.json").write_text("{}")
    with pytest.raises(RefusedError) as refusal:
        sim.contribute("site-a")
    assert refusal.value.code == "TRACES_UNREVIEWED"
    write_passed(run, make_traces(2))
    assert sim.contribute("site-a")[1].traces() == make_traces(2)


def test_traces_leave_only_where_the_settings_ask_for_them(sim: FederationSim) -> None:
    """Also those that an earlier signing left in the outbox stay."""
    sim.contribute("site-a")
    outbox = sim.sites["site-a"].outbox
    assert (outbox / "traces").is_dir()
    assert [each.kind for each in sim.contribute("site-a", traces=False)] == ["adapter"]
    assert {part.name.partition("/")[0] for part in outbox_parts(outbox, KINDS)} == {"adapter"}


def test_a_failed_attempt_leaves_the_last_contribution_whole(sim: FederationSim) -> None:
    site = sim.sites["site-a"]
    sim.contribute("site-a")
    before = folder_digests(site.outbox)
    weights = site.folder / "runs" / "clock" / "expert" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(RefusedError):
        sim.contribute("site-a")
    assert folder_digests(site.outbox) == before


def test_without_traces_only_the_adapter_is_signed(sim: FederationSim) -> None:
    (sim.sites["site-a"].folder / "runs" / "clock" / "traces.jsonl").unlink()
    assert [each.kind for each in sim.contribute("site-a")] == ["adapter"]


def test_says_what_is_missing_or_not_allowed(sim: FederationSim) -> None:
    shutil.rmtree(sim.sites["site-a"].folder / "runs" / "clock")
    with pytest.raises(ConfigError) as error:
        sim.contribute("site-a")
    assert error.value.code == "RUN_MISSING"
    sim.sites["site-b"].domain = "clock"
    with pytest.raises(ConfigError) as error:
        sim.contribute("site-b")
    assert error.value.code == "DOMAIN_NOT_ENROLLED"


def signed_twice(sim: FederationSim) -> list[dict[str, str]]:
    """What is in the outbox after signing, and after signing again a minute later with the numbers forgotten."""
    site, found = sim.sites["site-a"], []
    for _ in range(2):
        sim.contribute("site-a")
        found.append(folder_digests(site.outbox))
        (site.folder / "contribute-state.json").unlink()
        sim.now += timedelta(minutes=1)
    return found


def test_at_a_given_time_the_same_run_gives_the_same_bytes(sim: FederationSim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(int(sim.now.timestamp())))
    once, again = signed_twice(sim)
    assert once == again


def test_without_a_given_time_each_signing_is_another(sim: FederationSim) -> None:
    once, again = signed_twice(sim)
    assert once != again


def state_privacy(run: Path, verdict: str) -> None:
    """A private run and its audit, as `train` and `audit` leave them."""
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"dp": DP.model_dump(mode="json")}))
    (run / "settings.json").write_text("{}")
    (run / "audit").mkdir(exist_ok=True)
    audited = {"made_from": run_digest(run), "verdict": verdict}
    (run / "audit" / "audit.json").write_text(json.dumps(audited))


def test_what_a_run_states_about_privacy_travels_and_its_accuracies_do_not(sim: FederationSim) -> None:
    state_privacy(sim.sites["site-a"].folder / "runs" / "clock", "warn")
    adapter, *_ = sim.contribute("site-a", privacy=Privacy(require_audit="warn", max_epsilon=8.0))
    claims = adapter.provenance
    assert claims.dp is not None and claims.metrics == {}
    assert claims.dp.uncounted == (*DP.uncounted, "audit", "trace-selection")
    assert claims.dp.model_copy(update={"uncounted": DP.uncounted}) == DP
    assert claims.audit is not None and claims.audit.verdict == "warn" and claims.audit.numbers is None
    assert claims.limits is not None and claims.limits.max_epsilon == 8.0


@pytest.mark.parametrize(
    ("privacy", "code"),
    [(Privacy(require_audit="pass"), "AUDIT_BELOW_LIMIT"), (Privacy(max_epsilon=7.0), "EPSILON_ABOVE_LIMIT")],
)
def test_nothing_leaves_of_a_run_beyond_the_sites_own_limits(sim: FederationSim, privacy: Privacy, code: str) -> None:
    site = sim.sites["site-a"]
    state_privacy(site.folder / "runs" / "clock", "warn")
    with pytest.raises(RefusedError) as refusal:
        sim.contribute("site-a", privacy=privacy)
    assert refusal.value.code == code
    assert not site.outbox.exists()


def test_whoever_receives_an_adapter_holds_it_to_its_own_sites_limits(
    sim: FederationSim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site whose software was changed signs what its limits forbid; the coordinator refuses it."""
    state_privacy(sim.sites["site-a"].folder / "runs" / "clock", "fail")
    with monkeypatch.context() as broken:
        broken.setattr("fedcompose_client.claims.check_limits", lambda *_: None)
        broken.setattr("fedcompose.contribution.check_limits", lambda *_: None)
        adapter, *_ = sim.contribute("site-a", privacy=Privacy(require_audit="pass"))
    with pytest.raises(RefusedError) as refusal:
        verify_contribution(ReceivedContribution(adapter.path), sim.federation, now=sim.now)
    assert refusal.value.code == "AUDIT_BELOW_LIMIT"
