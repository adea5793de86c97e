"""Following calls to their end, in one process: interruptions, resumption, what is judged, what is missed."""

from __future__ import annotations

import importlib
import os
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError

from fedcompose import ledger, wire
from fedcompose.parts import part_limits
from fedcompose.wire import Context, Error, ErrorCode, Message, NodeInfo, TaskIdentity
from fedcompose_client.flower import make_app
from fedcompose_coordinator import driver, flower, partial
from fedcompose_coordinator.flower import Exchange, Talk, make_driver_app
from fedcompose_coordinator.jobs import Job, call_paths, jobs_of
from fedcompose_coordinator.local_grid import run_locally
from fedcompose_coordinator.partial import Partial
from fedcompose_coordinator.status import read_status
from tests.flower_sim import FlowerSim, files_of

WINDOW = 500
DEADLINE_S = 60


@pytest.fixture
def sim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FlowerSim:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    for name in ("STATUS_EVERY_S", "JOBS_EVERY_S", "NODE_EVERY_S", "FIRST_PAUSE_S", "LONGEST_PAUSE_S"):
        monkeypatch.setattr(flower, name, 0.01)
    return FlowerSim(tmp_path)


class CountingApp:
    """A site that counts the bytes it hands over, and whose messages can be made to fail."""

    def __init__(self, sim: FlowerSim, site: str, fail: Callable[[str, int], bool] = lambda action, n: False) -> None:
        self.app, self.site, self.fail = make_app(sim.folder(site)), site, fail
        self.bytes, self.asked = 0, list[str]()

    def __call__(self, message: Message, context: Context) -> Message:
        action = message.metadata.message_type.removeprefix("query.")
        self.asked.append(action)
        if self.fail(action, self.asked.count(action)):
            raise ConnectionError
        reply = self.app(message, context)
        if action == "fetch" and "parts" in reply.content:
            self.bytes += sum(len(array.data) for array in reply.content["parts"].values())
        return reply


class Killed(BaseException):
    """Nothing of ours catches it, as nothing catches a SIGKILL."""


def admit(job: Job) -> None:
    job.enter("admitted", job.call.issued)


def drive(
    sim: FlowerSim,
    apps: list[CountingApp],
    until: Callable[[], bool],
    judge: Callable[[Job], None] = admit,
) -> None:
    give_up = time.monotonic() + DEADLINE_S

    def is_ended() -> bool:
        assert time.monotonic() < give_up, states(sim)
        return until()

    run_locally(make_driver_app(sim.home, judge, is_ended, window_bytes=WINDOW, hear_every_s=0.001), apps)


def states(sim: FlowerSim) -> dict[str, str]:
    return {job.site.id: job.state for path in call_paths(sim.home) for job in jobs_of(sim.home, path)}


def reached(sim: FlowerSim, *state: str) -> Callable[[], bool]:
    return lambda: tuple(states(sim).values()) == state


def stream_bytes(sim: FlowerSim, site: str) -> int:
    return sum(len(data) for data in files_of(sim.outbox(site)).values())


def events(sim: FlowerSim, site: str) -> list[str]:
    return [entry.event for entry in ledger.verify(call_paths(sim.home)[-1].with_suffix("") / f"{site}.jsonl")]


def asked_and_signed(sim: FlowerSim, **options: int) -> list[CountingApp]:
    """Sites that have been asked and then had something to hand over."""
    sim.call()
    apps = [CountingApp(sim, site) for site in sim.sites]
    drive(sim, apps, reached(sim, "asked", "asked"))
    for site in sim.sites:
        sim.fill_outbox(site, **options)
    return [CountingApp(sim, site) for site in sim.sites]


def test_a_call_is_followed_to_its_end(sim: FlowerSim) -> None:
    apps = asked_and_signed(sim, size=5000)
    drive(sim, apps, reached(sim, "admitted", "admitted"))
    for app in apps:
        assert files_of(sim.inbox(app.site)) == files_of(sim.outbox(app.site))
        assert app.bytes == stream_bytes(sim, app.site)
        assert events(sim, app.site) == ["asked", "ready", "fetching", "received", "admitted"]
        assert "call" not in app.asked, "the call was handed over twice"
    assert [(each.state, each.bytes == each.total) for each in read_status(sim.home, sim.now)] == [
        ("admitted", True)
    ] * 2


def test_a_call_made_meanwhile_is_found(sim: FlowerSim) -> None:
    seen = []

    def until() -> bool:
        if not seen:
            seen.append(sim.call())
        return reached(sim, "asked", "asked")()

    drive(sim, [CountingApp(sim, site) for site in sim.sites], until)


def test_a_driver_killed_again_and_again_sends_nothing_twice_but_the_windows_on_their_way(sim: FlowerSim) -> None:
    asked_and_signed(sim, size=10_000)
    app, kills = CountingApp(sim, "site-a"), 0
    while states(sim)["site-a"] != "admitted":
        before = app.bytes

        def until(before: int = before, again: bool = kills < 10) -> bool:
            if again and app.bytes >= before + 4 * WINDOW:
                raise Killed
            return states(sim)["site-a"] == "admitted"

        try:
            drive(sim, [app], until)
        except Killed:
            kills += 1
    assert kills == 10 or app.bytes < 44 * WINDOW
    assert files_of(sim.inbox("site-a")) == files_of(sim.outbox("site-a"))
    assert 0 <= app.bytes - stream_bytes(sim, "site-a") <= kills * partial.WINDOWS_AHEAD * WINDOW


def test_lost_messages_are_sent_again(sim: FlowerSim) -> None:
    sim.call()
    flaky = CountingApp(sim, "site-a", fail=lambda action, n: n % 3 == 1)
    drive(sim, [flaky, CountingApp(sim, "site-b")], reached(sim, "asked", "asked"))
    sim.fill_outbox("site-a", size=3000)
    drive(sim, [flaky], reached(sim, "admitted", "asked"))
    assert files_of(sim.inbox("site-a")) == files_of(sim.outbox("site-a"))
    assert events(sim, "site-a") == ["asked", "ready", "fetching", "received", "admitted"]


def test_what_had_come_when_the_driver_died_is_judged_by_the_next_one(sim: FlowerSim) -> None:
    asked_and_signed(sim)

    def die(job: Job) -> None:
        raise Killed

    with pytest.raises(Killed):
        drive(sim, [CountingApp(sim, "site-a")], lambda: False, die)
    app = CountingApp(sim, "site-a")
    drive(sim, [app], reached(sim, "admitted", "asked"))
    assert set(app.asked) <= {"receipt"}


def kept(folder: Path) -> list[bytes]:
    """The receipts in the folder of a site or of the coordinator."""
    return [path.read_bytes() for path in sorted((folder / "receipts").glob("*.json"))]


class LosingApp(CountingApp):
    """A site whose answer to its first receipt is lost, or which never heard of that receipt."""

    def __init__(self, sim: FlowerSim, lost: str) -> None:
        super().__init__(sim, "site-a", lambda action, n: lost == "message" and (action, n) == ("receipt", 1))

    def __call__(self, message: Message, context: Context) -> Message:
        reply = super().__call__(message, context)
        if self.asked[-1] == "receipt":
            raise ConnectionError
        return reply


@pytest.mark.parametrize("lost", ["message", "answer"])
def test_a_receipt_that_was_lost_comes_later_with_the_same_bytes(sim: FlowerSim, lost: str) -> None:
    asked_and_signed(sim)
    app = LosingApp(sim, lost)
    drive(sim, [app], lambda: "receipt" in app.asked and states(sim)["site-a"] == "admitted")
    (signed,) = kept(sim.home)
    assert kept(sim.folder("site-a")) == ([signed] if lost == "answer" else [])
    app, (first, *_) = CountingApp(sim, "site-a"), call_paths(sim.home)
    drive(sim, [app], lambda: "receipt" in jobs_of(sim.home, first)[0].seen)
    assert kept(sim.folder("site-a")) == kept(sim.home) == [signed]
    sim.call(now=sim.now + timedelta(seconds=1), nonce=bytes(32))
    drive(sim, [app], lambda: "call" in app.asked)
    assert app.asked.count("receipt") == 1, "what the site has taken is not sent again"


def test_every_offer_has_one_receipt_even_if_the_next_is_signed_before_it_comes(sim: FlowerSim) -> None:
    asked_and_signed(sim)
    app = LosingApp(sim, "message")
    drive(sim, [app], lambda: "receipt" in app.asked)
    (first,) = kept(sim.home)
    (sim.outbox("site-a") / "adapter" / "model.sig").write_bytes(b"signed again")
    sim.sign("site-a")
    sim.run("collect", apps=[CountingApp(sim, "site-a")])
    assert kept(sim.folder("site-a")) == kept(sim.home)
    assert len(kept(sim.home)) == 2 and first in kept(sim.home)


def test_collecting_again_brings_the_receipt_that_was_lost(sim: FlowerSim) -> None:
    asked_and_signed(sim)
    assert sim.run("collect", apps=[LosingApp(sim, "message")])["site-a"].code == "ACCEPTED"
    signed = kept(sim.home)
    shutil.rmtree(sim.home / "inbox")  # it was admitted, say, and all of it is fetched again
    assert not kept(sim.folder("site-a"))
    sim.run("collect", apps=[CountingApp(sim, "site-a")])
    assert kept(sim.folder("site-a")) == kept(sim.home) == signed


def test_what_lies_in_the_inbox_already_is_not_sent_again(sim: FlowerSim) -> None:
    apps = asked_and_signed(sim)
    assert sim.run("collect")["site-a"].code == "ACCEPTED"
    drive(sim, [apps[0]], lambda: states(sim)["site-a"] == "admitted")
    assert apps[0].bytes == 0


def test_a_rejected_contribution_is_not_fetched_again_but_a_new_one_is(sim: FlowerSim) -> None:
    asked_and_signed(sim)

    def reject(job: Job) -> None:
        job.enter("rejected", job.call.issued, offer=job.offer, code="ADAPTER_INVALID")

    app, polls = CountingApp(sim, "site-a"), []
    drive(sim, [app], lambda: len(polls) > 300 or bool(polls.append(0)), reject)
    assert (app.bytes, states(sim)["site-a"]) == (stream_bytes(sim, "site-a"), "rejected")
    (status, _) = read_status(sim.home, sim.now)
    assert status.said() == "rejected ADAPTER_INVALID"
    (sim.outbox("site-a") / "adapter" / "model.sig").write_bytes(b"signed again")
    sim.sign("site-a")
    drive(sim, [app], lambda: states(sim)["site-a"] == "admitted")
    assert files_of(sim.inbox("site-a")) == files_of(sim.outbox("site-a"))


def test_a_site_that_is_away_misses_the_call_when_its_time_is_over(
    sim: FlowerSim, monkeypatch: pytest.MonkeyPatch
) -> None:
    sim.call(deadline=sim.now + timedelta(days=1))
    with monkeypatch.context() as later:
        later.setattr(Job, "is_over", lambda job, now: job.site.id == "site-a")
        drive(sim, [CountingApp(sim, "site-b")], reached(sim, "missed", "asked"))
    job = jobs_of(sim.home, call_paths(sim.home)[0])[1]
    assert [job.is_over(sim.now + timedelta(days=days)) for days in (0, 2, 30, 32)] == [False, False, False, True]
    job.state = "called"
    assert job.is_over(sim.now + timedelta(days=2))


def test_a_node_that_says_it_is_another_site_gets_no_call(sim: FlowerSim) -> None:
    sim.call()
    impostor = CountingApp(sim, "site-b")
    impostor.site = "site-a"
    polls: list[int] = []
    drive(sim, [impostor], lambda: len(polls) > 100 or bool(polls.append(0)))
    assert set(impostor.asked) == {"describe"}
    assert read_status(sim.home, sim.now)[0].code == "SITE_MISMATCH"


def test_bytes_that_are_not_what_was_offered_never_reach_the_inbox(sim: FlowerSim) -> None:
    asked_and_signed(sim)

    class LyingApp(CountingApp):
        def __call__(self, message: Message, context: Context) -> Message:
            reply = super().__call__(message, context)
            for array in reply.content["parts"].values() if "parts" in reply.content else ():
                array.__dict__.update(data=bytes(len(array.data)))
            return reply

    liar = LyingApp(sim, "site-a")
    drive(sim, [liar], lambda: liar.asked.count("offer") == 2)
    assert not sim.inbox("site-a").exists()
    assert events(sim, "site-a")[-1] == "fetching"


def test_a_broken_fetch_goes_on_with_smaller_windows(tmp_path: Path) -> None:
    size = 40 << 20
    parts = [wire.Part("adapter/model.sig", size, "0" * 64)]
    fetch = Partial(tmp_path / "partial", parts)
    first = fetch.next_windows()
    assert first == [(n * partial.FIRST_WINDOW_BYTES, partial.FIRST_WINDOW_BYTES) for n in range(partial.WINDOWS_AHEAD)]
    assert fetch.next_windows() == []
    fetch.lost(first[0])
    (again,) = fetch.next_windows()
    assert again == (0, partial.FIRST_WINDOW_BYTES // 4)
    fetch.store(first[1], [(piece, bytes(piece.length)) for piece in wire.plan(parts, *first[1])])
    assert Partial(tmp_path / "partial", parts).received == [first[1]]


def test_windows_grow_while_they_arrive_up_to_the_limit(tmp_path: Path) -> None:
    parts = [wire.Part("adapter/model.sig", 1 << 40, "0" * 64)]
    fetch = Partial(tmp_path / "partial", parts)
    for _ in range(100):
        fetch.store(fetch.next_windows()[0], [])
        fetch.asked.clear()
    assert fetch.window_bytes == wire.WINDOW_BYTES


class SilentGrid:
    """A node to which everything is sent, and from which nothing comes but errors for what `failed` names."""

    def __init__(self, site: str) -> None:
        self.nodes = [NodeInfo(node_id=1, name=site)]
        self.sent: list[Message] = []
        self.looked_for: list[str] = []
        self.failed: set[str] = set()

    def get_nodes(self) -> list[NodeInfo]:
        return self.nodes

    def push_messages(self, messages: list[Message]) -> list[str]:
        self.sent += messages
        messages[0].metadata.__dict__["_message_id"] = str(len(self.sent))
        return [str(len(self.sent))]

    def pull_messages(self, ids: list[str]) -> list[Message]:
        self.looked_for += ids
        error = Error(ErrorCode.NODE_UNAVAILABLE, "")
        return [Message(error, reply_to=self.sent[int(id_) - 1]) for id_ in ids if id_ in self.failed]

    def actions(self) -> list[str]:
        return [message.metadata.message_type.rpartition(".")[2] for message in self.sent]


def fetching(sim: FlowerSim) -> tuple[Exchange, Talk, SilentGrid]:
    """A site that has been asked for four windows, and none has come."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # as a driver that runs has them
    sim.call()
    (job, _), grid = jobs_of(sim.home, call_paths(sim.home)[-1]), SilentGrid("site-a")
    exchange, talk = Exchange(job, next="fetch"), Talk(grid)  # type: ignore[arg-type]
    exchange.partial = Partial(job.partial, [wire.Part("adapter/model.sig", 1000, "0" * 64)], 100)
    assert not talk.once([exchange])
    assert len(grid.sent) == partial.WINDOWS_AHEAD == 4
    return exchange, talk, grid


def test_windows_are_looked_for_in_their_order(sim: FlowerSim) -> None:
    """A node answers one question after the other, so those behind one that has not come are not looked for."""
    exchange, talk, grid = fetching(sim)
    assert not talk.once([exchange])
    assert grid.looked_for == ["1"]
    grid.failed.add("1")
    assert talk.once([exchange])
    assert grid.looked_for == ["1", "1", "2"]


def test_an_answer_tells_that_those_before_it_are_lost(sim: FlowerSim) -> None:
    exchange, talk, grid = fetching(sim)
    talk.sent = dict(reversed(talk.sent.items()))  # so that the newest is looked for first
    grid.failed.add("3")
    assert not talk.once([exchange])
    grid.failed.add("4")
    assert talk.once([exchange])
    assert exchange.partial is not None
    assert not talk.sent.keys() & set("1234")
    assert len(talk.sent) == exchange.on_the_way == len(exchange.partial.asked)  # if they are asked for again


def test_a_site_that_stays_silent_is_knocked_at_less_and_less_often(
    sim: FlowerSim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing comes at all, the answer to a knock tells that what was asked before it is lost."""
    exchange, talk, grid = fetching(sim)
    start, seconds = flower.time.monotonic(), 0.0
    monkeypatch.setattr(flower.time, "monotonic", lambda: start + seconds)
    knocks: list[int] = []
    for second in range(300):
        seconds = float(second)
        talk.once([exchange])
        knocks += [second] * (len(grid.sent) - 4 - len(knocks))
    assert len(knocks) == 5
    assert knocks[0] <= flower.QUIET_S + 1
    assert all(later - knock >= knock for knock, later in pairwise(knocks))
    assert grid.actions()[4:] == ["describe"] * len(knocks)
    grid.failed.add("6")
    assert talk.once([exchange])
    assert exchange.job.seen["code"] == "SITE_SILENT"
    assert set(talk.sent) == {"7", "8", "9"}
    assert exchange.next == "fetch"


def test_a_site_that_only_knocks_go_to_holds_nothing(sim: FlowerSim, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its questions have run out, knocks end as well, and others are fetched from; also while it is slow."""
    exchange, talk, grid = fetching(sim)
    job = exchange.job
    others = [Exchange(job, next="fetch") for _ in range(2)]
    for n, other in enumerate(others):
        other.partial = Partial(job.partial / str(n), [wire.Part("adapter/model.sig", 1000, "0" * 64)], 100)
    start, seconds = flower.time.monotonic(), 0.0
    monkeypatch.setattr(flower.time, "monotonic", lambda: start + seconds)
    exchange.slow_at = start + flower.SLOW_S
    talk.once(others[:1])
    assert not talk._has_room(others[1])
    seconds = flower.SLOW_S + 1
    assert talk._has_room(others[1])
    for second in range(700):
        seconds = float(second)
        talk.once([])
    assert talk._busy() == set()
    assert exchange.on_the_way == 0
    asked = len(grid.sent)
    for second in range(700, 2000):
        seconds = float(second)
        talk.once([])
    assert len(grid.sent) == asked
    assert talk.sent == {}


@pytest.mark.parametrize(("every_s", "slow_after_s"), [(50.0, 100.0), (5.0, None)])
def test_a_site_that_sends_little_by_little_does_not_keep_others_waiting(
    sim: FlowerSim, monkeypatch: pytest.MonkeyPatch, every_s: float, slow_after_s: float | None
) -> None:
    """Below a certain pace others are fetched from as well, however punctual each of its windows is."""
    monkeypatch.setattr(flower, "SLOW_BYTES_PER_S", 10)
    seconds = 0.0
    monkeypatch.setattr(flower.time, "monotonic", lambda: seconds)
    sim.call()
    exchange = Exchange(jobs_of(sim.home, call_paths(sim.home)[-1])[0], window_bytes=100, next="offer")
    parts = [wire.Part(name, 4000, "0" * 64) for name in part_limits(["adapter"])]
    slow: list[float] = []
    exchange.answered(exchange.questions()[0], wire.offer_answer(parts))
    for number in range(39):
        (question,) = exchange.questions(1)
        seconds = (number + 1) * every_s
        exchange.answered(question, wire.window_answer({parts[0].name: bytes(100)}))
        slow += [seconds] if exchange.slow_at <= seconds else []
    assert slow[:1] == ([slow_after_s] if slow_after_s else [])
    assert exchange.partial is not None
    assert exchange.partial.received_bytes == 3900


def test_whose_question_is_answered_is_not_for_the_site_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply is read under the SuperLink's head; what cannot be read, or is no message, is an error in its place."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    inflatable = importlib.import_module("flwr.supercore.inflatable.inflatable_object")
    asked, others = (Message(wire.request(), node, "query.describe") for node in (1, 2))
    for message, id_ in ((asked, "a" * 64), (others, "b" * 64)):
        message.metadata.__dict__["_message_id"] = id_
    lying = Message(wire.request(), reply_to=others)
    contents = {id_: each.deflate() for id_, each in inflatable.get_all_nested_objects(lying).items()}
    head = Message(wire.request(), reply_to=asked).metadata
    head.__dict__["_message_id"] = lying.object_id
    read = driver.inflated(head, dict(contents))
    assert read.metadata.reply_to_message_id == "a" * 64
    assert read.has_content()
    for bad in ({}, {lying.object_id: b"no object"}, {lying.object_id: contents[lying.object_id]}):
        assert driver.inflated(head, bad).has_error()


def test_two_sites_at_a_time_share_the_windows_on_their_way(sim: FlowerSim) -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # as a driver that runs has them
    sim.call()
    job, grid = jobs_of(sim.home, call_paths(sim.home)[-1])[0], SilentGrid("site-a")
    talk, exchanges = Talk(grid), [Exchange(job, next="fetch") for _ in range(4)]  # type: ignore[arg-type]
    for n, exchange in enumerate(exchanges):
        exchange.partial = Partial(job.partial / str(n), [wire.Part("adapter/model.sig", 1000, "0" * 64)], 100)
    talk.once(exchanges)
    on_their_way = [exchange.on_the_way for exchange in exchanges]
    assert on_their_way == [4, 2, 0, 0]  # the first comes down to two as its own arrive
    assert exchanges[0].partial is not None
    exchanges[0].partial.asked -= set(list(exchanges[0].partial.asked)[:2])
    talk.once(exchanges)
    assert [exchange.on_the_way for exchange in exchanges] == on_their_way


def test_a_line_cut_short_by_a_crash_is_a_window_that_did_not_come(tmp_path: Path) -> None:
    parts = [wire.Part("adapter/model.sig", 3000, "0" * 64)]
    fetch = Partial(tmp_path / "partial", parts, 1000)
    for window in fetch.next_windows()[:2]:
        fetch.store(window, [(piece, bytes(piece.length)) for piece in wire.plan(parts, *window)])
    lines = tmp_path / "partial" / "windows"
    lines.write_text(lines.read_text() + "2000 10")
    again = Partial(tmp_path / "partial", parts, 1000)
    assert again.received_bytes == 2000
    assert again.next_windows() == [(2000, 1000)]


def test_bytes_that_are_on_their_way_are_soon_asked_for_again() -> None:
    """As it is, the negative control, Flower waits a second, then two; the next window waits behind it."""

    def seconds(pull: Callable[..., dict[str, bytes]]) -> float:
        begun, tries = time.monotonic(), iter((False, False, True))

        def get(id_: str) -> bytes:
            if not next(tries):
                raise ObjectUnavailableError(id_)
            return b"bytes"

        assert pull(["object"], get) == {"object": b"bytes"}
        return time.monotonic() - begun

    assert seconds(driver.pull_promptly) < 2.0 < seconds(driver.pull_objects)
