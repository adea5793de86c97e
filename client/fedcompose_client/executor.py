"""Between the SuperNode and the site's own app: take a message, answer it with the code that is installed here.

Flower's own executor unpacks the bundle that the other side sent with a run, and imports it. This one never looks at
it, nor at the run's configuration or the context: of what belongs to a task it uses the numbers that a reply needs,
and the message. Tasks for Flower's agents are taken as well, and refused: one that nobody takes would keep the
SuperNode waiting for good.

It talks to the SuperNode's port on loopback and needs no other network. It keeps nothing: when it is ended, Flower
tells the coordinator that no reply will come, and the coordinator asks again.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from fedcompose.memory import reuse_freed_memory
from fedcompose.wire import Context, Message, RecordDict, TaskIdentity
from fedcompose_client.node import LOOPBACK, MAX_MEMORY_BYTES, read_node_settings

# isort: split
# Internals of Flower 1.41; tests/client/test_node.py notices when they change.
from flwr.common.serde import message_from_proto
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullAppMessagesRequest, PullTaskInputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, pull_and_inflate_object_from_tree
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import RetryInvoker, make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output
from httpx import HTTPStatusError, codes  # what Flower speaks HTTP with

log = logging.getLogger(__name__)


class SuperNodeApp(Protocol):
    """The site's app: it answers a message, or refuses one without looking at it."""

    def __call__(self, message: Message, context: Context) -> Message: ...

    def refuse(self, message: Message, code: str) -> Message: ...


ANY_TASK = [str(kind) for kind in TaskType]
POLL_S = float(os.environ.get("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.5"))
FIRST_POLL_S = min(0.02, POLL_S)  # after a task, for where one window was asked for, the next one is near
COMPLETED = "completed"
TURNED_AWAY = 1  # exit status
PULL_TIMEOUT_S = 20.0  # for a message that the SuperNode has, or is fetching; it is small


def run(folder: Path, app: SuperNodeApp) -> None:
    """Answer messages with `app` until this process is ended. `folder` is the SuperNode's."""
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    reuse_freed_memory()
    secret = (folder / "secret").read_bytes()
    acquire = "/flwr.proto.Runtime/AcquireTask"
    interceptor = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({acquire}))
    client = _client(folder, interceptor)
    pause_s = POLL_S
    while True:
        try:
            task = client.AcquireTask(AcquireTaskRequest(supported_task_types=ANY_TASK))
        except HTTPStatusError as error:  # it has another secret by now, or is another version
            _log_refusal(error)
            sys.exit(TURNED_AWAY)
        if task.token:
            answer_task(_client(folder, RuntimeTokenHttpInterceptor(task.token)), task.task.type, app)
            pause_s = FIRST_POLL_S
        else:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, POLL_S)


def answer_task(client: RuntimeHttpClient, kind: str, app: SuperNodeApp) -> None:
    """Take the task's message and answer it. Nothing that is wrong with it ends this process."""
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()
    try:
        message, is_readable, context = _pull(client)
        if not is_readable:
            reply = app.refuse(message, "MESSAGE_INVALID")
        elif kind != TaskType.CLIENT_APP:
            reply = app.refuse(message, "ACTION_UNKNOWN")
        else:
            reply = app(message, context)
        push_message(client, reply, context)
        push_task_output(client, None, COMPLETED, "")
    except HTTPStatusError as error:  # the SuperNode was started anew, and does not know the task
        _log_refusal(error)
    except ObjectPullError:  # its run has ended, or the line broke before the SuperNode had all of it
        log.info("a message did not come")  # no more is said: the SuperNode then reports that there will be no reply
    except Exception:  # it would end the executor; Flower calls the task crashed when its heartbeat stops
        log.exception("a task failed")
    finally:
        if heartbeat.is_running:
            heartbeat.stop()
        client.close()


def _pull(client: RuntimeHttpClient) -> tuple[Message, bool, Context]:
    """The task's message, and whether it could be read; else it has no content, and can be refused all the same."""
    task = client.PullTaskInput(PullTaskInputRequest())
    run_id, node_id = task.run.run_id, task.context.node_id
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task.task_id, run_id, node_id
    pulled = client.PullMessages(PullAppMessagesRequest())
    node, tree = Node(node_id=node_id), pulled.message_object_trees[0]
    is_readable, confirm = True, make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, node, run_id)
    try:
        message = pull_and_inflate_object_from_tree(
            tree,
            make_pull_object_fn_protobuf(client.PullObject, node, run_id),
            confirm,
            return_type=Message,
            max_time=PULL_TIMEOUT_S,
            initial_backoff=FIRST_POLL_S,
            backoff_cap=POLL_S,
        )
    except ObjectPullError:
        raise
    except Exception:  # whatever a stranger's bytes do to Flower's decoder
        log.exception("a message could not be read")
        message, is_readable = message_from_proto(pulled.messages_list[0]), False
        confirm(tree.object_id)
    message.metadata.__dict__["_message_id"] = tree.object_id
    return message, is_readable, Context(run_id, node_id, {}, RecordDict(), {})


def _log_refusal(error: HTTPStatusError) -> None:
    log.error("the SuperNode refused a request", extra={"code": "NODE_REFUSED", "status": error.response.status_code})


def _invoker() -> RetryInvoker:
    """Tries again while the SuperNode cannot be reached; on a 401 Flower's own would interrupt the whole process."""
    invoker = make_simple_http_retry_invoker()
    gives_up: Any = invoker.should_giveup
    invoker.should_giveup = lambda error: is_unknown(error) or gives_up(error)
    return invoker


def is_unknown(error: Exception) -> bool:
    """Whether the SuperNode knows neither our secret nor our task."""
    return isinstance(error, HTTPStatusError) and error.response.status_code == codes.UNAUTHORIZED


def _client(folder: Path, interceptor: Any) -> RuntimeHttpClient:
    return RuntimeHttpClient.from_server_address(
        server_address=f"{LOOPBACK}:{read_node_settings(folder).port}",
        insecure=False,
        root_certificates=(folder / "runtime.pem").read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), interceptor],
        retry_invoker=_invoker(),
    )
