"""The same two apps over Flower as it is deployed: a SuperLink and two SuperNodes with TLS and node authentication."""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import fedcompose_coordinator
from fedcompose.wire import flower_environment
from tests.flower_sim import FlowerSim, files_of

BIN = Path(sys.executable).parent
FLOWER_APP = Path(fedcompose_coordinator.__file__).parent / "flower_app"
DEADLINE_S = 240  # for one step, on a busy machine; a quiet one needs some 10 s
STOP_S = 20


class Deployment:
    """Processes of one SuperLink federation, each in its own group, and stopped by that group."""

    def __init__(self, folder: Path, sim: FlowerSim) -> None:
        self.folder, self.sim = folder, sim
        self.address = f"127.0.0.1:{free_port()}"
        self.environment = {
            **os.environ,
            **flower_environment(),
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
            "NO_COLOR": "1",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # Flower starts its own programs by name
        }
        self.processes: list[subprocess.Popen[bytes]] = []
        self.certificate = make_certificates(folder / "tls", sim)
        (folder / "flwr").mkdir()
        (folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "test"\n[superlink.test]\naddress = "{self.address}"\n'
            f'root-certificates = "{self.certificate}"\n'
        )

    def start_superlink(self) -> None:
        """In the coordinator's folder, where its ServerApp works."""
        host, port = self.address.split(":")
        tls = self.certificate.parent
        superlink = self._start(
            "superlink", self.sim.home,
            "flower-superlink", "--host", host, "--port", port, "--enable-supernode-auth",
            "--disable-runtime-dependency-installation", "--ssl-certfile", tls / "server.pem",
            "--ssl-keyfile", tls / "server.key", "--ssl-ca-certfile", self.certificate,
        )  # fmt: skip
        self.processes.append(superlink)
        context = ssl.create_default_context(cafile=str(self.certificate))
        self.wait_until(lambda: is_healthy(f"https://{self.address}/health", context))

    def start_supernode(self, site: str) -> None:
        """With its own key, which the coordinator has registered under the site's name."""
        key = make_node_key(self.folder / "nodes", site)
        self.flwr("supernode", "register", f"{key}.pub", "test", "--name", site)
        self.processes.append(self.start_node(site, key))

    def start_node(self, site: str, key: Path) -> subprocess.Popen[bytes]:
        return self._start(
            key.name, self.sim.folder(site),
            "flower-supernode", "--superlink", self.address, "--root-certificates", self.certificate,
            "--auth-supernode-private-key", key, "--host", "127.0.0.1", "--port", str(free_port()),
            "--node-config", f'site-dir="{self.sim.folder(site)}"',
        )  # fmt: skip

    def run(self, step: str) -> dict[str, Any]:
        """One run of the ServerApp; what each site answered."""
        self.flwr("run", FLOWER_APP, "test", "--run-config", f'step="{step}"')
        record = next((self.sim.home / "calls").glob("*.json")).with_suffix("") / f"{step}.json"
        self.wait_until(record.is_file)
        return {outcome["site"]: outcome for outcome in json.loads(record.read_bytes())}

    def flwr(self, *arguments: str | Path) -> None:
        result = subprocess.run(
            [BIN / "flwr", *arguments], env=self.environment, capture_output=True, text=True, timeout=DEADLINE_S
        )
        assert result.returncode == 0, result.stdout + result.stderr

    def wait_until(self, done: Callable[[], bool]) -> None:
        give_up = time.monotonic() + DEADLINE_S
        while not done():
            assert time.monotonic() < give_up, self.logs()
            assert all(process.poll() is None for process in self.processes), self.logs()
            time.sleep(0.2)

    def logs(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-4000:]}" for log in sorted(self.folder.glob("*.log")))

    def stop(self) -> None:
        running = [process for process in self.processes if process.poll() is None]
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _start(self, name: str, folder: Path, program: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [BIN / program, *arguments], cwd=folder, env=self.environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    deployment = Deployment(tmp_path, FlowerSim(tmp_path))
    try:
        yield deployment
    finally:
        deployment.stop()


def test_the_apps_work_over_a_superlink_with_tls_and_node_authentication(deployment: Deployment) -> None:
    sim = deployment.sim
    envelope = sim.call()
    deployment.start_superlink()
    for site in sim.sites:
        deployment.start_supernode(site)
    stranger = deployment.start_node("site-a", make_node_key(deployment.folder / "nodes", "stranger"))
    assert {outcome["code"] for outcome in deployment.run("call").values()} == {"ACCEPTED"}
    for site in sim.sites:
        assert list(files_of(sim.folder(site) / "calls").values()) == [envelope]
        sim.fill_outbox(site, size=2_000_000)
    outcomes = deployment.run("collect")
    for site in sim.sites:
        assert outcomes[site]["code"] == "ACCEPTED"
        assert files_of(sim.inbox(site)) == files_of(sim.outbox(site))
    assert stranger.wait(DEADLINE_S) != 0, "a node with a key that nobody registered was let in"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def is_healthy(url: str, context: ssl.SSLContext) -> bool:
    try:
        with urllib.request.urlopen(url, context=context, timeout=2) as response:  # noqa: S310
            return response.status == 200
    except OSError:
        return False


def make_node_key(folder: Path, site: str) -> Path:
    """A SuperNode's identity: a P-384 key in OpenSSH form, and its public half."""
    folder.mkdir(exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (folder / site).write_bytes(private)
    (folder / f"{site}.pub").write_bytes(public)
    return folder / site


def make_certificates(folder: Path, sim: FlowerSim) -> Path:
    """A certificate authority of our own and a server certificate for loopback; the path of the authority's."""
    folder.mkdir()
    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
    builder = (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .not_valid_before(sim.now - timedelta(days=1))
        .not_valid_after(sim.now + timedelta(days=1))
    )
    root = (
        builder.subject_name(issuer)
        .public_key(authority.public_key())
        .serial_number(1)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority, hashes.SHA256())
    )
    leaf = (
        builder.subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "superlink")]))
        .public_key(server.public_key())
        .serial_number(2)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(authority, hashes.SHA256())
    )
    (folder / "ca.crt").write_bytes(root.public_bytes(serialization.Encoding.PEM))
    (folder / "server.pem").write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    (folder / "server.key").write_bytes(
        server.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return folder / "ca.crt"
