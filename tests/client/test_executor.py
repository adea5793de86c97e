"""The executor beside a SuperNode that turns it away, and how often it asks for work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory

from fedcompose.invitation import make_invitation
from fedcompose_client import executor
from fedcompose_client.join import accept_invitation
from fedcompose_client.node import read_node_settings
from fedcompose_coordinator.tls import make_certificates
from tests.flower_sim import FlowerSim

WAIT_S = 90.0


@pytest.fixture
def site(tmp_path: Path) -> Path:
    sim = FlowerSim(tmp_path, sites={"site-a": "math"})
    make_certificates(sim.home, ["127.0.0.1"], sim.now)
    ca_pem = (sim.home / "tls" / "ca.pem").read_bytes()
    invitation = tmp_path / "invitation.json"
    invitation.write_bytes(make_invitation(sim.federation, sim.signer, "127.0.0.1:9", ca_pem, sim.now))
    accept_invitation(sim.folder("site-a"), invitation, sim.now)
    return sim.folder("site-a")


@pytest.fixture
def other_supernode(site: Path) -> Iterator[None]:
    """Flower's own interface to executors, with another secret than the site's folder has."""
    app, folder = create_app(NodeStateFactory(ObjectStoreFactory()), os.urandom(32)), site / "node"
    config = uvicorn.Config(
        app, host="127.0.0.1", port=read_node_settings(folder).port, log_config=None,
        ssl_certfile=folder / "runtime.pem", ssl_keyfile=folder / "runtime.key",
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    give_up = time.monotonic() + WAIT_S
    while not server.started and time.monotonic() < give_up:
        time.sleep(0.05)
    yield
    server.should_exit = True
    thread.join()


@pytest.mark.usefixtures("other_supernode")
def test_an_executor_that_is_turned_away_says_so_in_a_line(site: Path) -> None:
    command = [sys.executable, "-m", "fedcompose", "client", "join", "--only", "executor", "--site", str(site)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert ended.returncode == executor.TURNED_AWAY
    (line,) = [json.loads(line) for line in (ended.stdout + ended.stderr).splitlines()]
    assert (line["code"], line["status"], line["part"]) == ("NODE_REFUSED", 401, "executor")


class Enough(Exception):  # noqa: N818 - ends an endless loop
    pass


def test_an_executor_asks_again_soon_after_a_task_and_then_less_and_less(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, pauses = iter(["", "token", "", "", "", "", "", ""]), list[float]()

    def acquire(request: Any) -> Any:
        try:
            return SimpleNamespace(token=next(tokens), task=SimpleNamespace(type="any"))
        except StopIteration:
            raise Enough from None

    monkeypatch.setattr(executor, "_client", lambda *_: SimpleNamespace(AcquireTask=acquire))
    monkeypatch.setattr(executor, "answer_task", lambda *_: None)
    monkeypatch.setattr(executor, "time", SimpleNamespace(sleep=pauses.append))
    monkeypatch.setattr(executor, "POLL_S", 0.1)
    monkeypatch.setattr(executor.resource, "setrlimit", lambda *_: None)  # it would bind this process of tests
    with pytest.raises(Enough):
        executor.run(site / "node", lambda message, context: message)  # type: ignore[arg-type]
    assert pauses == [0.1, 0.02, 0.04, 0.08, 0.1, 0.1, 0.1]
