"""The two sides as real processes on loopback: TLS, node keys, `start`, `join`, and processes killed in between."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedcompose.keys import new_key
from fedcompose_coordinator.start import running_pid
from tests.flower_sim import FlowerSim, files_of

pytestmark = pytest.mark.slow

DEADLINE_S = 240  # for one step, on a busy machine; a quiet one needs some 10 s
STOP_S = 30


class Deployment:
    """A coordinator and sites in folders of this machine, each as the commands that their people type."""

    def __init__(self, sim: FlowerSim) -> None:
        self.sim = sim
        self.joined: list[subprocess.Popen[bytes]] = []
        with (sim.home / "coordinator.toml").open("a") as settings:
            settings.write(f"\n[listen]\nport = {free_port()}\n")

    def coordinator(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*FEDCOMPOSE, "coordinator", *arguments, "--home", str(self.sim.home), "--json"],
            capture_output=True, text=True, timeout=DEADLINE_S,
        )  # fmt: skip

    def join(self, site: str) -> subprocess.Popen[bytes]:
        folder = self.sim.folder(site)
        with (folder / "join.log").open("wb") as log:
            process = subprocess.Popen(
                [*FEDCOMPOSE, "client", "join", str(self.sim.home / "invitation.json"), "--site", str(folder)],
                stdout=log, stderr=log,
            )  # fmt: skip
        self.joined.append(process)
        return process

    def wait_for(self, *states: str) -> None:
        self.wait_until(lambda: [site["state"] for site in self.status()] == list(states))

    def wait_until(self, done: Callable[[], bool]) -> None:
        give_up = time.monotonic() + DEADLINE_S
        while not done():
            assert time.monotonic() < give_up, (self.status(), self.logs())
            time.sleep(0.5)

    def status(self) -> list[dict[str, Any]]:
        return list(json.loads(self.coordinator("status").stdout)["sites"])

    def logs(self) -> str:
        return "\n".join(log.read_text()[-3000:] for log in sorted(self.sim.home.parent.rglob("*.log")))

    def kill(self, part: str) -> None:
        """As if the machine had run out of memory."""
        (pid,) = processes("fedcompose_coordinator." + part, str(self.sim.home))
        os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        for process in self.joined:
            process.terminate()
        for process in self.joined:
            process.wait(STOP_S)
        self.coordinator("stop")


FEDCOMPOSE = [sys.executable, "-m", "fedcompose"]


def processes(*words: str) -> list[int]:
    """Processes of this machine with all these words in their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if all(word in line for word in words):
            found.append(int(path.parent.name))
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    deployment = Deployment(FlowerSim(tmp_path))
    try:
        yield deployment
    finally:
        deployment.stop()
        time.sleep(1)
        assert processes(str(tmp_path)) == [], "something was left running"


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs Linux")
def test_contributions_cross_whatever_is_killed(deployment: Deployment) -> None:
    """The base here is none that intake could load, so that what came stays `received`."""
    sim = deployment.sim
    assert json.loads(deployment.coordinator("invite").stdout)["new_certificate"]
    started = deployment.coordinator("start", "--background")
    assert json.loads(started.stdout)["pid"] == running_pid(sim.home), started.stderr
    assert "ALREADY_RUNNING" in deployment.coordinator("start", "--background").stdout
    for site in sim.sites:
        deployment.join(site)
    assert deployment.coordinator("call").returncode == 0
    deployment.wait_for("asked", "asked")
    deployment.kill("driver")
    for site in sim.sites:
        sim.fill_outbox(site, size=300_000)
    deployment.kill("superlink")
    deployment.wait_for("received", "received")
    for site in sim.sites:
        assert files_of(sim.inbox(site)) == files_of(sim.outbox(site))


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs Linux")
def test_a_node_whose_key_is_not_in_the_federation_file_is_not_let_in(deployment: Deployment) -> None:
    sim = deployment.sim
    deployment.coordinator("invite")
    deployment.coordinator("start", "--background")
    stranger = new_key(sim.home.parent / "strangers", "site-a", "site", "math", None)
    config = sim.folder("site-a") / "site.toml"
    lines = [line for line in config.read_text().splitlines() if not line.startswith("node_key")]
    config.write_text(f'node_key = "{stranger.private.with_name("site-a.node.key")}"\n' + "\n".join(lines))
    process = deployment.join("site-a")
    log = sim.folder("site-a") / "join.log"
    deployment.wait_until(lambda: process.poll() is not None or "2004" in log.read_text() or "ended" in log.read_text())
    assert "registered a node" in (sim.home / "logs" / "start.log").read_text()
    deployment.coordinator("call")
    time.sleep(10)
    assert deployment.status()[0]["state"] == "called"


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs Linux")
def test_nothing_is_left_when_start_itself_is_killed(deployment: Deployment) -> None:
    sim = deployment.sim
    deployment.coordinator("invite")
    pid = json.loads(deployment.coordinator("start", "--background").stdout)["pid"]
    os.kill(pid, signal.SIGKILL)
    deployment.wait_until(lambda: processes("fedcompose_coordinator", str(sim.home)) == [])
    assert running_pid(sim.home) is None
    assert json.loads(deployment.coordinator("stop").stdout) == {"stopped": None}
