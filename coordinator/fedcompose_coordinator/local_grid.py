"""Sites in this process instead of behind a network: the same ServerApp and ClientApps, without a SuperLink.

For the demo, for tests and for trying things on one machine. Each site's app comes from the entry point that
its distribution declares, so nothing of a site's code is imported here. Threads of one process are no privacy
boundary; between organisations the apps talk through a SuperLink.

Flower hands a process one run at a time (`TaskIdentity` is process-wide), so only one `run_locally` may be
going on.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

from fedcompose.errors import MissingError
from fedcompose.wire import (
    Context,
    Error,
    ErrorCode,
    Grid,
    Message,
    NodeInfo,
    RecordDict,
    Run,
    ServerApp,
    TaskIdentity,
)

CLIENT_APPS = "fedcompose.clientapp"  # entry point group; the value makes a ClientApp from a site's folder
COORDINATOR_NODE = 1  # Flower's own number for the side that asks
RUN = 1


class SiteApp(Protocol):
    """A ClientApp that knows the name of its site."""

    @property
    def site(self) -> str: ...

    def __call__(self, message: Message, context: Context) -> Message: ...


class LocalGrid(Grid):
    """A Flower grid whose nodes are ClientApps, each in a thread that answers one message at a time."""

    def __init__(self, sites: Sequence[SiteApp]) -> None:
        self._nodes = {COORDINATOR_NODE + 1 + index: app.site for index, app in enumerate(sites)}
        self._apps = dict(zip(self._nodes, sites, strict=True))
        self._contexts = {node: Context(RUN, node, {}, RecordDict(), {}) for node in self._nodes}
        self._workers = {node: ThreadPoolExecutor(1, f"site-{site}") for node, site in self._nodes.items()}
        self._replies: dict[str, Future[Message]] = {}
        self._run = Run.create_empty(RUN)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return copy.copy(self._run)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._nodes)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Nodes under their sites' names, as a SuperLink knows them from registration."""
        return [NodeInfo(node_id=node, name=site) for node, site in self._nodes.items()]

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        done = [id_ for id_ in message_ids if id_ in self._replies and self._replies[id_].done()]
        return [self._replies.pop(id_).result() for id_ in done]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        ids = list(self.push_messages(messages))
        wait([self._replies[id_] for id_ in ids], timeout)
        return self.pull_messages(ids)

    def close(self) -> None:
        """Let the messages under way finish."""
        for worker in self._workers.values():
            worker.shutdown()

    def _push(self, message: Message) -> str:
        """Hand a copy to its node, for Flower's own client code takes things out of the messages it gets."""
        copied = copy.deepcopy(message)
        id_ = uuid.uuid4().hex
        copied.metadata.__dict__.update(_message_id=id_, _run_id=RUN, _src_node_id=COORDINATOR_NODE)
        node = copied.metadata.dst_node_id
        if node in self._nodes:
            self._replies[id_] = self._workers[node].submit(self._answer, node, copied)
        else:
            self._replies[id_] = Future()
            self._replies[id_].set_result(Message(Error(ErrorCode.NODE_UNAVAILABLE, ""), reply_to=copied))
        return id_

    def _answer(self, node: int, message: Message) -> Message:
        try:
            reply = self._apps[node](message, self._contexts[node])
        except Exception as error:  # whatever an app raises is its node's error reply, as with a SuperNode
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, type(error).__name__), reply_to=message)
        reply.metadata.__dict__["_message_id"] = uuid.uuid4().hex
        return reply


def run_locally(server: ServerApp, sites: Sequence[SiteApp]) -> None:
    """Run a ServerApp to its end against these sites."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, COORDINATOR_NODE, RUN
    grid = LocalGrid(sites)
    try:
        server(grid, Context(RUN, COORDINATOR_NODE, {}, RecordDict(), {}))
    finally:
        grid.close()


def site_apps(folders: Sequence[Path]) -> list[SiteApp]:
    """The ClientApps of sites whose folders are on this machine.

    Raises: MissingError: `ROLE_NOT_INSTALLED` where `fedcompose-client` is not installed.
    """
    make_app = _client_app_factory()
    return [make_app(folder) for folder in folders]


def _client_app_factory() -> Callable[[Path], SiteApp]:
    for point in entry_points(group=CLIENT_APPS):
        if point.dist is not None and point.dist.name == "fedcompose-client":
            factory: Callable[[Path], SiteApp] = point.load()
            return factory
    raise MissingError(
        "ROLE_NOT_INSTALLED",
        "sites on this machine need the client role",
        fix="pip install fedcompose-client",
    )
