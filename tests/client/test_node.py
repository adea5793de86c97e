"""The SuperNode's folder, and what node and executor rely on inside Flower."""

from __future__ import annotations

import importlib
import inspect
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedcompose.errors import FedcomposeError
from fedcompose.files import write_atomic
from fedcompose.invitation import INVITATION_TYPE, make_invitation
from fedcompose.keys import new_key, read_node_key
from fedcompose.signing import read_envelope_unverified, sign_envelope
from fedcompose.wire import ConfigRecord, Message, RecordDict, Run, TaskIdentity, request
from fedcompose_client import node
from fedcompose_client.executor import TaskType
from fedcompose_client.join import accept_invitation
from fedcompose_client.node import arguments, flower_supernode, read_node_settings
from fedcompose_coordinator.tls import make_certificates
from tests.flower_sim import FlowerSim


@pytest.fixture
def sim(tmp_path: Path) -> FlowerSim:
    return FlowerSim(tmp_path, sites={"site-a": "math"})


@pytest.fixture
def invitation(sim: FlowerSim, tmp_path: Path) -> Path:
    make_certificates(sim.home, ["hub.example"], sim.now)
    ca_pem = (sim.home / "tls" / "ca.pem").read_bytes()
    path = tmp_path / "brought.json"
    path.write_bytes(make_invitation(sim.federation, sim.signer, "hub.example:9092", ca_pem, sim.now))
    return path


@pytest.fixture(autouse=True)
def flowers_state(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Where a SuperNode keeps its messages; what `flower_supernode` changes in it is undone after each test."""
    states = importlib.import_module("flwr.supernode.nodestate.in_memory_nodestate").InMemoryNodeState
    for name in ("get_messages_legacy", "_on_task_tokens_expired"):
        monkeypatch.setattr(states, name, getattr(states, name))
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    return states


def code_of(site: Path, given: Path | None, sim: FlowerSim) -> str:
    with pytest.raises(FedcomposeError) as refused:
        accept_invitation(site, given, sim.now)
    return refused.value.code


def test_writes_a_folder_that_only_its_owner_may_read(sim: FlowerSim, invitation: Path) -> None:
    site = sim.folder("site-a")
    folder = accept_invitation(site, invitation, sim.now)
    names = {"ca.pem", "node.json", "node.key", "runtime.key", "runtime.pem", "secret"}
    assert {path.name for path in folder.iterdir()} == names
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ("node.key", "runtime.key", "secret"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    assert read_node_settings(folder).coordinator == "hub.example:9092"
    secret = (folder / "secret").read_bytes()
    invitation.unlink()
    assert accept_invitation(site, None, sim.now) == folder, "the invitation is kept"
    assert (folder / "secret").read_bytes() == secret


def test_a_renewed_invitation_takes_the_place_of_the_old_one_and_not_the_other_way_round(
    sim: FlowerSim, invitation: Path, tmp_path: Path
) -> None:
    site, renewed = sim.folder("site-a"), tmp_path / "renewed.json"
    folder = accept_invitation(site, invitation, sim.now)
    old, secret = (folder / "ca.pem").read_bytes(), (folder / "secret").read_bytes()
    make_certificates(sim.home, ["hub.example"], sim.now)
    new = (sim.home / "tls" / "ca.pem").read_bytes()
    renewed.write_bytes(
        make_invitation(sim.federation, sim.signer, "hub.example:9443", new, sim.now + timedelta(days=1))
    )
    accept_invitation(site, renewed, sim.now)
    assert (folder / "ca.pem").read_bytes() == new != old
    assert read_node_settings(folder).coordinator == "hub.example:9443"
    assert (folder / "secret").read_bytes() == secret, "the executor need not be started anew"
    assert code_of(site, invitation, sim) == "INVITATION_OLD"
    assert (folder / "ca.pem").read_bytes() == new
    accept_invitation(site, None, sim.now)
    assert read_node_settings(folder).coordinator == "hub.example:9443"


def test_needs_an_invitation_the_first_time(sim: FlowerSim) -> None:
    assert code_of(sim.folder("site-a"), None, sim) == "INVITATION_MISSING"


def test_refuses_an_invitation_that_no_coordinator_signed(sim: FlowerSim, invitation: Path) -> None:
    payload = read_envelope_unverified(invitation.read_bytes(), INVITATION_TYPE)
    invitation.write_bytes(sign_envelope(payload, INVITATION_TYPE, [sim.site_signer("site-a")]))
    assert code_of(sim.folder("site-a"), invitation, sim) == "ENVELOPE_KEY"
    assert not (sim.folder("site-a") / "node").exists()


def test_refuses_a_node_key_that_is_not_the_federation_files(sim: FlowerSim, invitation: Path, tmp_path: Path) -> None:
    other = new_key(tmp_path / "other", "site-a", "site", "math", None).node
    assert other is not None
    write_atomic(tmp_path / "keys" / "site-a.node.key", other.read_bytes(), 0o600)
    assert code_of(sim.folder("site-a"), invitation, sim) == "NODE_KEY_OTHER"


def test_the_node_gets_the_key_of_the_federation_file(sim: FlowerSim, invitation: Path) -> None:
    folder = accept_invitation(sim.folder("site-a"), invitation, sim.now)
    assert read_node_key(folder / "node.key")[1] == sim.federation.site("site-a").node_key


def test_settings_that_are_missing_are_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(FedcomposeError) as refused:
        read_node_settings(tmp_path)
    assert refused.value.code == "NODE_MISSING"


# Flower's internals: what follows notices when another version changes them ------------------------


def test_the_one_place_where_a_supernode_reads_bundles_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    client = importlib.import_module("flwr.supernode.start_client_internal")
    monkeypatch.setattr(client, "get_fused_config_from_fab", client.get_fused_config_from_fab)  # to be put back
    assert "run_cfg = get_fused_config_from_fab(fab.content, run_info)" in inspect.getsource(client)
    with pytest.raises(Exception, match="zip"):  # negative control: as it is, it looks
        client.get_fused_config_from_fab(b"no zip at all", Run.create_empty(1))
    flower_supernode()
    assert client.get_fused_config_from_fab(b"no zip at all", Run.create_empty(1)) == {}


def test_flowers_command_takes_our_arguments(sim: FlowerSim, invitation: Path) -> None:
    folder = accept_invitation(sim.folder("site-a"), invitation, sim.now)
    command = importlib.import_module("flwr.supernode.cli.flower_supernode")
    given = command._parse_args_run_supernode().parse_args(arguments(folder, read_node_settings(folder)))
    assert (given.isolation, given.host, given.insecure) == ("process", "127.0.0.1", False)
    assert (given.superexec_auth_secret_file, given.superlink) == (str(folder / "secret"), "hub.example:9092")
    assert not given.runtime_dependency_install


def new_state(states: Any) -> Any:
    store = importlib.import_module("flwr.supercore.object_store.in_memory_object_store").InMemoryObjectStore
    return states(store())


@pytest.fixture
def impatient_state(flowers_state: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of a SuperNode that is ours, and that soon gives up waiting for a whole reply."""
    monkeypatch.setattr(node, "REPLY_PATIENCE_S", 0.05)
    flower_supernode()
    return new_state(flowers_state)


def running_task(state: Any, expired: bool = False) -> int:
    """A task of a living executor, or of one that has died."""
    task = int(state.create_task(TaskType.CLIENT_APP, 1, ""))
    state.claim_task(task)
    state.activate_task(task)
    if expired:
        state.task_token_store[task].active_until = datetime.now(UTC) - timedelta(seconds=1)
    return task


def stored_reply(state: Any, late_s: float | None) -> Message:
    """A reply of an executor whose bytes come some time after the message itself, or never."""
    inflatable = importlib.import_module("flwr.supercore.inflatable.inflatable_object")
    asked = Message(request(), 1, "query.fetch")
    asked.metadata.__dict__["_message_id"] = "0" * 64
    state.store_message(asked)
    reply = Message(RecordDict({"answer": ConfigRecord({"code": "ACCEPTED"})}), reply_to=asked)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    state.store_message(reply)
    missing = state.object_store.preregister(reply.metadata.run_id, inflatable.get_object_tree(reply))
    contents = {id_: each.deflate() for id_, each in inflatable.get_all_nested_objects(reply).items()}

    def bring() -> None:
        for id_ in missing:
            state.object_store.put(id_, contents[id_])

    if late_s is not None:
        threading.Timer(late_s, bring).start()
    return reply


@pytest.mark.parametrize("flowers_own", [False, True])
def test_the_supernode_waits_for_a_whole_reply(flowers_own: bool, flowers_state: Any) -> None:
    """Flower's own, the negative control, takes up a reply without its bytes, and then sleeps for half a second."""
    if not flowers_own:
        flower_supernode()
    state = new_state(flowers_state)
    reply = stored_reply(state, late_s=0.2)
    (found,) = state.get_messages_legacy(is_reply=True)
    assert found is reply
    assert (state.object_store.get(reply.object_id) == b"") == flowers_own


@pytest.mark.parametrize("flowers_own", [False, True])
def test_a_reply_that_a_dead_executor_had_begun_becomes_an_error(
    flowers_own: bool, flowers_state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's own, the negative control, would wait for the missing bytes for ever, and take no other message."""
    monkeypatch.setattr(node, "REPLY_PATIENCE_S", 0.05)
    if not flowers_own:
        flower_supernode()
    state = new_state(flowers_state)
    task = running_task(state)
    reply = stored_reply(state, late_s=None)
    assert len(state.get_messages_legacy(is_reply=False)) == 1
    assert flowers_own or not state.get_messages_legacy(is_reply=True), "it may still come: the executor is alive"
    state.task_token_store[task].active_until = datetime.now(UTC) - timedelta(seconds=1)
    found = [] if flowers_own else state.get_messages_legacy(is_reply=True)  # sees that the executor is dead
    (found,) = found or state.get_messages_legacy(is_reply=True)
    assert found.has_error() != flowers_own
    assert (found is reply) == flowers_own


def test_a_message_that_a_dead_executor_had_not_taken_yet_becomes_an_error(impatient_state: Any) -> None:
    state = impatient_state
    running_task(state, expired=True)
    asked = Message(request(), 1, "query.fetch")
    asked.metadata.__dict__["_message_id"] = "0" * 64
    state.store_message(asked)
    state.get_messages_legacy(is_reply=True)
    (found,) = state.get_messages_legacy(is_reply=True)
    assert found.has_error()


def test_a_dead_executor_does_not_take_the_reply_of_a_living_one_away(impatient_state: Any) -> None:
    state = impatient_state
    running_task(state, expired=True)
    running_task(state)
    reply = stored_reply(state, late_s=None)
    assert not state.get_messages_legacy(is_reply=True)
    assert reply.object_id in state.msg_store


def test_the_supernode_does_not_wait_for_ever_for_a_reply(impatient_state: Any) -> None:
    """Flower looks in between for executors that have died."""
    assert list(impatient_state.get_messages_legacy(is_reply=True)) == []


def test_what_the_executor_uses_of_flower_is_still_there() -> None:
    from fedcompose_client import executor

    client = executor.RuntimeHttpClient
    for method in ("AcquireTask", "PullTaskInput", "PullMessages", "PullObject", "ConfirmMessageReceived"):
        assert callable(getattr(client, method))
    assert list(inspect.signature(executor.push_message).parameters) == ["client", "message", "context"]
    assert {"CLIENT_APP", "AGENT_APP"} <= set(executor.TaskType.__members__)
