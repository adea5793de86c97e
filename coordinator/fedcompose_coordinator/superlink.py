"""Flower's SuperLink behind two narrow doors: all that is used of its internals on the serving side.

    sites  → TLS listener   Flower's fleet endpoints, which check a node's signature       anything else: 403
    driver → loopback       Flower's runtime endpoints, which check a secret or a token    anything else: 403

Flower serves all its interfaces on one port, and the one that starts runs and registers nodes checks nobody. No door
leads to it here, not even from this machine: this process itself registers the nodes that the federation file names,
and no others, and keeps a run waiting for the driver. Flower's state is in memory, for windows of contributions pass
through it, and a database would write each of them to disk four times. It is a convenience; what was asked, received
and decided stands in files of our own. When this process ends, sites connect anew and the driver begins a new run.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import logging
import os
import resource
import secrets
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import formatdate
from pathlib import Path
from typing import Any, Literal

from fedcompose import wire  # sets Flower's switches before Flower is imported
from fedcompose.errors import ConfigError, FedcomposeError
from fedcompose.federation import Federation
from fedcompose.files import MAX_JSON_BYTES, read_limited
from fedcompose.supervision import be_child
from fedcompose.trust_state import trusted_federation
from fedcompose_coordinator.config import load_config
from fedcompose_coordinator.door import write_door
from fedcompose_coordinator.tls import CERTIFICATE_FILE, KEY_FILE, TLS

# isort: split
import uvicorn
from flwr.cli.build import build_fab_from_disk
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, Status
from flwr.server.superlink.linkstate import InMemoryLinkState
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.fab import Fab
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app

log = logging.getLogger("fedcompose_coordinator.superlink")  # also when run as a program

FLOWER_APP = Path(__file__).parent / "flower_app"
APP_NAME, APP_VERSION = "fedcompose", "0.1.0"  # as in flower_app/pyproject.toml

# What a SuperNode needs once it is registered. `register-node` and `unregister-node` are deliberately absent.
FLEET = frozenset(
    f"/v1/fleet/{name}"
    for name in (
        "activate-node", "deactivate-node", "send-node-heartbeat", "get-run", "get-fab", "pull-messages",
        "push-messages", "pull-object", "push-object", "confirm-message-received",
    )
)  # fmt: skip
# What our driver needs. Creating tasks, connectors and automations is deliberately absent.
RUNTIME = frozenset(
    f"/v1/runtime/{name}"
    for name in (
        "acquire-task", "send-task-heartbeat", "pull-task-input", "push-task-output", "get-nodes", "pull-messages",
        "push-messages", "pull-object", "push-object", "confirm-message-received",
    )
)  # fmt: skip

MAX_BODY_BYTES = 16 << 20  # of a request; Flower cuts what it sends into objects of 5 MiB
MAX_BODIES_BYTES = 512 << 20  # of all requests that are being read; whoever sends them is not known yet
SMALL_BODY_BYTES = 64 << 10  # what is always let in, so that full hands do not keep small requests out
MAX_MEMORY_BYTES = 2 << 30  # six windows on their way are 192 MiB, held a few times over
ORPHAN_S = 60.0  # three times as long as the driver takes for the bytes of a reply, once it has seen that there is one
MAX_CONNECTIONS = 2000  # at once, of sites; each holds two
KEEP_ALIVE_S = 75
BACKLOG = 128
UPKEEP_S = 1.0
SECRET_BYTES = 32
SHUTDOWN_S = 3
FULL = 1  # exit status

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
GONE: Event = {"type": "http.disconnect"}


# The doors ----------------------------------------------------------------------------------------


def door(app: App, paths: frozenset[str]) -> App:
    """`app`, of which only POST to these paths can be reached, with bodies of a limited size, alone and together."""
    held = Held()

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await app(scope, receive, send)
        elif scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in paths:
            await _refuse(send, 403)
        elif _announced_bytes(scope) > MAX_BODY_BYTES:
            await _refuse(send, 413)
        else:
            await app(scope, _limited(receive, held), send)

    return checked


def _announced_bytes(scope: Scope) -> int:
    """What the request says of its body's length; one that does not say is cut off while it is read."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else MAX_BODY_BYTES + 1
    return 0


@dataclass
class Held:
    """Bytes of the bodies that have come in part."""

    bytes: int = 0


def _limited(receive: Receive, held: Held) -> Receive:
    """The body as one event, for Flower hands each on through many layers; after it, or if it is too large, the end."""
    is_read = is_cut_off = False

    async def limited() -> Event:
        nonlocal is_read, is_cut_off
        if is_read:
            return GONE if is_cut_off else await receive()
        is_read, body = True, bytearray()
        try:
            event = await read(body)
        finally:
            held.bytes -= len(body)
        is_cut_off = event is GONE
        return event

    async def read(body: bytearray) -> Event:
        while True:
            event = await receive()
            body.extend(event.get("body", b""))
            held.bytes += len(event.get("body", b""))
            is_too_much = len(body) > SMALL_BODY_BYTES and held.bytes > MAX_BODIES_BYTES
            if event["type"] != "http.request" or len(body) > MAX_BODY_BYTES or is_too_much:
                return GONE
            if not event.get("more_body", False):
                return {"type": "http.request", "body": bytes(body), "more_body": False}

    return limited


async def _refuse(send: Send, status: int) -> None:
    """No reason is given; the time of day is, by which a site notices that its clock is wrong."""
    headers = [(b"content-length", b"0"), (b"date", formatdate(usegmt=True).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


# Flower's state -----------------------------------------------------------------------------------


def register_nodes(state: InMemoryLinkState, federation: Federation) -> None:
    """Make the registered nodes those of the federation's active sites, each under its site's name."""
    wanted = {
        site.node_key.encode(): site.id
        for site in federation.sites
        if site.status == "active" and site.node_key is not None
    }
    known = {node.public_key: node for node in state.get_node_info(owner_aids=[NOOP_FLWR_AID])}
    for key, node in known.items():
        if wanted.get(key) != node.name:
            _forget_node(state, node)
            log.info("a node is registered no more", extra={"site": node.name})
    for key, site in wanted.items():
        if key not in known or known[key].name != site:
            state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0, name=site)
            log.info("registered a node", extra={"site": site})


def _forget_node(state: InMemoryLinkState, node: wire.NodeInfo) -> None:
    """Take a node out whole: a node that Flower has only unregistered could never be registered again."""
    with state.lock:
        del state.nodes[node.node_id], state.node_public_key_to_node_id[node.public_key]
        state.owner_to_node_ids[NOOP_FLWR_AID].discard(node.node_id)


def keep_a_run_waiting(state: InMemoryLinkState, fab: Fab) -> None:
    """See to it that a driver finds a run to claim, and that only the newest claimed one goes on.

    An older one was claimed by a driver that has died. Stopping it drops its messages.
    """
    runs = state.get_run_info(statuses=[Status.PENDING, Status.STARTING, Status.RUNNING], order_by="pending_at")
    claimed = [run for run in runs if run.status.status != Status.PENDING]
    for run in claimed[:-1]:
        state.stop_run(run.run_id)
        log.info("stopped the run of an earlier driver")
    if len(claimed) == len(runs):
        state.create_run(
            f"fedcompose/{APP_NAME}", APP_VERSION, fab.hash_str, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID,
            TaskType.SERVER_APP,
        )  # fmt: skip


def _store_app(state: InMemoryLinkState) -> Fab:
    """The bundle that Flower wants for a run: the names of our two apps. No site and no driver runs any code of it."""
    content = build_fab_from_disk(FLOWER_APP)
    fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
    state.store_app(
        fab=fab, federation_id=NOOP_FEDERATION_ID, app_id=f"@fedcompose/{APP_NAME}", app_type=TaskType.SERVER_APP,
        added_by=NOOP_FLWR_AID,
    )  # fmt: skip
    return fab


def held_bytes() -> int:
    """What this process has in RAM; 0 where the system does not say."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * resource.getpagesize() if pages.exists() else 0


def forget_orphans(state: InMemoryLinkState, since: Mapping[str, float], now: float) -> dict[str, float]:
    """Delete the bytes of messages that are no more: of a reply that came too slowly, or was never pushed to its end.

    Flower would keep them until the run ends. `since` is what the last call returned: since when each has been alone.
    """
    with state._lock_object_push_sessions, state.lock:
        owners = {id_ for id_, session in state._object_push_session_by_root.items() if _goes_on(state, session)}
        owners |= state.message_ins_store.keys() | state.message_res_store.keys()
        store: Any = state.object_store
        with store.lock_store:
            roots = [id_ for id_, entry in store.store.items() if entry.ref_count == 0 and id_ not in owners]
            orphans = {id_: since.get(id_, now) for id_ in roots}
            for id_ in [id_ for id_, begun in orphans.items() if now - begun > ORPHAN_S]:
                store.delete(id_)
                del orphans[id_]
    return orphans


def _goes_on(state: InMemoryLinkState, session: str) -> bool:
    return session in state._object_push_sessions and state._object_push_sessions[session].expires_at > datetime.now(
        UTC
    )


class Upkeep:
    """What this process does every second: follow the federation file, keep a run waiting, and stay small."""

    def __init__(self, home: Path, state: InMemoryLinkState) -> None:
        self.home, self.state = home, state
        self.fab = _store_app(state)
        self.envelope = b""
        self.orphans: dict[str, float] = {}

    def once(self) -> None:
        config = load_config(self.home)
        envelope = read_limited(self.home / config.federation, MAX_JSON_BYTES)
        if envelope != self.envelope:
            register_nodes(self.state, trusted_federation(envelope, None, datetime.now(UTC)))
            self.envelope = envelope
        keep_a_run_waiting(self.state, self.fab)
        self.orphans = forget_orphans(self.state, self.orphans, time.monotonic())
        if held_bytes() > MAX_MEMORY_BYTES:  # a site pushes what nobody has asked for; the next process begins without
            log.critical("too much was sent", extra={"code": "SUPERLINK_FULL"})
            os._exit(FULL)

    async def for_ever(self) -> None:
        """A federation file that cannot be used leaves the nodes as they are; the log says so."""
        while True:
            try:
                await asyncio.to_thread(self.once)
            except FedcomposeError as error:
                log.error("the federation file cannot be used", extra={"code": error.code})
            await asyncio.sleep(UPKEEP_S)


# The process --------------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    """A server that leaves the signals to us, for there are two in this process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class LinkState(InMemoryLinkState):
    """Flower's, with its locks taken in one order: it takes these two in both, and two requests could wait for ever."""

    def store_message_and_object_tree(
        self, message: wire.Message, object_tree: Any, session_id: str
    ) -> tuple[bool, list[str]]:
        with self._lock_object_push_sessions:
            return super().store_message_and_object_tree(message, object_tree, session_id)


def make_superlink(secret: bytes) -> Any:
    """Flower's own application."""
    config = SuperLinkLifespanConfig(
        control_address="", health_server_address=None, host="127.0.0.1", port=0, insecure=True, certificates=None,
        superexec_auth_secret=secret, authn_plugin=NoOpControlAuthnPlugin(), event_log_plugin=None,
        fleet_event_log_plugin=None, enable_event_log=False, artifact_provider=None, enable_supernode_auth=True,
        fleet_api_type="grpc-rere", fleet_api_address=None, simulation=False, ssl_ca_certfile=None, ssl_certfile=None,
        ssl_keyfile=None, database=FLWR_IN_MEMORY_DB_NAME, isolation="process",
        runtime_dependency_install=False,
    )  # fmt: skip
    # The package hides this module behind a function of the same name.
    lifespan = importlib.import_module("flwr.superlink.cli.flower_superlink").SuperLinkLifespan
    app = create_app(config, lifespan)
    factory = app.state.linkstate_factory
    factory.state_instance = LinkState(factory.federation_manager, factory.objectstore_factory.store())
    return app


def serve(home: Path) -> None:
    """Serve until the process is told to end."""
    listen = load_config(home).listen
    secret = secrets.token_bytes(SECRET_BYTES)
    app = make_superlink(secret)
    state = app.state.linkstate_factory.state()
    public = _listener(listen.host, listen.port)
    private = _listener("127.0.0.1", 0)
    doors = [
        _server(door(app, FLEET), home / TLS, lifespan="off"),
        _server(door(app, RUNTIME), None, lifespan="on"),
    ]
    upkeep = Upkeep(home, state)
    upkeep.once()
    write_door(home, _port(private), secret)
    log.info("listening", extra={"port": listen.port})
    with asyncio.Runner(loop_factory=doors[0].config.get_loop_factory()) as runner:
        runner.run(_run(doors, [public, private], upkeep))


async def _run(servers: list[_Server], sockets: list[socket.socket], upkeep: Upkeep) -> None:
    def end() -> None:
        for server in servers:
            server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, end)
    looking = asyncio.create_task(upkeep.for_ever())
    await asyncio.gather(*(server.serve([each]) for server, each in zip(servers, sockets, strict=True)))
    looking.cancel()


def _server(app: App, tls: Path | None, lifespan: Literal["on", "off"]) -> _Server:
    """A server of one door; with the certificate in `tls` if it is for sites."""
    config = uvicorn.Config(
        app, lifespan=lifespan, access_log=False, log_config=None, server_header=False, date_header=False,
        proxy_headers=False, limit_concurrency=MAX_CONNECTIONS, timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=SHUTDOWN_S, ws="none",
        ssl_certfile=tls and tls / CERTIFICATE_FILE, ssl_keyfile=tls and tls / KEY_FILE,
    )  # fmt: skip
    return _Server(config)


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise ConfigError(
            "LISTEN_FAILED", f"cannot listen on {host} port {port}", got=error.strerror, fix="correct [listen]"
        ) from error
    listener.listen(BACKLOG)
    return listener


def _port(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])


if __name__ == "__main__":
    be_child("superlink", serve)
