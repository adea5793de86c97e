"""The process that follows the calls: Flower's ServerApp, run by ourselves. It uses internals of Flower as well.

It claims the run that the SuperLink keeps waiting, and works on it for as long as it lives. Flower would unpack and
import a bundle instead; here the app is the installed one. What came is judged by the same intake as
`fedcompose coordinator receive`. When this process dies, the next one claims a new run and goes on from the files.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedcompose.supervision import be_child
from fedcompose.wire import Context, Grid, Message, Metadata, TaskIdentity
from fedcompose_coordinator.approvals import read_rule
from fedcompose_coordinator.door import read_door
from fedcompose_coordinator.flower import make_driver_app
from fedcompose_coordinator.home import open_home
from fedcompose_coordinator.jobs import Job

# isort: split
from flwr.app.error import Error
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import context_from_proto, message_from_proto, run_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullAppMessagesRequest, PullTaskInputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, inflate_object_from_contents, pull_objects
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid import HttpGrid

log = logging.getLogger("fedcompose_coordinator.driver")  # also when run as a program

CLAIM_EVERY_S = 0.5
DOOR_EVERY_S = 1.0
# Flower would wait for two hours for a reply that was announced and never came, and all other sites with it.
PULL_TIMEOUT_S = 20.0  # a window that takes longer is asked for again, and smaller
# Flower would look again after 1 to 10 s for bytes that are still on their way to the SuperLink.
PULL_AGAIN_S, PULL_AGAIN_MOST_S = 0.05, 0.5
DOOR_MOVED = 75  # this process's exit status when the SuperLink was started anew


def judge(job: Job) -> None:
    """Take in what came for a job, as `fedcompose coordinator receive` does, and write down what became of it.

    Raises: FedcomposeError: what is wrong with this coordinator's own folder.
    """
    from fedcompose_coordinator.intake import receive

    config, federation, base = open_home(job.home)
    rule, now = read_rule(job.home, config.approvals, config.approvers), datetime.now(UTC)
    receipts = receive([job.inbox], job.home, federation, base, now, rule)
    refused = [receipt.refusal.code for receipt in receipts if receipt.refusal]
    if refused:
        job.enter("rejected", now, offer=job.offer, code=refused[0])
    else:
        job.enter("waiting" if any(receipt.outcome == "waiting" for receipt in receipts) else "admitted", now)
    log.info("judged a contribution", extra={"site": job.site.id, "call": job.call.id, "state": job.state})


def drive(home: Path) -> None:
    """Follow the calls of this folder until the process is ended."""
    door = _wait_for_door(home)
    threading.Thread(target=_end_when_the_door_moves, args=(home, door), daemon=True).start()
    with claimed_run(door) as (grid, context):
        log.info("following the calls")
        make_driver_app(home, judge)(grid, context)


@contextmanager
def claimed_run(door: dict[str, Any]) -> Iterator[tuple[Grid, Context]]:
    """The grid of a run that is ours, for as long as we say that we are alive."""
    address = f"127.0.0.1:{door['port']}"
    grid = OwnGrid(address, insecure=True, token=_claim(address, bytes.fromhex(door["secret"])))
    client = grid._runtime_client
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()
    task = client.PullTaskInput(PullTaskInputRequest())
    TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run.run_id
    TaskIdentity.node_id = task.context.node_id
    grid.set_run(run_from_proto(task.run))
    try:
        yield grid, context_from_proto(task.context)
    finally:
        heartbeat.stop()
        grid.close()


class OwnGrid(HttpGrid):
    """Flower's grid, but a reply answers the question that the SuperLink says, whatever the site wrote into it.

    It also waits less for bytes that are on their way, and no reply that cannot be read ends this process.
    """

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        asked = set(message_ids)
        found = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=asked))
        pairs = zip(found.messages_list, found.message_object_trees, strict=True)
        return [self._reply(message_from_proto(head), tree) for head, tree in pairs if _answers(head) in asked]

    def _reply(self, head: Message, tree: Any) -> Message:
        """The reply of which the SuperLink keeps this head, with what the site wrote; else an error in its place."""
        metadata, client, run_id = head.metadata, self._runtime_client, self.run.run_id
        try:
            contents = pull_promptly(
                [each.object_id for each in iterate_object_tree(tree)],
                make_pull_object_fn_protobuf(client.PullObject, self.node, run_id),
            )
        except ObjectPullError:
            return unavailable(metadata)
        client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self.node, run_id=run_id, message_object_id=metadata.message_id)
        )
        return inflated(metadata, contents)


def _answers(head: Any) -> str:
    return str(head.metadata.reply_to_message_id)


def inflated(metadata: Metadata, contents: dict[str, bytes]) -> Message:
    """What a site wrote, under the metadata that the SuperLink checked."""
    try:
        reply: Any = inflate_object_from_contents(metadata.message_id, contents)
        content = reply.content if reply.has_content() else None
        return make_message(metadata, content, None if content is not None else reply.error)
    except Exception:  # whatever a stranger's bytes do to Flower's decoder
        log.exception("a reply could not be read")
        return unavailable(metadata)


def unavailable(metadata: Metadata) -> Message:
    return make_message(metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, "the reply could not be brought or read"))


def pull_promptly(object_ids: list[str], pull: Callable[[str], bytes]) -> dict[str, bytes]:
    """Flower's way to get a reply's bytes, without its long waits for those that are on their way."""
    return pull_objects(
        object_ids, pull, max_time=PULL_TIMEOUT_S, initial_backoff=PULL_AGAIN_S, backoff_cap=PULL_AGAIN_MOST_S
    )


def _claim(address: str, secret: bytes) -> str:
    """The token of a waiting run."""
    client = RuntimeHttpClient.from_server_address(
        server_address=address, insecure=True, root_certificates=None,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            SuperExecAuthHttpInterceptor(
                master_secret=secret, protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"})
            ),
        ],
    )  # fmt: skip
    while True:
        claimed = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
        if claimed.token:
            return str(claimed.token)
        time.sleep(CLAIM_EVERY_S)


def _wait_for_door(home: Path) -> dict[str, Any]:
    while True:
        door = read_door(home)
        if door is not None:
            return door
        time.sleep(DOOR_EVERY_S)


def _end_when_the_door_moves(home: Path, door: dict[str, Any]) -> None:
    """A SuperLink that was started anew does not know our run: begin again, whatever the other threads wait for."""
    while read_door(home) == door:
        time.sleep(DOOR_EVERY_S)
    log.info("the SuperLink was started anew")
    os._exit(DOOR_MOVED)


if __name__ == "__main__":
    be_child("driver", drive)
