"""A federation for tests and benchmarks that send real files between real processes: keys, adapters, what is running.

    parties = found(folder, 1, 512, 512, modules=100)   # a coordinator and a site whose adapter has 200 MB
    call = made_call(parties, rank=512)
    with running(parties) as deployed:
        deployed.start_coordinator()
        deployed.join("site-0000")
        deployed.wait(lambda: deployed.state("site-0000") == "admitted")

The adapters hold random numbers; everything that signs, checks or carries them is real.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from fedcompose import ledger
from fedcompose.adapter import CONFIG_FILE, WEIGHTS_FILE, tensor_name
from fedcompose.bases import resolve_base
from fedcompose.call import Call, WantedLora, make_call, read_own_call
from fedcompose.drafts import create_federation, enrol
from fedcompose.federation import Federation
from fedcompose.files import write_atomic, write_json
from fedcompose.invitation import make_invitation
from fedcompose.keys import FileSigner, load_signer, new_key
from fedcompose.leftovers import Process, leftovers, processes
from fedcompose.tensors import StoredTensor, canonical_safetensors
from fedcompose.trust_state import trusted_federation
from fedcompose_coordinator.tls import make_certificates

FEDERATION = "urn:uuid:6b0c0000-0000-4000-8000-000000000009"
HOST = "127.0.0.1"
WAIT_S = 400.0  # for one thing to happen, on a busy machine
STOP_S = 40.0


# A federation to measure --------------------------------------------------------------------------


@dataclass
class Parties:
    """A coordinator's folder and a folder for each site, with real keys."""

    root: Path
    names: list[str]
    now: datetime = field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))

    @property
    def home(self) -> Path:
        return self.root / "hub"

    def site(self, name: str) -> Path:
        return self.root / name

    @property
    def federation(self) -> Federation:
        return trusted_federation((self.home / "federation.json").read_bytes(), None, self.now)

    def signer(self, name: str) -> FileSigner:
        signer = load_signer(self.root / "keys" / f"{name}.key")
        assert isinstance(signer, FileSigner)
        return signer


def found(root: Path, count: int, hidden: int, rank: int, modules: int) -> Parties:
    """Keys, federation file, settings, and an adapter at every site that is ready to be signed."""
    os.environ["FEDCOMPOSE_HOME"] = str(root / "memory")
    parties = Parties(root, [f"site-{number:04d}" for number in range(count)])
    base = made_base(root / "base", hidden, modules)
    keys = root / "keys"
    chair = load_signer(new_key(keys, "root", "root", None, None).private)
    digest = resolve_base(base).digest
    envelope = create_federation("Benchmark", chair, "root", {"base": digest}, FEDERATION, parties.now)
    for name in ("hub", *parties.names):
        role: Any = "coordinator" if name == "hub" else "site"
        request = new_key(keys, name, role, None if name == "hub" else name, None).enrolment
        envelope = enrol(envelope, request.read_bytes(), chair, parties.now)
    for name in ("hub", *parties.names):
        write_atomic(root / name / "federation.json", envelope)
    lines = [
        'id = "hub"', f'base = "{base}"', f'key = "{keys / "hub.key"}"', f"[call]\nrank = {rank}",
        f'[listen]\nport = {free_port()}',
    ]  # fmt: skip
    write_atomic(parties.home / "coordinator.toml", "\n".join(lines).encode())
    trusted_federation(envelope, [chair.keyid], parties.now)
    for seed, name in enumerate(parties.names):
        made_site(parties, name, base, rank)
        made_adapter(parties.site(name) / "runs" / name / "expert", seed, hidden, rank, modules)
    return parties


def made_base(folder: Path, hidden: int, modules: int) -> Path:
    """As much of a base as intake looks at: the shapes of its layers."""
    weight = memoryview(bytes(2 * hidden * hidden))
    tensors = {
        f"model.layers.{n}.mlp.up_proj.weight": StoredTensor("BF16", (hidden, hidden), weight) for n in range(modules)
    }
    write_atomic(folder / "model.safetensors", canonical_safetensors(tensors))
    write_json(folder / "config.json", {})
    return folder


def made_adapter(folder: Path, seed: int, hidden: int, rank: int, modules: int) -> Path:
    """Random numbers, others in every tensor and at every site: Flower sends equal bytes only once."""
    source = np.random.default_rng(seed)
    shapes = {"A": (rank, hidden), "B": (hidden, rank)}
    tensors = {
        tensor_name(f"model.layers.{n}.mlp.up_proj", side): StoredTensor(
            "F32", shape, memoryview((source.standard_normal(rank * hidden, dtype=np.float32) * 0.001).tobytes())
        )
        for n in range(modules)
        for side, shape in shapes.items()
    }
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["up_proj"]}
    write_json(folder / CONFIG_FILE, config)
    write_atomic(folder / WEIGHTS_FILE, canonical_safetensors(tensors))
    return folder


def made_site(parties: Parties, name: str, base: Path, rank: int) -> None:
    """Settings, and what a finished run says about itself."""
    keys, site = parties.root / "keys", parties.site(name)
    lines = [
        f'id = "{name}"', f'base = "{base}"', f'key = "{keys / name}.key"', f'node_key = "{keys / name}.node.key"',
        '[calls]\ndecide = "run"\nrelease = "run"', f"[domains.{name}]", 'file = "data.jsonl"', 'task = "numeric"',
        f'[domains.{name}.training]\nrank = {rank}\ntargets = ["up_proj"]',
    ]  # fmt: skip
    write_atomic(site / "site.toml", "\n".join(lines).encode())
    run = site / "runs" / name
    score = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 200}
    write_json(run / "result.json", {"accuracy": {"base": score, "rlvr": score}, "settings": {"seed": 0}})


def made_call(parties: Parties, rank: int) -> Call:
    federation = parties.federation
    envelope = make_call(
        federation, parties.signer("hub"), "base", ["adapter"], deadline=parties.now + timedelta(days=7),
        now=parties.now, nonce=os.urandom(32), lora=WantedLora(rank=rank),
    )  # fmt: skip
    call = read_own_call(envelope)
    write_atomic(parties.home / "calls" / f"{call.id}.json", envelope)
    return call


def sign_everywhere(parties: Parties, call: Call) -> None:
    """What the sites' workers would do after training."""
    from fedcompose.parts import offer_digest
    from fedcompose_client.contribute import contribute
    from fedcompose_client.jobs import record
    from fedcompose_client.offer import outbox_parts

    federation = parties.federation
    base = resolve_base(parties.root / "base")
    for name in parties.names:
        site = parties.site(name)
        contribute(site, name, parties.signer(name), federation, datetime.now(UTC), call=call, base=base)
        offer = offer_digest(outbox_parts(site / "outbox" / name, call.want))
        record(site, call.id, "signed", datetime.now(UTC), offer=offer)


# What is running ----------------------------------------------------------------------------------


@dataclass
class Deployed:
    """The processes of one federation; all of them end with the block that `running` makes."""

    parties: Parties
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start_coordinator(self) -> subprocess.Popen[bytes]:
        return self._start("hub", "coordinator", "start", "--home", self.parties.home)

    def join(self, name: str, port: int | None = None) -> subprocess.Popen[bytes]:
        """With an invitation to the coordinator's port, or to one that stands before it."""
        home, site = self.parties.home, self.parties.site(name)
        if not (home / "tls").exists():
            make_certificates(home, [HOST], self.parties.now)
        signer = self.parties.signer("hub")
        address = f"{HOST}:{port or listen_port(home)}"
        invitation = make_invitation(
            self.parties.federation, signer, address, (home / "tls" / "ca.pem").read_bytes(), self.parties.now
        )
        write_atomic(site / "carried.json", invitation)
        return self._start(name, "client", "join", site / "carried.json", "--site", site)

    def state(self, name: str) -> str:
        """The last event of the site's job, as the coordinator wrote it down."""
        records = list((self.parties.home / "calls").glob(f"*/{name}.jsonl"))
        entries = ledger.verify(records[0]) if records else []
        return entries[-1].event if entries else "called"

    def pid(self, place: Path, words: str) -> int | None:
        """The process of this folder whose command line holds these words."""
        return next((each.pid for each in self._of(place) if words in each.command), None)

    def kill(self, place: Path, words: str) -> None:
        """As a power cut would."""
        self.wait(lambda: self.pid(place, words) is not None)
        pid = self.pid(place, words)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def wait(self, done: Callable[[], bool], seconds: float = WAIT_S) -> None:
        give_up = time.monotonic() + seconds
        while not done():
            if time.monotonic() > give_up:
                raise AssertionError(self.logs())
            time.sleep(0.05)

    def logs(self) -> str:
        logs = sorted(self.parties.root.glob("*.log")) + sorted((self.parties.home / "logs").glob("*"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)

    def stop(self) -> None:
        """End everything, and make sure that nothing is left."""
        running = [process for process in self.started if process.poll() is None]
        for process in running:
            process.terminate()
        for process in running:
            process.wait(STOP_S)
        self.wait(lambda: not leftovers(self.parties.root, processes()), STOP_S)

    def _of(self, place: Path) -> list[Process]:
        return [each for each in processes().values() if str(place) in each.command]

    def _start(self, name: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
        environment = os.environ | {
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
        }
        with (self.parties.root / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "fedcompose", *map(str, arguments)], env=environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process


@contextmanager
def running(parties: Parties) -> Iterator[Deployed]:
    deployed = Deployed(parties)
    try:
        yield deployed
    finally:
        deployed.stop()


def listen_port(home: Path) -> int:
    from fedcompose_coordinator.config import load_config

    return load_config(home).listen.port


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])
