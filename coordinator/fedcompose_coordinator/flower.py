"""The coordinator's side of Flower: hand over the calls, follow the sites, fetch what they signed.

Input: the calls in `calls/` of the coordinator's folder. Output: `inbox/<site>/<domain>/{adapter,traces}/`, whole or
not at all, and each job's record. Nothing here judges a contribution: the folders are as untrusted as ones that came
by hand, and intake takes them from there. A site is known by the name under which the coordinator registered its node,
and must say the same of itself.

What to ask a site next follows from its job alone, so any process may end at any time and another one goes on. A
message that gets lost, or a site that is away, is asked again, later and later. A site answers one message after the
other, so an answer tells that those before it will not come any more; where nothing comes, a knock is sent. Many sites
are followed at a time; a few are fetched from, one window at a time is taken in, so that memory grows neither with
sites nor with their adapters.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from fedcompose import wire
from fedcompose.errors import ConfigError, FedcomposeError, MissingError, RefusedError
from fedcompose.ledger import Head
from fedcompose.wire import Action, Context, Grid, Message, RecordDict, ServerApp, Status
from fedcompose_coordinator.jobs import ENDED, OURS, Job, call_paths, jobs_of
from fedcompose_coordinator.partial import WINDOWS_AHEAD, Partial, Window, holds
from fedcompose_coordinator.receipts import owed, receipt_for, taken

log = logging.getLogger(__name__)

Step = Literal["call", "collect"]
Ask = Literal["describe", "call", "status", "offer", "fetch"]
Sign = Callable[[Job, Sequence[wire.Part], Head], bytes | None]  # the receipt for all these files of an offer

FETCHED_AT_A_TIME = 2  # sites
WINDOWS_IN_ALL = 4  # on the way from all of them, for the SuperLink holds each of them in memory
ASKED_AT_A_TIME = 64  # sites
REPLY_TIMEOUT_S = 600.0
NODE_TIMEOUT_S = 60.0  # for sites that are still connecting
NODE_EVERY_S = 2.0
HEAR_EVERY_S = 0.2
QUIET_S = 10.0  # after which a site that has not answered is asked for something small as well
SLOW_S = 60.0  # so long without a byte, or at this pace below the other number, and others are fetched from as well
SLOW_BYTES_PER_S = 1 << 20
STATUS_EVERY_S = 10.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 600.0  # before a site is asked again after a failure
JOBS_EVERY_S = 5.0  # looking for new calls

AGAIN: Mapping[str, Ask] = {  # what to ask after these
    "CALL_UNKNOWN": "call",
    wire.NOT_READY: "status",
    wire.OFFER_CHANGED: "offer",
    "CONTRIBUTION_DIGEST": "status",
}


@dataclass(frozen=True)
class Outcome:
    """What came of asking one site: `ACCEPTED`, or why not; after `collect` also how far it is, and what came."""

    site: str
    domain: str
    code: str
    status: Status | None = None
    folders: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """One message to a site, and the window of which transfer it asks for, if any."""

    action: Action
    content: RecordDict
    window: Window | None = None
    partial: Partial | None = None
    is_knock: bool = False  # the answer says nothing but that the site is there


@dataclass(eq=False)
class Exchange:
    """The conversation with one site about one job: what to ask next, and what an answer means.

    `goal` is when it ends: `call` when the site has answered the call, `collect` when it has handed over what it has
    or said how far it is, None when the job has ended.
    """

    job: Job
    goal: Step | None = None
    window_bytes: int | None = None
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    sign: Sign | None = None
    head: Head | None = None  # of the site's egress ledger, the newest that came
    receipt: bytes | None = None  # that the site has not taken yet
    next: Ask = "describe"
    due: float = 0.0  # of `time.monotonic`: not before
    pause_s: float = FIRST_PAUSE_S
    partial: Partial | None = None
    slow_at: float = float("inf")  # of `time.monotonic`: from then on it does not keep others from being fetched from
    on_the_way: int = 0
    outcome: Outcome | None = None

    def __post_init__(self) -> None:
        if self.goal == "collect" or (self.goal is None and self.job.is_accepted):
            self.next = "status"
        self.receipt = owed(self.job, self.clock())

    # Asking

    def questions(self, ahead: int = WINDOWS_AHEAD) -> list[Question]:
        """What to send now: nothing while an answer is awaited, except so many windows ahead."""
        if self.next == "fetch" and self.partial is not None:
            offer = wire.offer_digest(self.partial.parts)
            return [self._window(self.partial, offer, window) for window in self.partial.next_windows(ahead)]
        if self.on_the_way:
            return []
        if self.receipt is not None:
            return [Question("receipt", self._request(receipt=self.receipt))]
        if self.next == "describe":
            return [Question("describe", wire.request())]
        if self.next == "call":
            return [Question("call", wire.request(call=self.job.envelope))]
        return [Question(self.next, self._request())]

    def _window(self, partial: Partial, offer: str, window: Window) -> Question:
        return Question("fetch", self._request(offer=offer, start=window[0], length=window[1]), window, partial)

    def _request(self, **fields: str | int | bytes) -> RecordDict:
        call = self.job.call
        return wire.request(call_id=call.id, nonce=call.nonce, domain=self.job.site.domain, **fields)

    # Hearing

    def answered(self, question: Question, content: RecordDict) -> None:
        """Take in an answer.

        Raises: RefusedError: the site's own code, `MESSAGE_INVALID`, `SITE_MISMATCH`, `PROTOCOL_UNKNOWN`,
            `CONTRIBUTION_DIGEST`.
        """
        if question.is_knock or question.partial is not self.partial:
            return  # or of a transfer that has been given up since
        if question.window is not None and self.partial is not None:
            self._take_window(self.partial, question.window, content)
        else:
            {
                "describe": self._take_description,
                "call": self._take_status,
                "status": self._take_status,
                "offer": self._take_offer,
                "receipt": self._receipt_taken,
            }[question.action](content)
        self.pause_s = FIRST_PAUSE_S

    def failed(self, question: Question, error: FedcomposeError) -> None:
        """Ask again after a while; when only one step is to be taken, this was it."""
        if question.is_knock or (question.partial is not None and question.partial is not self.partial):
            return
        if question.action == "receipt":
            self.receipt = self.receipt if isinstance(error, MissingError) and self.goal is None else None
            self.rest()
            return
        if question.window is not None and self.partial is not None:
            self.partial.lost(question.window)
        self.job.tell(None if isinstance(error, MissingError) else self.clock(), code=error.code)
        self.next = AGAIN.get(error.code, self.next)
        if self.next != "fetch":
            self.partial = None
        self.rest()
        if self.goal is not None:
            self._settle(error.code)

    def rest(self) -> None:
        """Do nothing for a while, and longer the next time."""
        self.due = time.monotonic() + self.pause_s
        self.pause_s = min(2 * self.pause_s, LONGEST_PAUSE_S)

    def _take_description(self, content: RecordDict) -> None:
        found = wire.read_description(content)
        if found.site != self.job.site.id:
            raise RefusedError("SITE_MISMATCH", f"the node of site {self.job.site.id} says that it is another")
        if found.protocol != wire.PROTOCOL:
            raise RefusedError(
                "PROTOCOL_UNKNOWN", "the site speaks another version of these messages",
                expected=f"{wire.PROTOCOL}", got=f"{found.protocol}",
            )  # fmt: skip
        self.next = "call"

    def _take_status(self, content: RecordDict) -> None:
        status = wire.read_status(content)
        if status.state != "ready" or self.job.state not in (*OURS, "fetching", "rejected"):
            self.job.enter(status.state, self.clock())
        self.job.tell(self.clock(), step=status.step, steps=status.steps, eta_s=status.eta_s)
        if self.job.state != "rejected":
            self.job.tell(self.clock(), code="")
        self.next = "status"
        if self.goal == "call":
            self._settle(wire.ACCEPTED)
        elif status.state == "ready":
            self.next = "offer"
        elif self.goal == "collect":
            self._settle(wire.NOT_READY, status)
        else:
            self.due = time.monotonic() + STATUS_EVERY_S

    def _take_offer(self, content: RecordDict) -> None:
        parts = wire.read_offer(content, self.job.call.want)
        offer, self.head = wire.offer_digest(parts), wire.read_head(content)
        if self.goal is None and self.job.state == "rejected" and self.job.offer == offer:
            self.next, self.due = "status", time.monotonic() + LONGEST_PAUSE_S
        elif holds(self.job.inbox, parts):
            self._received(parts)
        else:
            self.job.enter("fetching", self.clock(), offer=offer)
            self.partial, self.next = Partial(self.job.partial, parts, self.window_bytes), "fetch"
            self.slow_at = time.monotonic() + SLOW_S
            self._continue(self.partial)

    def _take_window(self, partial: Partial, window: Window, content: RecordDict) -> None:
        partial.store(window, wire.read_window(content, partial.parts, *window))
        self.slow_at = min(self.slow_at + window[1] / SLOW_BYTES_PER_S, time.monotonic() + SLOW_S)
        head = wire.read_head(content)
        if head and self.head and head.entries > self.head.entries:
            self.head = head
        self._continue(partial)

    def _continue(self, partial: Partial) -> None:
        """Say how much has come; when that is all, compare and keep it."""
        self.job.tell(self.clock(), bytes=partial.received_bytes, total=partial.total, code="")
        if partial.is_whole:
            partial.finish(self.job.inbox)
            self.partial = None
            self._received(partial.parts)

    def _received(self, parts: Sequence[wire.Part]) -> None:
        if self.sign and self.head:  # before that is written down: what is received has its receipt
            self.receipt = self.sign(self.job, parts, self.head)
        self.job.enter("received", self.clock(), offer=wire.offer_digest(parts))
        self.next = "status"
        kinds = sorted(path.name for path in self.job.inbox.iterdir() if path.is_dir())
        folders = tuple(str(self.job.inbox / kind) for kind in kinds)
        if self.goal is not None:
            self._settle(wire.ACCEPTED, Status("ready"), folders)

    def _receipt_taken(self, content: RecordDict) -> None:
        wire.read_answer(content)
        taken(self.job, self.clock())
        self.receipt = None

    def _settle(self, code: str, status: Status | None = None, folders: tuple[str, ...] = ()) -> None:
        self.outcome = Outcome(self.job.site.id, self.job.site.domain, code, status, folders)

    @property
    def is_over(self) -> bool:
        """Whether there is nothing to ask the site."""
        return self.receipt is None and (
            self.outcome is not None or (self.goal is None and self.job.state in OURS | ENDED)
        )


# The talk with all sites --------------------------------------------------------------------------


@dataclass(frozen=True)
class Sent:
    """A message that is on its way."""

    exchange: Exchange
    question: Question
    at: float


@dataclass
class Talk:
    """All exchanges over one grid: what was sent and not yet answered, and who is there."""

    grid: Grid
    sent: dict[str, Sent] = field(default_factory=dict)
    nodes: dict[str, int] = field(default_factory=dict)
    looked: float = -NODE_EVERY_S

    def once(self, exchanges: Iterable[Exchange]) -> bool:
        """Hear what has come, and ask whoever is due; whether anything had come."""
        self._look()
        has_heard = self._hear()
        self._knock()
        now = time.monotonic()
        for exchange in exchanges:
            node = self.nodes.get(exchange.job.site.id)
            if node is not None and not exchange.is_over and exchange.due <= now and self._has_room(exchange):
                for question in exchange.questions(self._windows_for(exchange)):
                    self._send(node, exchange, question)
        return has_heard

    def _look(self) -> None:
        if time.monotonic() - self.looked >= NODE_EVERY_S:
            self.nodes = {node.name: node.node_id for node in self.grid.get_nodes()}
            self.looked = time.monotonic()

    def _has_room(self, exchange: Exchange) -> bool:
        busy = self._busy()
        if exchange in busy:
            return True
        now = time.monotonic()
        fetching = sum(each.next == "fetch" and each.slow_at > now for each in busy)
        return len(busy) < ASKED_AT_A_TIME and (exchange.next != "fetch" or fetching < FETCHED_AT_A_TIME)

    def _busy(self) -> set[Exchange]:
        """Those with a question on its way; a knock is none."""
        return {sent.exchange for sent in self.sent.values() if not sent.question.is_knock}

    def _windows_for(self, exchange: Exchange) -> int:
        """How many windows this site may have on their way: a fair share of all, and never none."""
        fetching = {sent.exchange for sent in self.sent.values() if sent.question.window is not None} | {exchange}
        return max(1, min(WINDOWS_AHEAD, WINDOWS_IN_ALL // len(fetching)))

    def _send(self, node: int, exchange: Exchange, question: Question) -> None:
        message = Message(question.content, node, wire.message_type(question.action), ttl=REPLY_TIMEOUT_S)
        (id_,) = self.grid.push_messages([message])
        if not id_:
            exchange.failed(question, MissingError("SITE_FAILED", "Flower did not take a message"))
            return
        exchange.on_the_way += not question.is_knock
        self.sent[id_] = Sent(exchange, question, time.monotonic())

    def _hear(self) -> bool:
        """Take in the replies that have come, windows one by one, so that one is in memory; whether there were any."""
        heard = self._pull([id_ for id_, sent in self.sent.items() if sent.question.window is None])
        awaited = set[Exchange]()  # where one window has not come, those asked for after it are not looked for
        for id_, sent in [(id_, sent) for id_, sent in self.sent.items() if sent.question.window is not None]:
            if sent.exchange not in awaited:
                came = self._pull([id_])
                heard += came
                awaited |= set() if came else {sent.exchange}
        for answered in heard:
            self._give_up_before(answered)
        for id_, sent in list(self.sent.items()):
            if time.monotonic() - sent.at > REPLY_TIMEOUT_S:
                self._take(self.sent.pop(id_), None)
        return bool(heard)

    def _pull(self, ids: Sequence[str]) -> list[Sent]:
        """Take in those of these replies that have come, and return what they answer."""
        answered = []
        for reply in self.grid.pull_messages(ids) if ids else ():
            answered.append(self.sent.pop(reply.metadata.reply_to_message_id))
            self._take(answered[-1], reply)
        return answered

    def _give_up_before(self, answered: Sent) -> None:
        """What the site was asked before this, and has not answered: that got lost with a connection."""
        for id_, sent in list(self.sent.items()):
            if sent.exchange is answered.exchange and sent.at < answered.at and not self._pull([id_]):
                self._take(self.sent.pop(id_), None)

    def _knock(self) -> None:
        """Ask those who have been silent, at intervals that double, whether they are there."""
        now = time.monotonic()
        for exchange in self._busy():
            node = self.nodes.get(exchange.job.site.id)
            asked = [sent.at for sent in self.sent.values() if sent.exchange is exchange]
            if node is not None and now - asked[-1] > max(QUIET_S, asked[-1] - asked[0]):
                self._send(node, exchange, Question("describe", wire.request(), is_knock=True))

    def _take(self, sent: Sent, reply: Message | None) -> None:
        """Hand a reply to its exchange, or the error that stands for a missing one."""
        exchange, question = sent.exchange, sent.question
        exchange.on_the_way -= not question.is_knock
        try:
            exchange.answered(question, _content(reply))
        except FedcomposeError as error:
            log.warning("a site's answer", extra={"site": exchange.job.site.id, "code": error.code})
            exchange.failed(question, error)


def _content(reply: Message | None) -> RecordDict:
    if reply is None:
        raise MissingError("SITE_SILENT", "no reply came in time")
    if not reply.has_content():
        raise MissingError("SITE_FAILED", "Flower could not bring a reply", got=f"error {reply.error.code}")
    return reply.content


# The apps -----------------------------------------------------------------------------------------


def make_server_app(
    home: Path,
    step: Step,
    report: Callable[[Outcome], None] | None = None,
    *,
    window_bytes: int | None = None,
    node_timeout_s: float = NODE_TIMEOUT_S,
    hear_every_s: float = HEAR_EVERY_S,
) -> ServerApp:
    """A ServerApp that takes one step with every site of the newest call, and reports each outcome as it comes."""
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        exchanges = [Exchange(job, step, window_bytes, sign=receipt_for) for job in jobs_of(home, newest_call(home))]
        talk, give_up = Talk(grid), time.monotonic() + node_timeout_s
        told: set[str] = set()
        while len(told) < len(exchanges):
            has_heard = talk.once(exchanges)
            for exchange in exchanges:
                outcome = exchange.outcome if exchange.is_over else _absence(exchange, talk, give_up)
                if outcome is not None and outcome.site not in told:
                    told.add(outcome.site)
                    if report is not None:
                        report(outcome)
            if not has_heard:
                time.sleep(hear_every_s)

    return server


def _absence(exchange: Exchange, talk: Talk, give_up: float) -> Outcome | None:
    site = exchange.job.site
    if site.id in talk.nodes or exchange.on_the_way or time.monotonic() < give_up:
        return None
    return Outcome(site.id, site.domain, "SITE_UNAVAILABLE")


def newest_call(home: Path) -> Path:
    """The newest call in the coordinator's folder; ids of calls begin with the time.

    Raises: ConfigError: `CALL_MISSING`.
    """
    calls = call_paths(home)
    if not calls:
        raise ConfigError("CALL_MISSING", f"there is no call in {home / 'calls'}", fix="fedcompose coordinator call")
    return calls[-1]


def make_driver_app(
    home: Path,
    judge: Callable[[Job], None],
    is_ended: Callable[[], bool] = lambda: False,
    *,
    window_bytes: int | None = None,
    hear_every_s: float = HEAR_EVERY_S,
) -> ServerApp:
    """A ServerApp that follows every open call of the folder, also those that are made while it runs.

    `judge` is given each job whose contribution has come, and changes its state.
    """
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        talk, calls, exchanges = Talk(grid), Calls(home), list[Exchange]()
        while not is_ended():
            exchanges = [each for each in exchanges if each.job.state not in ENDED or each.receipt]
            exchanges += [Exchange(job, None, window_bytes, sign=receipt_for) for job in calls.new_jobs()]
            has_heard = talk.once(exchanges)
            for exchange in exchanges:
                _follow_up(exchange, judge)
            if not has_heard:
                time.sleep(hear_every_s)

    return server


@dataclass
class Calls:
    """The calls of a folder, looked at now and then; each is found once."""

    home: Path
    known: set[Path] = field(default_factory=set)
    looked: float = -JOBS_EVERY_S

    def new_jobs(self) -> list[Job]:
        """The jobs that have not ended, or whose site still lacks its receipt, of calls not found before."""
        if time.monotonic() - self.looked < JOBS_EVERY_S:
            return []
        self.looked = time.monotonic()
        new = set(call_paths(self.home)) - self.known
        self.known |= new
        found, now = [job for path in sorted(new) for job in jobs_of(self.home, path)], datetime.now(UTC)
        return [job for job in found if job.state not in ENDED or owed(job, now)]


def _follow_up(exchange: Exchange, judge: Callable[[Job], None]) -> None:
    """Have what came judged, and write down for which site the time is over."""
    job, now = exchange.job, exchange.clock()
    if job.state == "received" and exchange.due <= time.monotonic():
        try:
            judge(job)
        except FedcomposeError as error:
            log.error("a contribution could not be judged", extra={"site": job.site.id, "code": error.code})
            job.tell(None, code=error.code)
            exchange.rest()
    elif exchange.receipt is not None:
        exchange.receipt = None if job.is_over(now) else exchange.receipt
    elif not exchange.is_over and job.is_over(now):
        job.enter("missed", now)
        log.warning("a site missed the call", extra={"site": job.site.id, "call": job.call.id})
