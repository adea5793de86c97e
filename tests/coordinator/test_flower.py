"""The two Flower apps together, in one process. `tests/flow/test_superlink.py` runs the same two over a
network."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from fedcompose import ledger
from fedcompose.call import WantedLora, make_call, read_own_call, verify_call
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.files import MAX_JSON_BYTES
from fedcompose.wire import Array, Message, RecordDict, Status
from fedcompose_client.flower import make_app
from fedcompose_client.jobs import record
from fedcompose_coordinator import commands_flower
from tests.coordinator.test_intake import die, killed
from tests.flower_sim import FlowerSim, files_of

NOW = datetime(2026, 11, 20, tzinfo=UTC)


@pytest.fixture
def sim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FlowerSim:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nothing here has to survive a power cut, and it is slow
    return FlowerSim(tmp_path)


@pytest.fixture
def called(sim: FlowerSim) -> FlowerSim:
    """A federation whose sites have accepted a call."""
    sim.call()
    assert {outcome.code for outcome in sim.run("call").values()} == {"ACCEPTED"}
    return sim


class MeddlingApp:
    """A site whose answers to one action are changed on their way."""

    def __init__(self, sim: FlowerSim, site: str, action: str, change: Callable[[RecordDict], None]) -> None:
        self.app, self.site, self.action, self.change = make_app(sim.folder(site)), site, action, change

    def __call__(self, message: Message, context: object) -> Message:
        reply = self.app(message, context)  # type: ignore[arg-type]
        if message.metadata.message_type == f"query.{self.action}":
            self.change(reply.content)
        return reply


def kept_calls(sim: FlowerSim, site: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((sim.folder(site) / "calls").glob("*.json"))]


def meddled(sim: FlowerSim, action: str, change: Callable[[RecordDict], None]) -> str:
    """The outcome at site-a when its answers to one action are changed; site-b must not notice."""
    for site in sim.sites:
        sim.fill_outbox(site)
    apps = [MeddlingApp(sim, "site-a", action, change), make_app(sim.folder("site-b"))]
    outcomes = sim.run("collect", apps=apps)
    assert outcomes["site-b"].code == "ACCEPTED"
    assert files_of(sim.inbox("site-b")) == files_of(sim.outbox("site-b"))
    return outcomes["site-a"].code


def test_a_call_and_two_contributions_cross_byte_for_byte(sim: FlowerSim) -> None:
    envelope = sim.call()
    assert {outcome.code for outcome in sim.run("call").values()} == {"ACCEPTED"}
    for site in sim.sites:
        sim.fill_outbox(site)
        assert kept_calls(sim, site) == [envelope]
    outcomes = sim.run("collect")
    for site in sim.sites:
        assert outcomes[site].code == "ACCEPTED"
        assert outcomes[site].folders == (str(sim.inbox(site) / "adapter"), str(sim.inbox(site) / "traces"))
        assert files_of(sim.inbox(site)) == files_of(sim.outbox(site))


@pytest.mark.parametrize("window_bytes", [3, 7, 1000])
def test_windows_of_any_size_give_the_same_bytes(called: FlowerSim, window_bytes: int) -> None:
    called.fill_outbox("site-a", size=10 * window_bytes)
    outcomes = called.run("collect", window_bytes=window_bytes)
    assert outcomes["site-a"].code == "ACCEPTED"
    assert files_of(called.inbox("site-a")) == files_of(called.outbox("site-a"))


def test_a_site_may_contribute_an_adapter_alone(called: FlowerSim) -> None:
    called.fill_outbox("site-a", kinds=["adapter"])
    assert called.run("collect")["site-a"].folders == (str(called.inbox("site-a") / "adapter"),)


def test_only_what_the_call_wants_crosses(sim: FlowerSim) -> None:
    sim.call(want=["adapter"])
    sim.run("call")
    sim.fill_outbox("site-a")
    sim.run("collect")
    assert {name.partition("/")[0] for name in files_of(sim.inbox("site-a"))} == {"adapter"}


def test_a_site_that_is_not_ready_says_how_far_it_is(called: FlowerSim) -> None:
    called.fill_outbox("site-b")
    lines = [{"time": 100.0 + step, "stage": "rlvr", "step": step, "steps": 40} for step in range(11)]
    run = called.folder("site-a") / "runs" / "math"
    run.mkdir(parents=True)
    (run / "progress.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for event in ("approved", "started"):
        record(called.folder("site-a"), read_own_call(called.newest_call()).id, event, called.now)
    outcomes = called.run("collect")
    assert outcomes["site-a"].code == "NOT_READY"
    assert outcomes["site-a"].status == Status("training", step=10, steps=40, eta_s=30)
    assert outcomes["site-b"].code == "ACCEPTED"
    assert not called.inbox("site-a").exists()


def test_a_site_that_is_not_there_does_not_stop_the_others(called: FlowerSim) -> None:
    called.fill_outbox("site-b")
    outcomes = called.run("collect", apps=[make_app(called.folder("site-b"))])
    assert {site: outcome.code for site, outcome in outcomes.items()} == {
        "site-a": "SITE_UNAVAILABLE",
        "site-b": "ACCEPTED",
    }


def test_a_crashing_app_is_an_outcome_of_its_own_site(called: FlowerSim) -> None:
    def crash(content: RecordDict) -> None:
        raise RuntimeError

    assert meddled(called, "fetch", crash) == "SITE_FAILED"


def test_a_new_contribution_replaces_the_older_one_whole(called: FlowerSim) -> None:
    called.fill_outbox("site-a")
    called.run("collect")
    for path in (called.outbox("site-a") / "traces").iterdir():
        path.unlink()
    (called.outbox("site-a") / "adapter" / "model.sig").write_bytes(b"new")
    called.sign("site-a")
    called.run("collect")
    assert files_of(called.inbox("site-a")) == files_of(called.outbox("site-a"))


# Hostile sites ------------------------------------------------------------------------------------


def set_field(name: str, value: object) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        content["answer"][name] = value

    return change


def set_first(name: str, value: object) -> Callable[[RecordDict], None]:
    """The first entry of one of the lists that announce the files."""

    def change(content: RecordDict) -> None:
        content["answer"][name] = [value, *content["answer"][name][1:]]

    return change


def set_array(**changes: object) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        first = next(iter(content["parts"].values()))
        first.__dict__.update(changes)

    return change


def other_bytes(content: RecordDict) -> None:
    first = next(iter(content["parts"].values()))
    first.__dict__.update(data=bytes(len(first.data)))


def drop_one(content: RecordDict) -> None:
    for name in ("names", "sizes", "sha256"):
        content["answer"][name] = content["answer"][name][1:]


def add_array(content: RecordDict) -> None:
    content["parts"]["adapter/../../x"] = Array("uint8", (1,), "fedcompose.raw", b"x")


@pytest.mark.parametrize(
    ("action", "change", "code"),
    [
        pytest.param("offer", set_first("names", "adapter/../../../x"), "MESSAGE_INVALID", id="path-in-name"),
        pytest.param("offer", set_first("names", "/etc/passwd"), "MESSAGE_INVALID", id="absolute-name"),
        pytest.param("offer", set_first("names", "adapter/adapter_model.bin"), "MESSAGE_INVALID", id="unlisted-name"),
        pytest.param("offer", set_first("names", "traces/traces.jsonl"), "MESSAGE_INVALID", id="name-twice"),
        pytest.param("offer", set_first("sizes", -1), "MESSAGE_INVALID", id="negative-size"),
        pytest.param("offer", set_first("sizes", 1 << 50), "MESSAGE_INVALID", id="huge-size"),
        pytest.param(
            "offer", set_first("sizes", MAX_JSON_BYTES + 1), "MESSAGE_INVALID", id="size-over-the-limit-of-its-file"
        ),
        pytest.param("offer", set_first("sizes", 5), "OFFER_CHANGED", id="another-size"),
        pytest.param("offer", set_first("sha256", "0" * 64), "OFFER_CHANGED", id="another-digest"),
        pytest.param("fetch", other_bytes, "CONTRIBUTION_DIGEST", id="other-bytes"),
        pytest.param("offer", set_first("sha256", "x"), "MESSAGE_INVALID", id="no-digest"),
        pytest.param("offer", drop_one, "MESSAGE_INVALID", id="a-file-left-out"),
        pytest.param("fetch", add_array, "MESSAGE_INVALID", id="one-array-more"),
        pytest.param("fetch", set_array(data=b"short"), "MESSAGE_INVALID", id="short-array"),
        pytest.param("fetch", set_array(stype="numpy.ndarray"), "MESSAGE_INVALID", id="serialised-array"),
        pytest.param("fetch", set_array(dtype="float32"), "MESSAGE_INVALID", id="array-of-numbers"),
        pytest.param("fetch", lambda content: content.pop("parts"), "MESSAGE_INVALID", id="no-arrays"),
        pytest.param("offer", lambda content: content.pop("answer"), "MESSAGE_INVALID", id="no-answer"),
        pytest.param("offer", set_field("code", "\x1b[31mX"), "MESSAGE_INVALID", id="escape-in-code"),
        pytest.param("offer", set_field("names", 7), "MESSAGE_INVALID", id="no-list"),
    ],
)
def test_a_hostile_site_leaves_nothing_in_the_inbox(
    called: FlowerSim, action: str, change: Callable[[RecordDict], None], code: str
) -> None:
    assert meddled(called, action, change) == code
    assert not called.inbox("site-a").exists()
    assert list(files_of(called.home / "inbox" / "site-a")) == []


def test_an_offer_that_changes_while_it_is_fetched_is_refused(called: FlowerSim) -> None:
    called.fill_outbox("site-a", size=2000)
    seen = []

    def change_after_the_first(content: RecordDict) -> None:
        seen.append(content)
        (called.outbox("site-a") / "adapter" / "model.sig").write_bytes(b"changed" * len(seen))
        called.sign("site-a")

    apps = [MeddlingApp(called, "site-a", "fetch", change_after_the_first)]
    assert called.run("collect", apps=apps, window_bytes=300)["site-a"].code == "OFFER_CHANGED"
    assert not called.inbox("site-a").exists()
    assert called.run("collect")["site-a"].code == "ACCEPTED"
    assert files_of(called.inbox("site-a")) == files_of(called.outbox("site-a"))


@pytest.mark.parametrize(("state", "eta"), [("hacked", 0), ("training", -2), ("training", "soon")])
def test_a_status_outside_the_agreed_words_and_limits_is_refused(called: FlowerSim, state: str, eta: object) -> None:
    def change(content: RecordDict) -> None:
        content["answer"]["state"], content["answer"]["eta_s"] = state, eta

    outcomes = called.run("collect", apps=[MeddlingApp(called, "site-a", "status", change)])
    assert outcomes["site-a"].code == "MESSAGE_INVALID"


# The call -----------------------------------------------------------------------------------------


def test_a_call_names_every_active_site_and_verifies_at_each(sim: FlowerSim) -> None:
    envelope = sim.call()
    for site, domain in sim.sites.items():
        call = verify_call(envelope, sim.federation, site, sim.now)
        assert call.domain_of(site) == domain
        assert call.nonce == bytes(range(32)).hex()
        assert (call.base.name, call.want) == ("base", ("adapter", "traces"))


@pytest.mark.parametrize(
    ("base", "days", "code"), [("another", 1, "CALL_INPUT"), ("base", -1, "CALL_INPUT")], ids=["base", "deadline"]
)
def test_a_call_that_no_site_could_accept_is_not_made(sim: FlowerSim, base: str, days: int, code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_call(
            sim.federation,
            sim.signer,
            base,
            ["adapter"],
            deadline=sim.now + timedelta(days=days),
            now=sim.now,
            nonce=bytes(32),
        )
    assert caught.value.code == code


def test_only_a_coordinator_can_make_a_call(sim: FlowerSim) -> None:
    deadline = sim.now + timedelta(days=1)
    with pytest.raises(RefusedError) as caught:
        make_call(sim.federation, sim.root_signer, "base", ["adapter"], deadline=deadline, now=sim.now, nonce=bytes(32))
    assert caught.value.code == "KEY_UNKNOWN"


def test_a_later_call_is_the_newest(sim: FlowerSim) -> None:
    sim.call()
    later = sim.call(now=sim.now + timedelta(seconds=1), nonce=bytes(32))
    sim.run("call")
    assert later in kept_calls(sim, "site-a")


# The commands -------------------------------------------------------------------------------------


def command(sim: FlowerSim, *arguments: str, sites: bool = True) -> tuple[int, dict[str, Any]]:
    app = typer.Typer()
    commands_flower.register(app)
    options = [option for site in sim.sites for option in ("--sites", str(sim.folder(site)))] if sites else []
    result = CliRunner().invoke(app, [*arguments, "--home", str(sim.home), "--json", *options])
    return result.exit_code, json.loads(result.stdout)


def test_the_commands_call_and_collect_from_folders_on_this_machine(sim: FlowerSim) -> None:
    status, called = command(sim, "call", "--days", "3")
    assert status == 0
    assert read_own_call(Path(called["call"]).read_bytes()).id == called["id"]
    for site in sim.sites:
        sim.fill_outbox(site)
    status, collected = command(sim, "collect")
    assert status == 0
    assert collected["folders"] == [str(sim.inbox(site) / kind) for site in sim.sites for kind in ("adapter", "traces")]


def test_a_call_is_written_down_and_tells_the_sites_how_far_the_ledger_had_come(sim: FlowerSim) -> None:
    path = sim.home / "ledger.jsonl"
    ledger.append(path, "refused", sim.now, contribution="0" * 64, code="X")
    before = ledger.head(path)
    _, called = command(sim, "call")
    made = read_own_call(Path(called["call"]).read_bytes())
    (_, entry) = ledger.verify(path, {"the sites": before})
    assert (entry.event, dict(entry.fields)) == ("called", {"call": made.id, "sha256": made.digest})
    assert made.ledger == before
    kept = (sim.folder("site-a") / "calls" / f"{made.id}.json").read_bytes()
    assert read_own_call(kept).ledger == before


def test_the_settings_say_what_loras_a_call_asks_for(sim: FlowerSim) -> None:
    with (sim.home / "coordinator.toml").open("a") as settings:
        settings.write('\n[call]\nrank = 8\ntargets = ["up_proj"]\n')
    _, called = command(sim, "call", sites=False)
    assert read_own_call(Path(called["call"]).read_bytes()).lora == WantedLora(rank=8, targets=("up_proj",))


def test_after_a_crash_before_the_call_was_written_calling_again_goes_on(
    sim: FlowerSim, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as crash:
        crash.setattr(commands_flower, "write_atomic", die)
        killed(lambda: command(sim, "call", sites=False))
    assert list(sim.home.glob("calls/*.json")) == []
    assert command(sim, "call")[0] == 0
    assert [entry.event for entry in ledger.verify(sim.home / "ledger.jsonl")] == ["called", "called"]


@pytest.mark.parametrize(
    ("tamper", "code"),
    [
        (lambda path: path.unlink(), "LEDGER_SHRUNK"),
        (lambda path: (path.unlink(), ledger.append(path, "refused", NOW, code="OTHER")), "LEDGER_FORKED"),
    ],
    ids=["deleted", "another"],
)
def test_sites_refuse_the_call_of_a_coordinator_that_lost_its_ledger(
    sim: FlowerSim, tamper: Callable[[Path], object], code: str
) -> None:
    """Even one that threw away everything it had that could tell."""
    ledger.append(sim.home / "ledger.jsonl", "refused", NOW, code="X")
    assert command(sim, "call")[0] == 0
    (sim.home / "state.json").unlink()
    for call in (sim.home / "calls").glob("*.json"):
        call.unlink()
    tamper(sim.home / "ledger.jsonl")
    later = sim.now + timedelta(minutes=1)
    sim.call(now=later, nonce=bytes(32), ledger=ledger.head(sim.home / "ledger.jsonl"))
    outcomes = sim.run("call")
    assert {outcome.code for outcome in outcomes.values()} == {code}
    assert len(kept_calls(sim, "site-a")) == 1


def test_the_command_fails_when_a_site_refuses(sim: FlowerSim) -> None:
    config = sim.folder("site-a") / "site.toml"
    config.write_text(config.read_text().replace("domains.math", "domains.chess"))
    status, called = command(sim, "call")
    assert status == 1
    assert [site["code"] for site in called["sites"]] == ["DOMAIN_UNKNOWN", "ACCEPTED"]


def test_the_command_makes_no_call_for_a_base_that_the_federation_does_not_have(sim: FlowerSim) -> None:
    (sim.base / "config.json").write_bytes(b'{"another": "base"}')
    app = typer.Typer()
    commands_flower.register(app)
    result = CliRunner().invoke(app, ["call", "--home", str(sim.home)])
    assert isinstance(result.exception, ConfigError)
    assert result.exception.code == "CALL_INPUT"
    assert not (sim.home / "calls").exists()
