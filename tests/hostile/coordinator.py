"""A coordinator that may do what it likes: Flower's whole SuperLink, any bundle, any message, any kind of run.

It has everything that a real one has: the coordinator's signing key, its certificate, registered nodes.
"""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from fedcompose.invitation import make_invitation
from fedcompose.wire import ConfigRecord, Message, RecordDict, TaskIdentity
from fedcompose_coordinator.superlink import make_superlink, register_nodes
from fedcompose_coordinator.tls import make_certificates
from tests.flower_sim import FlowerSim

# isort: split
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import NOOP_FLWR_AID, SubStatus
from flwr.common.serde import run_from_proto
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, PushTaskOutputRequest
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable.inflatable_object import add_header_to_object_body
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid import HttpGrid

SECRET = b"s" * 32
PATIENCE_S = 120
HOSTILE_CONFIG = {"__import__": "os", "path": "../../.."}  # no key of the bundle: a default SuperNode dies of it
AGENT = str(TaskType.AGENT_APP)

PYPROJECT = """
[project]
name = "hostile"
version = "1.0.0"
description = "x"
license = "Apache-2.0"
dependencies = ["flwr>=1.41.0"]
[tool.flwr.app]
publisher = "hostile"
[tool.flwr.app.components]
serverapp = "hostile.server_app:app"
clientapp = "hostile.client_app:app"
[tool.flwr.app.config]
"""
CLIENT_APP = """
from pathlib import Path
Path({marker!r}).write_text("this ran at the site")
from flwr.app import Message
from flwr.clientapp import ClientApp
app = ClientApp()

@app.query("describe")
def describe(message, context):
    return Message(message.content, reply_to=message)
"""


def hostile_bundle(marker: Path, settings: str = "") -> bytes:
    """A valid bundle whose client module writes `marker` when it is imported."""
    files = {
        "pyproject.toml": (PYPROJECT + settings).encode(),
        "LICENSE": b"x",
        "hostile/__init__.py": b"",
        "hostile/server_app.py": b"from flwr.serverapp import ServerApp\napp = ServerApp()\n",
        "hostile/client_app.py": CLIENT_APP.format(marker=str(marker)).encode(),
    }
    return build_fab_from_files(files)[0]


class Garbage(ConfigRecord):
    """A record whose bytes no decoder can read, under a name that promises a record."""

    def deflate(self) -> bytes:
        return add_header_to_object_body(b"\xff" * 64, ConfigRecord())

    @property
    def object_id(self) -> str:
        return hashlib.sha256(self.deflate()).hexdigest()


class HostileCoordinator:
    def __init__(self, sim: FlowerSim) -> None:
        make_certificates(sim.home, ["127.0.0.1"], sim.now)
        tls = sim.home / "tls"
        self.ca_pem = (tls / "ca.pem").read_bytes()
        app = make_superlink(SECRET)
        self.state: Any = app.state.linkstate_factory.state()
        register_nodes(self.state, sim.federation)
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            app, log_config=None, access_log=False, timeout_graceful_shutdown=1,
            ssl_certfile=tls / "server.pem", ssl_keyfile=tls / "server.key",
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.1)
        self.invitation = make_invitation(sim.federation, sim.signer, self.address, self.ca_pem, sim.now)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE_S)

    @contextmanager
    def run(
        self, bundle: bytes, kind: str = TaskType.SERVER_APP, config: Mapping[str, str] = HOSTILE_CONFIG
    ) -> Iterator[Run]:
        """A run of this kind with this bundle, as Flower's own driver would lead it."""
        fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
        self.state.store_app(
            fab=fab, federation_id=NOOP_FEDERATION_ID, app_id="@hostile/hostile", app_type=kind, added_by=NOOP_FLWR_AID
        )
        self.state.create_run(
            "hostile/hostile", "1.0.0", fab.hash_str, dict(config), NOOP_FEDERATION_ID,
            None, NOOP_FLWR_AID, kind,
        )  # fmt: skip
        acquire = frozenset({"/flwr.proto.Runtime/AcquireTask"})
        executor = RuntimeHttpClient.from_server_address(
            server_address=self.address, insecure=False, root_certificates=self.ca_pem,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperExec"),
                SuperExecAuthHttpInterceptor(master_secret=SECRET, protected_methods=acquire),
            ],
        )  # fmt: skip
        token = executor.AcquireTask(AcquireTaskRequest(supported_task_types=[kind])).token
        grid = HttpGrid(self.address, root_certificates=self.ca_pem, token=token)
        client = grid._runtime_client
        heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
        heartbeat.start()
        task = client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run.run_id
        TaskIdentity.node_id = task.context.node_id
        grid.set_run(run_from_proto(task.run))
        try:
            yield Run(grid)
        finally:
            heartbeat.stop()
            client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.COMPLETED))
            grid.close()


class Run:
    """Messages to the one node that is connected."""

    def __init__(self, grid: HttpGrid) -> None:
        self._grid = grid
        give_up = time.monotonic() + PATIENCE_S
        while not (nodes := list(grid.get_node_ids())):
            assert time.monotonic() < give_up, "no node is connected"
            time.sleep(0.2)
        self._node = nodes[0]

    def message(self, action: str, content: RecordDict) -> Message:
        message = Message(content, dst_node_id=self._node, message_type="query")
        message.metadata.__dict__["_message_type"] = action if "." in action else f"query.{action}"
        return message

    def ask(self, action: str, content: RecordDict) -> Message:
        """The site's reply to one message."""
        return self.ask_all([self.message(action, content)])[0]

    def ask_all(self, messages: Sequence[Message]) -> list[Message]:
        """The replies, in the order of the messages."""
        ids = list(self._grid.push_messages(messages))
        replies: dict[str, Message] = {}
        give_up = time.monotonic() + PATIENCE_S
        while len(replies) < len(ids):
            assert time.monotonic() < give_up, f"{len(ids) - len(replies)} messages without a reply"
            for reply in self._grid.pull_messages([each for each in ids if each not in replies]):
                replies[reply.metadata.reply_to_message_id] = reply
            time.sleep(0.1)
        return [replies[each] for each in ids]


def code(reply: Message) -> str:
    """The code in a site's answer; of an answer of another form, that it is one."""
    if not reply.has_content():
        return f"FLOWER_{reply.error.code}"
    return str(reply.content["answer"]["code"])


def fields(values: Mapping[str, Any]) -> RecordDict:
    return RecordDict({"request": ConfigRecord(dict(values))})
