"""Flower's SuperNode, with its own folder and nothing else of the site: `node/`.

    node/node.json     the coordinator's address, and the loopback port where the executor finds the SuperNode
    node/ca.pem        the authority that must have signed the coordinator's certificate
    node/node.key      by which the coordinator knows this site's connection
    node/runtime.pem, runtime.key, secret    between SuperNode and executor: TLS, and a secret that both know

`prepare` writes the folder from a signed invitation. `run` needs only the folder, so that the SuperNode, the one
process of a site that speaks to the coordinator, can run as a user, or in a container, without access to the data.

With a run comes a bundle of code. Flower's SuperNode reads settings out of it; ours reads nothing, because what is
unpacked can be a bomb. A memory limit ends a SuperNode that was sent too much; it is then started again.
"""

from __future__ import annotations

import importlib
import ipaddress
import logging
import os
import resource
import secrets
import socket
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import Field, ValidationError

from fedcompose import logs
from fedcompose.document import Document
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.federation import Federation
from fedcompose.files import read_json, write_atomic, write_json
from fedcompose.invitation import Invitation
from fedcompose.keys import read_node_key
from fedcompose.memory import reuse_freed_memory

log = logging.getLogger(__name__)

FOLDER = "node"
LOOPBACK = "127.0.0.1"
SECRET_BYTES = 32
VALIDITY = timedelta(days=3650)  # of the certificate on loopback, which only this machine ever believes
CONNECTION_LOST = 1  # exit status
REPLY_EVERY_S, REPLY_PATIENCE_S = 0.02, 5.0  # of looking for the executor's answer
MAX_MEMORY_BYTES = 2 << 30  # a window of a contribution is 32 MiB, and held a few times over


class NodeSettings(Document):
    """What the SuperNode has to know, and the executor to find it."""

    schema_: Literal["fedcompose/node/v1"] = Field(alias="schema")
    site: str
    coordinator: str  # host:port of its listener
    port: Annotated[int, Field(ge=1, le=65535)]


def prepare(site: Path, site_id: str, node_key: Path, invitation: Invitation, federation: Federation) -> Path:
    """Write the folder of the SuperNode.

    Raises: ConfigError: `NODE_KEY_OTHER` (the federation file names another node key for this site, or none), and what
        `read_node_key` raises. RefusedError: `SITE_UNKNOWN`.
    """
    private, public = read_node_key(site / node_key)
    if federation.site(site_id).node_key != public:
        raise ConfigError(
            "NODE_KEY_OTHER",
            f"the federation file has another node key for site {site_id}, or none",
            got=f"the key in {node_key}",
            fix="name the key of your newest enrolment (node_key in site.toml), or have it enrolled: "
            "fedcompose federation enroll, or rotate",
        )
    folder = site / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    write_atomic(folder / "node.key", private, 0o600)
    write_atomic(folder / "ca.pem", invitation.ca_pem)
    if not (folder / "runtime.key").exists():
        _make_certificate(folder)
    if not (folder / "secret").exists():
        write_atomic(folder / "secret", secrets.token_bytes(SECRET_BYTES), 0o600)
    settings = {"site": site_id, "coordinator": invitation.address, "port": _port(folder)}
    write_json(folder / "node.json", {"schema": "fedcompose/node/v1"} | settings)
    return folder


def read_node_settings(folder: Path) -> NodeSettings:
    """Raises: ConfigError: `NODE_MISSING`."""
    try:
        return NodeSettings.model_validate(read_json(folder / "node.json"))
    except (ConfigError, RefusedError, ValidationError) as error:
        raise ConfigError(
            "NODE_MISSING",
            f"{folder} holds no settings of a SuperNode",
            fix="fedcompose client join --prepare, with the coordinator's invitation",
        ) from error


def run(folder: Path) -> None:
    """Be the SuperNode until told to end."""
    from uvicorn.config import LOGGING_CONFIG

    settings = read_node_settings(folder)
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    reuse_freed_memory()
    supernode = flower_supernode()
    logs.configure("node")
    LOGGING_CONFIG.clear()  # the server on loopback would print lines of its own
    LOGGING_CONFIG.update(version=1, disable_existing_loggers=False)
    sys.argv = ["flower-supernode", *arguments(folder, settings)]
    try:
        supernode.flower_supernode()
    except Exception:  # whatever a stranger's message does to Flower
        log.exception("the SuperNode failed")
    finally:  # Flower's server on loopback would keep a process going that is connected to nobody
        os._exit(CONNECTION_LOST)


def arguments(folder: Path, settings: NodeSettings) -> list[str]:
    """What Flower's command is given: TLS on both sides, node authentication, and no process of its own for apps."""
    return [
        "--superlink", settings.coordinator, "--root-certificates", str(folder / "ca.pem"),
        "--auth-supernode-private-key", str(folder / "node.key"), "--isolation", "process",
        "--superexec-auth-secret-file", str(folder / "secret"), "--host", LOOPBACK, "--port", str(settings.port),
        "--ssl-certfile", str(folder / "runtime.pem"), "--ssl-keyfile", str(folder / "runtime.key"),
        "--ssl-ca-certfile", str(folder / "runtime.pem"),
    ]  # fmt: skip


def flower_supernode() -> ModuleType:
    """Flower's module, with the one place closed where a SuperNode looks into a bundle."""
    importlib.import_module("fedcompose.wire")  # sets Flower's switches before it is imported
    client: Any = importlib.import_module("flwr.supernode.start_client_internal")
    client.get_fused_config_from_fab = _no_settings
    connection: Any = importlib.import_module("flwr.supernode.fleet_http_connection")
    connection.make_simple_http_retry_invoker = _patient(connection.make_simple_http_retry_invoker)
    state: Any = importlib.import_module("flwr.supernode.nodestate.in_memory_nodestate").InMemoryNodeState
    state.get_messages_legacy = _prompt(state.get_messages_legacy)
    state._on_task_tokens_expired = _forgetting(state._on_task_tokens_expired)
    return importlib.import_module("flwr.supernode.cli.flower_supernode")


def _patient(make_invoker: Callable[[], Any]) -> Callable[[], Any]:
    """Flower takes every error of TLS for a wrong certificate and gives up; on a line that was cut we try again."""

    def make() -> Any:
        invoker = make_invoker()
        gives_up = invoker.should_giveup
        invoker.should_giveup = lambda error: gives_up(error) and not is_cut(error)
        return invoker

    return make


def is_cut(error: Exception) -> bool:
    """Whether the line broke, rather than that the other side is a wrong one or refuses."""
    return (
        type(error).__module__.startswith("httpx")
        and not hasattr(error, "response")
        and ("certificate" not in str(error).lower())
    )


def _prompt(look: Callable[..., Any]) -> Callable[..., Any]:
    """Flower looks for a reply twice a second, and waits for ever for the bytes of one that was begun.

    We see at once when there is a whole one, and do not look before.
    """

    def get_messages(state: Any, **filters: Any) -> Any:
        give_up = time.monotonic() + REPLY_PATIENCE_S
        while filters.get("is_reply") and not _has_whole_reply(state):
            if time.monotonic() > give_up:
                return look(state, is_reply=True, run_ids=())  # takes nothing; but sees to tasks of a dead executor
            time.sleep(REPLY_EVERY_S)
        return look(state, **filters)

    return get_messages


def _forgetting(report: Callable[..., None]) -> Callable[..., None]:
    """When an executor died, Flower reports that its message, if it was taken, has no reply, even a begun one.

    Here the message counts as taken at once, and the reply that was begun is forgotten. But a node works on one message
    after the other: where another task is there by now, that of the dead executor has had its answer.
    """
    finished = importlib.import_module("flwr.common.constant").Status.FINISHED

    def on_task_tokens_expired(state: Any, tasks: Any) -> None:
        if any(task.status.status != finished for task in state.task_store.values()):
            return
        with state.lock_msg_store:
            for entry in state.msg_store.values():
                entry.is_retrieved |= not entry.message.metadata.reply_to_message_id
        for reply, is_whole in _replies(state):
            if not is_whole:
                state.delete_messages(message_ids=[reply])
                state.object_store.delete(reply)
        report(state, tasks)

    return on_task_tokens_expired


def _has_whole_reply(state: Any) -> bool:
    return any(is_whole for _, is_whole in _replies(state))


def _replies(state: Any) -> list[tuple[str, bool]]:
    """The replies of the executor, or errors of the SuperNode's own, and whether every object of each is there."""
    inflatable: Any = importlib.import_module("flwr.supercore.inflatable.inflatable_object")
    with state.lock_msg_store:
        ids = [id_ for id_, entry in state.msg_store.items() if entry.message.metadata.reply_to_message_id]
        trees = [state.object_store.get_object_tree(id_) for id_ in ids]
    return [
        (id_, all(state.object_store.get(each.object_id) for each in inflatable.iterate_object_tree(tree)))
        for id_, tree in zip(ids, trees, strict=True)
    ]


def _no_settings(bundle: object, run: object) -> dict[str, str]:
    """Stands where Flower reads settings out of a bundle."""
    return {}


def _port(folder: Path) -> int:
    """The port of before, if it is still free; else another."""
    if (folder / "node.json").exists():
        before = read_node_settings(folder).port
        if _is_free(before):
            return before
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return int(listener.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def _make_certificate(folder: Path) -> None:
    """A certificate that vouches for itself, for loopback."""
    key, now = ec.generate_private_key(ec.SECP384R1()), datetime.now().astimezone()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedcompose node")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + VALIDITY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(LOOPBACK))]), critical=False)
        .sign(key, hashes.SHA384())
    )
    plain, pkcs8 = serialization.NoEncryption(), serialization.PrivateFormat.PKCS8
    write_atomic(folder / "runtime.pem", certificate.public_bytes(serialization.Encoding.PEM))
    write_atomic(folder / "runtime.key", key.private_bytes(serialization.Encoding.PEM, pkcs8, plain), 0o600)
