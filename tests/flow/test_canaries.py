"""Texts planted in a site's data, file names, environment and host name; a whole round; and none of them outside.

What the coordinator's side could see is searched: every byte that crossed, everything in its folder, and the site's own
logs. The search itself is tested with leaks of every kind that it has to find.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcompose.adapter import WEIGHTS_FILE
from fedcompose.call import read_own_call
from fedcompose.cli import main
from fedcompose.tensors import StoredTensor, canonical_safetensors
from fedcompose.wire import Message, RecordDict
from fedcompose_client import flower
from fedcompose_client.egress_ledger import departures
from fedcompose_client.flower import make_app
from fedcompose_client.jobs import decide, jobs, read_job, release
from tests.canaries import Canaries
from tests.client.small_site import TRAINING
from tests.flower_sim import FlowerSim

# isort: split
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

PLACES = ("prompt", "answer", "id column", "file name", "environment", "host name")
RENAMED = """
import os, socket, sys
socket.sethostname(sys.argv[1])
os.execv(sys.executable, [sys.executable, "-m", "fedcompose", *sys.argv[2:]])
"""
NAMESPACE = ["unshare", "--user", "--map-root-user", "--uts"]


def has_namespaces() -> bool:
    return shutil.which("unshare") is not None and subprocess.run([*NAMESPACE, "true"], check=False).returncode == 0


def planted_site(root: Path, base: Path, canaries: Canaries) -> FlowerSim:
    """A site whose rows, file, environment and machine carry canaries, and which was asked."""
    sim = FlowerSim(root, {"site-a": "order"}, base=base)
    site = sim.folder("site-a")
    file = f"{canaries['file name']}.jsonl"
    rows = [
        {"question": f"{a}{b} {canaries['prompt']}", "answer": canaries["answer"], "record": canaries["id column"]}
        for a in range(7) for b in range(7)
    ]  # fmt: skip
    (site / file).write_text("\n".join(map(json.dumps, rows)))
    text = (site / "site.toml").read_text().replace("numeric", "exact").replace("data.jsonl", file)
    settings = [f"{name} = {value}" for name, value in (TRAINING | {"warm_up_steps": 0, "steps": 1}).items()]
    text += '\nidentifiers = ["record"]\n[domains.order.training]\n' + "\n".join(settings)
    (site / "site.toml").write_text(text)
    sim.call()
    return sim


def fedcompose(canaries: Canaries, *arguments: str | Path) -> list[str]:
    """A command of the site's, on a machine with the planted name where this kernel can give it one."""
    typed = list(map(str, arguments))
    if not has_namespaces():
        return [sys.executable, "-m", "fedcompose", *typed]
    return [*NAMESPACE, sys.executable, "-c", RENAMED, canaries["host name"], *typed]


def train(sim: FlowerSim, canaries: Canaries) -> None:
    """Approve the call, do its work, and let out what was signed."""
    site = sim.folder("site-a")
    decide(site, jobs(site)[0].call.id, "approved", sim.now)
    environment = os.environ | {"PLANTED": canaries["environment"]}
    subprocess.run(fedcompose(canaries, "client", "work", "--once", "--site", site), env=environment, check=True)
    job = read_job(site, jobs(site)[0].call.id)
    assert job.held, (job.state, (site / "calls" / f"{job.call.id}.log").read_text()[-2000:])
    shown = json.loads(typed(site, "preview", "--json"))
    assert (shown["offer"], shown["state"]) == (job.held, "held")
    assert {file["name"] for file in shown["files"]} >= {"adapter/adapter_model.safetensors", "adapter/provenance.json"}
    assert shown["claims"]["adapter"]["domain"] == "order"
    assert job.held in typed(site, "preview")
    assert json.loads(typed(site, "release", job.held, "--json"))["state"] == "ready"


def typed(site: Path, *command: str) -> str:
    """What a command of the site's prints."""
    with redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as ended:
        main(["client", *command, "--site", str(site)])
    assert ended.value.code == 0
    return said.getvalue()


class Recorder:
    """A site's app whose every answer is kept, as the bytes that Flower makes of it."""

    def __init__(self, folder: Path) -> None:
        self.app, self.sent = make_app(folder), bytearray()

    @property
    def site(self) -> str:
        return self.app.site

    def __call__(self, message: Message, context: Any) -> Message:
        try:
            reply = self.app(message, context)
        except Exception as error:
            self.sent += str(error).encode()  # Flower sends it
            raise
        for each in get_all_nested_objects(reply).values():
            self.sent += each.deflate()
        return reply


def tokenizer_of(base: Path) -> Callable[[str], list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def contents(folder: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.fixture
def canaries() -> Canaries:
    return Canaries.made(*PLACES)


def test_nothing_planted_leaves_in_a_whole_round(
    tmp_path: Path, teachable_base: Path, canaries: Canaries, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("PLANTED", canaries["environment"])
    monkeypatch.setattr(socket, "gethostname", lambda: canaries["host name"])
    sim = planted_site(tmp_path, teachable_base, canaries)
    recorder, tokenize = Recorder(sim.folder("site-a")), tokenizer_of(teachable_base)
    sim.run("call", apps=[recorder])
    train(sim, canaries)
    assert sim.run("collect", apps=[recorder])["site-a"].code == "ACCEPTED"
    assert canaries.found_in(bytes(recorder.sent), tokenize) == set()
    assert canaries.found_in(contents(sim.home), tokenize) == set()
    assert canaries.found_in(caplog.text.encode(), tokenize) == set()
    assert canaries.found_in(contents(sim.folder("site-a"))), "they were there to be found"
    told = sum(size for _, size in departures(sim.folder("site-a"), sim.federation).totals.values())
    assert told < len(recorder.sent) < 1.1 * told + 64_000, "framing is all that the ledger does not tell of"


# The search finds what it must --------------------------------------------------------------------


def zipped(text: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("row.txt", text)
    return stream.getvalue()


WRAPPINGS: dict[str, Callable[[bytes], bytes]] = {
    "raw": lambda text: text,
    "upper case": bytes.upper,
    "full width": lambda text: "".join(chr(byte + 0xFEE0) for byte in text).encode(),
    "json escapes": lambda text: "".join(f"\\u{byte:04X}" for byte in text).encode(),
    "url escapes": lambda text: "".join(f"%{byte:02X}" for byte in text).encode(),
    "quoted in a url": lambda text: urllib.parse.quote(b" " + text + b" ").encode(),
    "hex": lambda text: text.hex().encode(),
    "base64": base64.b64encode,
    "base64 shifted by one": lambda text: base64.b64encode(b"x" + text + b"yz"),
    "base64 shifted by two": lambda text: base64.b64encode(b"xy" + text),
    "utf-16": lambda text: text.decode().encode("utf-16"),
    "utf-16 be": lambda text: text.decode().encode("utf-16-be"),
    "gzip": gzip.compress,
    "zlib": zlib.compress,
    "zip": zipped,
    "gzip of base64": lambda text: gzip.compress(base64.b64encode(text)),
    "reversed": lambda text: text[::-1],
    "eight characters": lambda text: text[5:13],
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_the_search_looks_into(canaries: Canaries, wrapping: str) -> None:
    hidden = os.urandom(5000) + WRAPPINGS[wrapping](canaries["prompt"].encode()) + os.urandom(5000)
    assert {each.partition(":")[0] for each in canaries.found_in(hidden)} == {"prompt"}


@pytest.mark.parametrize("kind", ["<i4", ">i4", "<i8", ">i8", "decimals"])
def test_the_search_knows_token_ids(canaries: Canaries, teachable_base: Path, kind: str) -> None:
    tokenize = tokenizer_of(teachable_base)
    ids = tokenize(canaries["prompt"])
    hidden = str(ids).encode() if kind == "decimals" else np.array(ids, kind).tobytes()
    assert canaries.found_in(b"[1, 2]" + hidden, tokenize)


def test_the_search_finds_nothing_where_nothing_is(canaries: Canaries, teachable_base: Path) -> None:
    assert canaries.found_in(os.urandom(1 << 20), tokenizer_of(teachable_base)) == set()


def tensors(**metadata: str) -> bytes:
    header = json.dumps({"__metadata__": metadata}).encode()
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "leak",
    [
        lambda canary: json.dumps({"metrics": {f"reward_of_{canary}": 0.5}}).encode(),
        lambda canary: str(ValueError(f"row 17: {canary!r} is no number")).encode(),
        lambda canary: tensors(base_model=f"/home/{canary}/base"),
        lambda canary: f"---\nbase_model: /data/{canary}/model\n---\n".encode(),
        lambda canary: json.dumps({"question": f"What is {canary}?", "completion": "5"}).encode(),
    ],
    ids=["a leaky metric", "an exception", "an adapter's metadata", "a README's path", "a trace with its prompt"],
)
def test_a_leak_is_caught(canaries: Canaries, leak: Callable[[str], bytes]) -> None:
    assert canaries.found_in(leak(canaries["prompt"])) == {"prompt: raw"}


def test_a_broker_that_tells_the_text_of_an_error_is_caught(
    tmp_path: Path, canaries: Canaries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same round as above, with an app that does what Flower's own would do."""

    def talkative(self: Any, folder: Path, message: Message) -> RecordDict:
        raise ValueError(f"row 17: {canaries['prompt']}")

    sim = FlowerSim(tmp_path, {"site-a": "math"})
    sim.call()
    recorder = Recorder(sim.folder("site-a"))
    monkeypatch.setattr(flower.SiteApp, "_answer", talkative)
    sim.run("call", apps=[recorder])
    assert canaries.found_in(bytes(recorder.sent)) == set(), "SilenceError has no text"
    monkeypatch.setattr(flower.SiteApp, "__call__", lambda self, message, context: self._answer(Path(), message))
    sim.run("call", apps=[recorder])
    assert canaries.found_in(bytes(recorder.sent)) == {"prompt: raw"}


def test_what_hides_in_weights_is_not_found_by_searching(canaries: Canaries) -> None:
    """A limit, stated as a test: one bit per weight carries the text, and no search for bytes sees it."""
    hidden = np.unpackbits(np.frombuffer(canaries["prompt"].encode(), np.uint8))
    weights = np.random.default_rng(0).normal(size=hidden.size).astype("<f4")
    carrying = ((weights.view("<u4") & ~np.uint32(1)) | hidden).view("<f4")
    stored = canonical_safetensors({"w": StoredTensor("F32", carrying.shape, memoryview(carrying.tobytes()))})
    assert canaries.found_in(stored) == set()
    assert np.packbits(carrying.view("<u4") & 1).tobytes() == canaries["prompt"].encode(), "it is there"


# Over Flower, through a relay that reads along -----------------------------------------------------


class ReadingLine:
    """Stands before the coordinator with its certificate, and keeps every byte that sites send to it, decrypted."""

    def __init__(self, home: Path, target: int) -> None:
        self.target, self.sent = target, bytearray()
        self._server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._server.load_cert_chain(home / "tls" / "server.pem", home / "tls" / "server.key")
        self._client = ssl.create_default_context(cafile=str(home / "tls" / "ca.pem"))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        with suppress(OSError):
            inner = self._server.wrap_socket(near, server_side=True)
            far = socket.create_connection(("127.0.0.1", self.target), timeout=60)
            outer = self._client.wrap_socket(far, server_hostname="127.0.0.1")
            threading.Thread(target=self._carry, args=(inner, outer, self.sent), daemon=True).start()
            threading.Thread(target=self._carry, args=(outer, inner, bytearray()), daemon=True).start()

    def _carry(self, source: ssl.SSLSocket, sink: ssl.SSLSocket, kept: bytearray) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                kept += data
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def reading_line(home: Path, target: int) -> Iterator[ReadingLine]:
    line = ReadingLine(home, target)
    try:
        yield line
    finally:
        line.close()


@pytest.mark.slow
@pytest.mark.skipif(not has_namespaces(), reason="this kernel gives us no namespaces")
def test_nothing_planted_crosses_over_flower(tmp_path: Path, teachable_base: Path, canaries: Canaries) -> None:
    from fedcompose.invitation import make_invitation
    from fedcompose_coordinator.config import load_config
    from tests.flow.test_superlink import Deployment

    sim = planted_site(tmp_path, teachable_base, canaries)
    site, deployment, tokenize = sim.folder("site-a"), Deployment(sim), tokenizer_of(teachable_base)
    try:
        deployment.coordinator("invite")
        deployment.coordinator("start", "--background")
        with reading_line(sim.home, load_config(sim.home).listen.port) as line:
            ca = (sim.home / "tls" / "ca.pem").read_bytes()
            invitation = make_invitation(sim.federation, sim.signer, f"127.0.0.1:{line.port}", ca, sim.now)
            (site / "carried.json").write_bytes(invitation)
            joined = fedcompose(canaries, "client", "join", site / "carried.json", "--site", site)
            environment = os.environ | {"PLANTED": canaries["environment"]}
            with (site / "join.log").open("wb") as log:
                deployment.joined.append(subprocess.Popen(joined, stdout=log, stderr=log, env=environment))
            deployment.wait_until(lambda: bool(list((site / "calls").glob("*.jsonl"))))
            decide(site, read_own_call(sim.newest_call()).id, "approved", sim.now)
            deployment.wait_until(lambda: jobs(site)[0].held is not None)
            release(site, jobs(site)[0].held or "", sim.now)
            deployment.wait_until(lambda: bool(list((site / "receipts").glob("*.json"))))
            time.sleep(1)
            sent = bytes(line.sent)
    finally:
        deployment.stop()
    found = departures(site, sim.federation)
    assert canaries.found_in(sent, tokenize) == set()
    assert canaries.found_in(contents(sim.home), tokenize) == set()
    assert canaries.found_in((site / "join.log").read_bytes(), tokenize) == set()
    weights = (sim.outbox("site-a") / "adapter" / WEIGHTS_FILE).read_bytes()
    assert weights in sent, "the relay read along"
    windows = found.totals["window"][1]
    assert windows == sum(path.stat().st_size for path in sim.outbox("site-a").rglob("*") if path.is_file())
