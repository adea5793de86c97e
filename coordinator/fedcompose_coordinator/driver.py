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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from fedcompose.supervision import be_child
from fedcompose.wire import Context, Grid, TaskIdentity
from fedcompose_coordinator.approvals import read_rule
from fedcompose_coordinator.door import read_door
from fedcompose_coordinator.flower import make_driver_app
from fedcompose_coordinator.home import open_home
from fedcompose_coordinator.jobs import Job

# isort: split
import flwr.superlink.grid.http_grid as http_grid
from flwr.common.serde import context_from_proto, run_from_proto
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
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
    http_grid.pull_objects = promptly(http_grid.pull_objects)  # type: ignore[attr-defined]
    address = f"127.0.0.1:{door['port']}"
    grid = HttpGrid(address, insecure=True, token=_claim(address, bytes.fromhex(door["secret"])))
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


def promptly(pull: Callable[..., dict[str, bytes]]) -> Callable[..., dict[str, bytes]]:
    """Flower's way to get a reply's bytes, without its long waits for those that are on their way."""
    return partial(pull, max_time=PULL_TIMEOUT_S, initial_backoff=PULL_AGAIN_S, backoff_cap=PULL_AGAIN_MOST_S)


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
