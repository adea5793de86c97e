"""A site that is joined to a hostile coordinator: nothing that was sent runs, every refusal has a code, the site stays.

One real site (`fedcompose client join`: SuperNode, executor and worker) and one coordinator that holds all real keys.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedcompose.call import CALL_TYPE, read_own_call
from fedcompose.delivery import DELIVERY_TYPE, make_receipt
from fedcompose.files import dump_json, write_atomic
from fedcompose.ledger import Head
from fedcompose.parts import offer_digest
from fedcompose.signing import Signer, read_envelope_unverified, sign_envelope
from fedcompose.wire import WINDOW_BYTES, RecordDict
from fedcompose_client.node import FOLDER, read_node_settings
from fedcompose_client.offer import outbox_parts
from tests.flower_sim import FlowerSim
from tests.hostile.coordinator import AGENT, PATIENCE_S, Garbage, HostileCoordinator, code, fields, hostile_bundle

pytestmark = pytest.mark.slow  # real processes, and a SuperNode that looks for messages every three seconds

BIN = Path(sys.executable).parent


class JoinedSite:
    """site-a of a federation, joined to a hostile coordinator."""

    def __init__(self, root: Path) -> None:
        os.environ["FEDCOMPOSE_HOME"] = str(root / "home")
        self.root, self.sim = root, FlowerSim(root / "federation")
        self.folder = self.sim.folder("site-a")
        self.marker = root / "ran-at-the-site"
        self.hostile = HostileCoordinator(self.sim)
        self.log = (root / "join.log").open("w+b")
        write_atomic(root / "invitation.json", self.hostile.invitation)
        self.environment = {**os.environ, "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}
        self.join = self.client("join", str(root / "invitation.json"))

    def client(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "fedcompose", "client", *arguments, "--site", str(self.folder)]
        return subprocess.Popen(command, env=self.environment, stdout=self.log, stderr=self.log)

    def log_text(self) -> str:
        return Path(self.log.name).read_text()

    def children(self) -> list[int]:
        return children_of(self.join.pid)

    def stop(self) -> None:
        self.join.send_signal(signal.SIGTERM)
        try:
            self.join.wait(PATIENCE_S)
        finally:
            self.join.kill()
            self.hostile.stop()


def children_of(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, ppid = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended meanwhile
            continue
        if int(ppid) == parent and state != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JoinedSite]:
    joined = JoinedSite(tmp_path_factory.mktemp("hostile"))
    try:
        yield joined
    finally:
        joined.stop()


def changed(call: bytes, sim: FlowerSim, **changes: Any) -> bytes:
    document = json.loads(read_envelope_unverified(call, CALL_TYPE))
    return sign_envelope(dump_json(document | changes), CALL_TYPE, [sim.signer])


def receipt_by(signer: Signer, sim: FlowerSim) -> bytes:
    """A receipt for bytes that never left, under a head that never was."""
    facts: dict[str, Any] = {"site": "site-a", "call": read_own_call(sim.newest_call()).id, "offer": "0" * 64}
    ledger = Head(entries=1, head="0" * 64)
    document = make_receipt(sim.federation, sim.signer, sim.now, bytes=7, ledger=ledger, **facts)
    return sign_envelope(read_envelope_unverified(document, DELIVERY_TYPE), DELIVERY_TYPE, [signer])


def cases(site: JoinedSite) -> list[tuple[str, RecordDict, str]]:
    """Messages that a hostile coordinator could think of, and what the site must answer."""
    sim = site.sim
    call = sim.newest_call()
    parts = outbox_parts(sim.outbox("site-a"), ["adapter", "traces"])
    foreign = FlowerSim(site.root / "foreign", federation_id="urn:uuid:00000000-0000-4000-8000-000000000002").call()
    old = changed(call, sim, deadline="2026-01-01T00:00:00Z")
    good = {"call_id": read_own_call(call).id, "nonce": read_own_call(call).nonce, "domain": "math"}
    window = good | {"offer": offer_digest(parts), "start": 0, "length": WINDOW_BYTES}

    def ask(action: str, expected: str, values: dict[str, Any]) -> tuple[str, RecordDict, str]:
        return action, fields(values), expected

    return [
        ask("describe", "ACCEPTED", {"module": "os", "function": "system", "argument": f"touch {site.marker}"}),
        ask("shell", "ACTION_UNKNOWN", {"command": f"touch {site.marker}"}),
        ask("contribution", "ACTION_UNKNOWN", window),
        ("train", fields({}), "ACTION_UNKNOWN"),
        ("evaluate", fields({}), "ACTION_UNKNOWN"),
        ask("call", "ACCEPTED", {"call": call}),
        ask("call", "ENVELOPE_KEY", {"call": foreign}),
        ask("call", "CALL_EXPIRED", {"call": old}),
        ask("call", "CALL_ID_TAKEN", {"call": changed(call, sim, nonce="ab" * 32)}),
        ask("call", "CALL_INVALID", {"call": changed(call, sim, run=f"touch {site.marker}")}),
        ask("call", "CALL_SITE", {"call": changed(call, sim, sites=[{"id": "site-b", "domain": "logic"}])}),
        ask("call", "MESSAGE_INVALID", {"call": b"x" * (1 << 20)}),
        ask("call", "MESSAGE_INVALID", {"call": str(site.folder / "site.toml")}),
        ask("status", "MESSAGE_INVALID", good | {"call_id": "../site"}),
        ask("status", "CALL_UNKNOWN", good | {"call_id": "os"}),
        ask("status", "DOMAIN_UNKNOWN", good | {"domain": "../../keys"}),
        ask("status", "DOMAIN_UNKNOWN", good | {"domain": "os.system"}),
        ask("offer", "CALL_UNKNOWN", good | {"nonce": "0" * 64}),
        ask("fetch", "ACCEPTED", window),
        ask("fetch", "OFFER_CHANGED", window | {"offer": "0" * 64}),
        ask("fetch", "MESSAGE_INVALID", window | {"start": -1}),
        ask("fetch", "MESSAGE_INVALID", window | {"start": 1 << 62}),
        ask("fetch", "MESSAGE_INVALID", window | {"length": -WINDOW_BYTES}),
        ask("fetch", "MESSAGE_INVALID", window | {"length": 1 << 40}),
        ask("fetch", "MESSAGE_INVALID", window | {"start": 0.0}),
        ("fetch", RecordDict(), "MESSAGE_INVALID"),
        ask("receipt", "MESSAGE_INVALID", good),
        ask("receipt", "MESSAGE_INVALID", good | {"receipt": b"x" * (1 << 20)}),
        ask("receipt", "ENVELOPE_SHAPE", good | {"receipt": b'{"payload": '}),
        ask("receipt", "ENVELOPE_KEY", good | {"receipt": receipt_by(sim.site_signer("site-a"), sim)}),
        ask("receipt", "DELIVERY_INVALID", good | {"receipt": receipt_by(sim.signer, sim)}),
        ("status", RecordDict({"request": Garbage()}), "MESSAGE_INVALID"),
        ("describe", fields({}), "ACCEPTED"),  # and after all that it still answers
    ]  # fmt: skip


def test_nothing_that_a_hostile_coordinator_sends_runs_or_stops_the_site(site: JoinedSite) -> None:
    site.sim.call()
    bundle = hostile_bundle(site.marker)
    with site.hostile.run(bundle) as run:
        before = site.children()
        assert code(run.ask("call", fields({"call": site.sim.newest_call()}))) == "ACCEPTED"
        site.sim.fill_outbox("site-a")
        asked = cases(site)
        replies = run.ask_all([run.message(action, content) for action, content, _ in asked])
    answered = [(action, code(reply)) for (action, _, _), reply in zip(asked, replies, strict=True)]
    assert answered == [(action, expected) for action, _, expected in asked], site.log_text()[-3000:]
    assert not site.marker.exists()
    assert site.children() == before, "every process of the site is still the one of the beginning"
    assert not (site.folder / "apps").exists()
    assert not (site.folder / "receipts").exists()
    assert not list(site.root.rglob("client_app.py")), "the bundle was not unpacked"


def zip_of(name: str, content: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return data.getvalue()


BOMBS = {
    "zip": zip_of("pyproject.toml", b"\0" * (1 << 30)),
    "toml": zip_of("pyproject.toml", b"x = " + b"[" * 10**6),
    "no-zip": b"PK\x03\x04" + b"\xff" * 1000,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bundle_that_is_a_bomb_is_not_looked_at(site: JoinedSite, bomb: str) -> None:
    with site.hostile.run(BOMBS[bomb]) as run:
        before = site.children()
        assert code(run.ask("describe", fields({}))) == "ACCEPTED"
        assert site.children() == before


def test_a_task_for_an_agent_is_refused(site: JoinedSite) -> None:
    with site.hostile.run(hostile_bundle(site.marker), kind=AGENT) as run:
        assert code(run.ask("describe", fields({}))) == "ACTION_UNKNOWN"
    with site.hostile.run(hostile_bundle(site.marker)) as run:
        assert code(run.ask("describe", fields({}))) == "ACCEPTED"
    assert not site.marker.exists()


def test_a_default_supernode_runs_the_same_bundle(site: JoinedSite, tmp_path: Path) -> None:
    """Negative control: the bundle is one that runs where nothing prevents it."""
    with site.hostile.run(hostile_bundle(site.marker)) as run:
        assert code(run.ask("describe", fields({}))) == "ACCEPTED"
    assert not site.marker.exists()
    started = site.children()
    site.join.send_signal(signal.SIGTERM)
    assert site.join.wait(PATIENCE_S) == 0
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()], "nothing is left of the site"
    command = [
        str(BIN / "flower-supernode"), "--superlink", site.hostile.address,
        "--root-certificates", str(site.folder / FOLDER / "ca.pem"),
        "--auth-supernode-private-key", str(site.folder / FOLDER / "node.key"),
        "--host", "127.0.0.1", "--port", str(read_node_settings(site.folder / FOLDER).port),
    ]  # fmt: skip
    environment = {**site.environment, "FLWR_HOME": str(tmp_path / "flwr"), "PATH": f"{BIN}:{os.environ['PATH']}"}
    node = subprocess.Popen(command, env=environment, stdout=site.log, stderr=site.log, start_new_session=True)
    try:
        with site.hostile.run(hostile_bundle(site.marker), config={}) as run:
            run.ask("describe", fields({}))
        assert site.marker.exists(), site.log_text()[-2000:]
    finally:
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()
