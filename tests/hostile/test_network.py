"""What a stranger on the network, or on the coordinator's own machine, can reach: nothing. Flower's own application,
without the doors, is the negative control."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import FastAPI
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import ActivateNodeRequest, RegisterNodeFleetRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.runtime_pb2 import AcquireTaskRequest, AcquireTaskResponse
from flwr.supercore.auth import create_superexec_auth_metadata, derive_auth_secret
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    NOOP_FEDERATION_ID,
    TaskType,
)
from flwr.supercore.date import now as flower_now
from flwr.supercore.inflatable.inflatable_object import get_object_id
from google.protobuf.message import Message
from starlette.testclient import TestClient

from fedcompose.signing import public_pem_of
from fedcompose_coordinator import superlink
from fedcompose_coordinator.superlink import FLEET, RUNTIME, door, make_superlink
from fedcompose_coordinator.tls import CA_FILE, TLS, make_certificates
from tests.flower_sim import FlowerSim

SECRET = bytes(range(32))
PROTOBUF = {"content-type": "application/protobuf", "accept": "application/protobuf"}
NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def flower() -> FastAPI:
    """Flower's application as it is; the doors are put before it."""
    return make_superlink(SECRET)


def state_of(flower: FastAPI) -> superlink.InMemoryLinkState:
    return flower.state.linkstate_factory.state()


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def signed(key: ec.EllipticCurvePrivateKey, at: datetime | None = None) -> dict[str, str]:
    """The headers by which a SuperNode proves that it holds a key."""
    timestamp = (at or flower_now()).isoformat()
    signature = key.sign(timestamp.encode(), ec.ECDSA(hashes.SHA256()))
    return {
        TIMESTAMP_HEADER: timestamp,
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public_pem_of(key.public_key())).decode(),
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(signature).decode(),
    }


def post(client: TestClient, path: str, message: Message | None = None, **headers: str) -> httpx.Response:
    body = message.SerializeToString(deterministic=True) if message else b""
    return client.post(path, content=body, headers=PROTOBUF | headers)


# --- what the doors do not pass -------------------------------------------------------------------

FORBIDDEN = (
    "/v1/control/start-run", "/v1/control/register-node", "/v1/control/list-nodes", "/v1/control/stop-run",
    "/v1/control/unregister-node", "/v1/fleet/register-node", "/v1/fleet/unregister-node", "/v1/runtime/create-task",
    "/v1/runtime/get-connector", "/v1/runtime/start-automation", "/health", "/docs", "/openapi.json", "/v1/responses",
    "/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run", "/V1/FLEET/activate-node",
    "/v1/fleet/activate-node/", "//v1/fleet/activate-node",
)  # fmt: skip


@pytest.mark.parametrize("path", FORBIDDEN)
@pytest.mark.parametrize("paths", [FLEET, RUNTIME], ids=["sites", "driver"])
def test_neither_door_leads_to_anything_else(flower: FastAPI, paths: frozenset[str], path: str) -> None:
    client = TestClient(door(flower, paths))  # type: ignore[arg-type]
    for method in ("GET", "POST", "PUT", "OPTIONS"):
        response = client.request(method, path)
        assert (response.status_code, response.content) == (403, b"")


def test_no_task_can_be_taken_through_the_door_of_the_sites(flower: FastAPI) -> None:
    client = TestClient(door(flower, FLEET))  # type: ignore[arg-type]
    assert {post(client, path).status_code for path in RUNTIME} == {403}


def test_without_the_doors_a_stranger_looks_around_and_registers_a_node(flower: FastAPI) -> None:
    """The negative control: Flower's own interfaces check nobody."""
    from flwr.proto.control_pb2 import RegisterNodeRequest, RegisterNodeResponse

    client = TestClient(flower)
    assert client.get("/health").status_code == 200
    assert client.get("/docs").status_code == 200
    answer = post(
        client, "/v1/control/register-node", RegisterNodeRequest(public_key=public_pem_of(new_key().public_key()))
    )
    assert answer.status_code == 200
    assert RegisterNodeResponse.FromString(answer.content).node_id


def test_the_doors_lead_to_what_flower_has(flower: FastAPI) -> None:
    """The contract with Flower: under another version a path could have another name, and nothing would work."""
    known = {path for path, methods in flower.openapi()["paths"].items() if "post" in methods}
    assert known >= FLEET | RUNTIME


# --- who is checked behind them -------------------------------------------------------------------


def test_only_a_registered_key_becomes_a_node(flower: FastAPI) -> None:
    client, stranger, node = TestClient(door(flower, FLEET)), new_key(), new_key()  # type: ignore[arg-type]
    state_of(flower).create_node("<id:none>", "none", public_pem_of(node.public_key()), 0, name="site-a")

    def activate(claimed: ec.EllipticCurvePrivateKey, **headers: str) -> int:
        message = ActivateNodeRequest(public_key=public_pem_of(claimed.public_key()), heartbeat_interval=30)
        return post(client, "/v1/fleet/activate-node", message, **headers).status_code

    assert activate(node) == 401, "without a signature"
    assert activate(node, **signed(stranger)) == 401, "with somebody else's signature"
    assert activate(node, **signed(node, flower_now() - timedelta(hours=1))) == 401, "with an old signature"
    assert activate(stranger, **signed(stranger)) >= 400, "with a key that nobody registered"
    assert activate(node, **signed(node)) == 200


def test_a_node_cannot_register_itself_even_at_flower(flower: FastAPI) -> None:
    key = new_key()
    message = RegisterNodeFleetRequest(public_key=public_pem_of(key.public_key()))
    assert post(TestClient(flower), "/v1/fleet/register-node", message, **signed(key)).status_code >= 400


def test_only_the_secret_takes_the_waiting_run(flower: FastAPI) -> None:
    client = TestClient(door(flower, RUNTIME))  # type: ignore[arg-type]
    superlink.keep_a_run_waiting(state_of(flower), superlink._store_app(state_of(flower)))

    def take(secret: bytes | None) -> httpx.Response:
        message = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
        headers = create_superexec_auth_metadata(
            auth_secret=derive_auth_secret(secret), method="/flwr.proto.Runtime/AcquireTask", request=message
        ) if secret else ()  # fmt: skip
        return post(client, "/v1/runtime/acquire-task", message, **dict(headers))

    assert take(None).status_code == 401
    assert take(bytes(32)).status_code == 401
    taken = take(SECRET)
    assert taken.status_code == 200
    assert AcquireTaskResponse.FromString(taken.content).token
    for path in RUNTIME - {"/v1/runtime/acquire-task"}:
        assert post(client, path).status_code == 401, "without a token"


def test_there_is_always_one_run_to_take_and_at_most_one_taken(flower: FastAPI) -> None:
    state, fab = state_of(flower), superlink._store_app(state_of(flower))
    for _ in range(3):
        superlink.keep_a_run_waiting(state, fab)
    assert len(state.get_run_info(statuses=["pending"], federation_ids=[NOOP_FEDERATION_ID])) == 1


# --- the nodes that the federation file names -----------------------------------------------------


def test_nodes_follow_the_federation_file(tmp_path: Path) -> None:
    state = state_of(make_superlink(SECRET))
    federation = FlowerSim(tmp_path).federation
    site_a, site_b = federation.sites
    rotated = site_a.model_copy(update={"node_key": public_pem_of(new_key().public_key()).decode()})
    suspended = site_b.model_copy(update={"status": "suspended"})
    for sites in [(site_a, site_b), (site_a, suspended), (site_a, site_b), (rotated, site_b), (site_b,)]:
        superlink.register_nodes(state, federation.model_copy(update={"sites": sites}))
        known = {node.name: node.public_key.decode() for node in state.get_node_info()}
        assert known == {site.id: site.node_key for site in sites if site.status == "active"}


# --- sizes ----------------------------------------------------------------------------------------


def test_a_body_that_is_too_large_is_refused_before_it_is_read(flower: FastAPI) -> None:
    client = TestClient(door(flower, FLEET))  # type: ignore[arg-type]
    headers = {"content-length": str(superlink.MAX_BODY_BYTES + 1)}
    assert client.post("/v1/fleet/push-object", content=b"x", headers=headers).status_code == 413
    assert client.post("/v1/fleet/push-object", content=b"x", headers={"content-length": "-1"}).status_code == 413


def events_behind_the_door(pieces: Iterator[bytes], count: int) -> list[superlink.Event]:
    """What Flower reads of a body that comes in these pieces, and of what follows it."""
    read: list[superlink.Event] = []

    async def app(scope: superlink.Scope, receive: superlink.Receive, send: superlink.Send) -> None:
        read.extend([await receive() for _ in range(count)])

    async def receive() -> superlink.Event:
        piece = next(pieces, None)
        if piece is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": piece, "more_body": piece != b"."}

    async def send(event: superlink.Event) -> None:
        raise AssertionError("nothing is answered here")

    scope = {"type": "http", "method": "POST", "path": "/v1/fleet/push-object", "headers": []}
    asyncio.run(door(app, FLEET)(scope, receive, send))
    return read


def test_a_body_that_does_not_say_its_length_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superlink, "MAX_BODY_BYTES", 10)
    assert events_behind_the_door(repeat(b"123456"), 2) == [{"type": "http.disconnect"}] * 2


def test_a_body_comes_whole_or_not_at_all() -> None:
    whole = {"type": "http.request", "body": b"123456.", "more_body": False}
    gone = {"type": "http.disconnect"}
    assert events_behind_the_door(iter([b"123", b"456", b"."]), 2) == [whole, gone]
    assert events_behind_the_door(iter([b"123", b"456"]), 1) == [gone]


def test_bodies_are_limited_together_but_small_ones_always_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sends them is not known before they are read. What has been read, or given up, counts no more."""
    monkeypatch.setattr(superlink, "MAX_BODIES_BYTES", 20)
    monkeypatch.setattr(superlink, "SMALL_BODY_BYTES", 4)
    held = superlink.Held()

    def body(*pieces: bytes) -> superlink.Receive:
        rest = iter(pieces)

        async def receive() -> superlink.Event:
            piece = next(rest, None)
            if piece is None:  # nothing comes any more
                await asyncio.sleep(3600)
            return {"type": "http.request", "body": piece, "more_body": piece != b"."}

        return superlink._limited(receive, held)

    async def several() -> list[str]:
        waiting = asyncio.create_task(body(b"x" * 15)())  # type: ignore[arg-type]
        await asyncio.sleep(0)
        kinds = [(await body(*pieces)())["type"] for pieces in ((b"x" * 8, b"."), (b"abc", b"."), (b"x" * 5, b"."))]
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        return [*kinds, (await body(b"x" * 15, b".")())["type"]]

    assert asyncio.run(several()) == ["http.disconnect", "http.request", "http.disconnect", "http.request"]
    assert held.bytes == 0


def test_bytes_of_messages_that_are_no_more_are_forgotten() -> None:
    state: Any = state_of(make_superlink(SECRET))
    contents = {get_object_id(content): content for content in (b"alone", b"being pushed", b"of a message")}
    alone, pushed, named = contents
    for id_ in contents:
        state.object_store.preregister(1, ObjectTree(object_id=id_))
    session = state.start_session(1)
    state.preregister_object_tree(ObjectTree(object_id=pushed), session)
    state.message_res_store[named] = object()
    since = superlink.forget_orphans(state, {}, 100.0)
    assert since == {alone: 100.0}
    since = superlink.forget_orphans(state, since, 100.0 + superlink.ORPHAN_S)
    assert set(state.object_store.store) == {alone, pushed, named}
    assert superlink.forget_orphans(state, since, 101.0 + superlink.ORPHAN_S) == {}
    assert set(state.object_store.store) == {pushed, named}
    state._object_push_sessions[session].expires_at = datetime.now(UTC) - timedelta(seconds=1)
    assert set(superlink.forget_orphans(state, {}, 0.0)) == {pushed}


@pytest.mark.parametrize("flowers_own", [False, True])
def test_the_locks_of_flowers_state_are_taken_in_one_order(flowers_own: bool) -> None:
    """While it waits for the lock of pushes it holds no other. Flower's own, the negative control, does."""
    ours: Any = state_of(make_superlink(SECRET))
    flowers = superlink.InMemoryLinkState(ours.federation_manager, ours.object_store)
    state: Any = flowers if flowers_own else ours
    state.store_message_ins = lambda message: "stored"
    message: Any = SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id=""))
    store = partial(state.store_message_and_object_tree, message, ObjectTree(object_id="0" * 64), "")
    with state._lock_object_push_sessions:
        pushing = threading.Thread(target=suppressed(store), daemon=True)
        pushing.start()
        pushing.join(0.3)
        is_free = state.lock.acquire(blocking=False)
        if is_free:
            state.lock.release()
    pushing.join()
    assert is_free != flowers_own


def suppressed(action: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        with suppress(ValueError):  # there is no such session
            action()

    return run


def test_a_superlink_that_was_filled_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is started in its place holds nothing. Within the limit, the negative control, it goes on."""
    ended: list[int] = []
    sim = FlowerSim(tmp_path)
    upkeep = superlink.Upkeep(sim.home, state_of(make_superlink(SECRET)))
    monkeypatch.setattr(superlink.os, "_exit", ended.append)
    upkeep.once()
    assert ended == []
    monkeypatch.setattr(superlink, "MAX_MEMORY_BYTES", superlink.held_bytes() - (1 << 20))
    upkeep.once()
    assert ended == [superlink.FULL]


# --- TLS ------------------------------------------------------------------------------------------


@contextmanager
def listening(home: Path) -> Iterator[int]:
    """A door to nowhere with the certificate of this folder; its port on loopback."""

    async def nowhere(scope: superlink.Scope, receive: superlink.Receive, send: superlink.Send) -> None:
        raise AssertionError("something passed")

    listener = superlink._listener("127.0.0.1", 0)
    server = superlink._server(door(nowhere, frozenset()), home / TLS, "off")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def greet(port: int, ca: Path, name: str = "127.0.0.1") -> None:
    """Shake hands as a SuperNode does: with the authority of the invitation, for the name of the invitation."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(ca)
    with socket.create_connection(("127.0.0.1", port)) as plain, context.wrap_socket(plain, server_hostname=name):
        pass


def test_the_right_certificate_is_believed_and_no_other(tmp_path: Path) -> None:
    make_certificates(tmp_path / "hub", ["127.0.0.1", "hub.example.org"], NOW)
    make_certificates(tmp_path / "other", ["127.0.0.1"], NOW)
    ca = tmp_path / "hub" / TLS / CA_FILE
    with listening(tmp_path / "hub") as port:
        greet(port, ca)
        greet(port, ca, "hub.example.org")
        with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
            greet(port, tmp_path / "other" / TLS / CA_FILE)
        with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
            greet(port, ca, "127.0.0.2")
        with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
            greet(port, ca, "evil.example.org")


@pytest.mark.parametrize("days", [-500, 2], ids=["expired", "not-yet-valid"])
def test_a_certificate_counts_only_in_its_time(tmp_path: Path, days: int) -> None:
    make_certificates(tmp_path, ["127.0.0.1"], NOW + timedelta(days=days))
    with listening(tmp_path) as port, pytest.raises(ssl.SSLCertVerificationError, match=r"expired|not yet valid"):
        greet(port, tmp_path / TLS / CA_FILE)


def test_the_private_key_is_for_its_owner_alone_and_the_authority_signs_no_more(tmp_path: Path) -> None:
    make_certificates(tmp_path, ["127.0.0.1"], NOW)
    assert (tmp_path / TLS / "server.key").stat().st_mode & 0o777 == 0o600
    keys = [path.name for path in (tmp_path / TLS).iterdir() if b"PRIVATE KEY" in path.read_bytes()]
    assert keys == ["server.key"]
    serialization.load_pem_private_key((tmp_path / TLS / "server.key").read_bytes(), None)
