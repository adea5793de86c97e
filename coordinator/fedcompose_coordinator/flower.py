"""The coordinator's side of Flower: send the call, ask how far the sites are, fetch what they signed.

Input: a call in `calls/` of the coordinator's folder. Output: `inbox/<site>/<domain>/{adapter,traces}/`,
whole or not at all, and a record of what each site answered. Nothing here judges a contribution: the folders
are as untrusted as ones that came by hand, and intake takes them from there. A site is known by the name
under which the coordinator registered its node, not by what it says of itself.

The exchange with one site is a generator: it yields a question and is sent the reply. A few sites are asked
at a time, so that memory does not grow with their number.

Deliberately absent: retries, and resuming a half-fetched contribution. Asking again costs only the transfer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from fedcompose import wire
from fedcompose.call import MAX_CALL_BYTES, Call, CalledSite, read_own_call
from fedcompose.errors import ConfigError, FedcomposeError, MissingError, RefusedError
from fedcompose.files import new_folder, read_limited, sha256_file, write_json
from fedcompose.wire import Action, Context, Grid, Message, Part, RecordDict, ServerApp, Status

log = logging.getLogger(__name__)

Step = Literal["call", "collect"]
STEPS: tuple[Step, ...] = get_args(Step)

SITES_AT_A_TIME = 4  # each may have a window of its contribution in memory, several times over
REPLY_TIMEOUT_S = 600.0
NODE_TIMEOUT_S = 60.0  # for sites that are still connecting
NODE_POLL_S = 0.5


@dataclass(frozen=True)
class Outcome:
    """What came of asking one site: `ACCEPTED`, or why not; after `collect` also how far it is, and what came."""

    site: str
    domain: str
    code: str
    status: Status | None = None
    folders: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exchange:
    """What an exchange with one site needs to know."""

    home: Path
    call: Call
    envelope: bytes
    site: CalledSite
    window_bytes: int


Conversation = Generator[tuple[Action, RecordDict], RecordDict, Outcome]


def make_server_app(
    home: Path | None,
    step: Step | None,
    report: Callable[[Outcome], None] | None = None,
    *,
    window_bytes: int = wire.WINDOW_BYTES,
    node_timeout_s: float = NODE_TIMEOUT_S,
) -> ServerApp:
    """A ServerApp that takes one step with every site of the newest call, and reports each outcome as it comes.

    Under a SuperLink, which builds it without arguments, the folder is the one the SuperLink was started in,
    and the step comes from the run's configuration.
    """
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        folder = home or Path.cwd()
        taken = step or _configured_step(context)
        envelope = newest_call(folder)
        call = read_own_call(envelope)
        exchanges = [Exchange(folder, call, envelope, site, window_bytes) for site in call.sites]
        outcomes = []
        for outcome in take_step(grid, taken, exchanges, node_timeout_s):
            log.info("%s %s: %s", taken, outcome.site, outcome.code)
            outcomes.append(asdict(outcome))
            if report is not None:
                report(outcome)
        write_json(folder / "calls" / call.id / f"{taken}.json", outcomes)

    return server


app = make_server_app(None, None)  # what a SuperLink runs


def newest_call(home: Path) -> bytes:
    """The signed bytes of the newest call in the coordinator's folder; ids of calls begin with the time.

    Raises: ConfigError: `CALL_MISSING`.
    """
    calls = sorted((home / "calls").glob("*.json"))
    if not calls:
        raise ConfigError("CALL_MISSING", f"there is no call in {home / 'calls'}", fix="fedcompose coordinator call")
    return read_limited(calls[-1], MAX_CALL_BYTES)


def take_step(grid: Grid, step: Step, exchanges: Sequence[Exchange], node_timeout_s: float) -> Iterator[Outcome]:
    """Ask every site, a few at a time; a site that fails or is not there does not stop the others."""
    nodes = _nodes(grid, [exchange.site.id for exchange in exchanges], node_timeout_s)
    for exchange in exchanges:
        if exchange.site.id not in nodes:
            yield Outcome(exchange.site.id, exchange.site.domain, "SITE_UNAVAILABLE")
    present = [exchange for exchange in exchanges if exchange.site.id in nodes]
    for first in range(0, len(present), SITES_AT_A_TIME):
        group = present[first : first + SITES_AT_A_TIME]
        yield from _converse(grid, {nodes[exchange.site.id]: (exchange, step) for exchange in group})


def _configured_step(context: Context) -> Step:
    for step in STEPS:
        if context.run_config.get("step") == step:
            return step
    raise ConfigError("STEP_UNKNOWN", "the run's configuration names no step", expected=" or ".join(STEPS))


def _nodes(grid: Grid, sites: Sequence[str], timeout_s: float) -> dict[str, int]:
    """Node ids by site name, of those sites that are connected within `timeout_s`."""
    give_up = time.monotonic() + timeout_s
    while True:
        nodes = {node.name: node.node_id for node in grid.get_nodes() if node.name in sites}
        if len(nodes) == len(sites) or time.monotonic() >= give_up:
            return nodes
        time.sleep(NODE_POLL_S)


# Conversations ------------------------------------------------------------------------------------


def _converse(grid: Grid, group: Mapping[int, tuple[Exchange, Step]]) -> Iterator[Outcome]:
    """Run several conversations side by side, round by round, and yield each one's outcome when it ends."""
    conversations = {node: CONVERSATIONS[step](exchange) for node, (exchange, step) in group.items()}
    questions = {node: next(conversation) for node, conversation in conversations.items()}
    while questions:
        replies = _ask(grid, questions)
        asked, questions = list(questions), {}
        for node in asked:
            site = group[node][0].site
            try:
                questions[node] = _continue(conversations[node], replies.get(node))
            except StopIteration as end:
                yield end.value
            except FedcomposeError as error:
                log.warning("site %s: %s", site.id, error.diagnostics())
                yield Outcome(site.id, site.domain, error.code)


def _ask(grid: Grid, questions: Mapping[int, tuple[Action, RecordDict]]) -> dict[int, Message]:
    messages = [
        Message(content, dst_node_id=node, message_type=wire.message_type(action))
        for node, (action, content) in questions.items()
    ]
    replies = grid.send_and_receive(messages, timeout=REPLY_TIMEOUT_S)
    return {reply.metadata.src_node_id: reply for reply in replies}


def _continue(conversation: Conversation, reply: Message | None) -> tuple[Action, RecordDict]:
    """Send a reply into its conversation, or the error that stands for a missing one."""
    if reply is None:
        return conversation.throw(MissingError("SITE_SILENT", "no reply came in time"))
    if not reply.has_content():
        failure = MissingError("SITE_FAILED", "Flower could not bring a reply", got=f"error {reply.error.code}")
        return conversation.throw(failure)
    return conversation.send(reply.content)


def _send_call(exchange: Exchange) -> Conversation:
    """Hand the signed call to a site."""
    wire.read_answer((yield "call", wire.request(call=exchange.envelope)))
    return Outcome(exchange.site.id, exchange.site.domain, wire.ACCEPTED)


def _collect(exchange: Exchange) -> Conversation:
    """Fetch what a site signed or, when there is nothing yet, ask how far it is."""
    site = exchange.site
    inbox = exchange.home / "inbox" / site.id / site.domain
    try:
        parts = yield from _fetch(exchange, inbox)
    except RefusedError as error:
        if error.code != wire.NOT_READY:
            raise
        status = wire.read_status((yield "status", _request(exchange)))
        return Outcome(site.id, site.domain, wire.NOT_READY, status)
    kinds = sorted({part.name.partition("/")[0] for part in parts})
    folders = tuple(str(inbox / kind) for kind in kinds)
    return Outcome(site.id, site.domain, wire.ACCEPTED, Status("ready"), folders)


CONVERSATIONS: Mapping[Step, Callable[[Exchange], Conversation]] = {"call": _send_call, "collect": _collect}


def _fetch(exchange: Exchange, inbox: Path) -> Generator[tuple[Action, RecordDict], RecordDict, list[Part]]:
    """Fetch a contribution window by window; `inbox` is replaced only when every byte came as announced.

    Raises: RefusedError: `CONTRIBUTION_CHANGED` (it became another while it was fetched), `CONTRIBUTION_DIGEST`,
        `MESSAGE_INVALID`, or the site's own code.
    """
    window, start = exchange.window_bytes, 0
    parts: list[Part] | None = None
    with new_folder(inbox) as folder:
        while parts is None or start < wire.stream_bytes(parts):
            reply = yield "contribution", _request(exchange, start=start, length=window)
            listed, pieces = wire.read_contribution(reply, exchange.call.want, start, window)
            if parts is None:
                parts = listed
                _touch(folder, parts)
            if listed != parts:
                raise RefusedError("CONTRIBUTION_CHANGED", "the contribution changed while it was fetched")
            for piece, data in pieces:
                with (folder / piece.part.name).open("ab") as stream:
                    stream.write(data)
            start += window
        for part in parts:
            if sha256_file(folder / part.name) != part.sha256:
                raise RefusedError("CONTRIBUTION_DIGEST", f"{part.name} is not what the site announced")
    return parts


def _request(exchange: Exchange, **fields: int) -> RecordDict:
    call = exchange.call
    return wire.request(call_id=call.id, nonce=call.nonce, domain=exchange.site.domain, **fields)


def _touch(folder: Path, parts: Sequence[Part]) -> None:
    for part in parts:
        (folder / part.name).parent.mkdir(exist_ok=True)
        (folder / part.name).touch()
