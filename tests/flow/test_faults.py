"""The fault table: whatever is killed or cut, and wherever, the release is that of an undisturbed day.

Each row of the first table runs the real processes of a coordinator and of a site behind a line that can be cut, and
disturbs the way of a contribution that was signed; each row of the second disturbs its making: train, distill, sign.
Compared is the digest of the release, without the two files that say when it was signed and after which line of the
ledger. A second site's contribution came by hand before.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedcompose import ledger
from fedcompose.bases import resolve_base
from fedcompose.call import make_call, read_own_call
from fedcompose.drafts import create_federation, enrol
from fedcompose.files import dir_hash, folder_digests, write_atomic, write_json
from fedcompose.keys import load_signer, new_key
from fedcompose.leftovers import processes
from fedcompose.routing import RouterConfig
from fedcompose.tasks import training
from fedcompose.tensors import StoredTensor, canonical_safetensors
from fedcompose.trust_state import trusted_federation
from fedcompose_client.jobs import keep, record
from fedcompose_coordinator import intake, publish
from tests.deployed import (
    FEDERATION,
    WAIT_S,
    Deployed,
    Parties,
    found,
    free_port,
    listen_port,
    made_call,
    running,
    sign_everywhere,
)  # fmt: skip
from tests.flow.line import Line
from tests.tiny import make_knowing_base

pytestmark = pytest.mark.slow

HIDDEN = RANK = 512
MODULE_BYTES = 2 * 4 * HIDDEN * RANK
NEAR, BY_HAND = "site-0000", "site-0001"
CUT_S = 5
WHEN = ("provenance.json", "model.sig")  # of the release itself: when it was signed, after which line of the ledger


# A day, and its digest ----------------------------------------------------------------------------


def prepare(folder: Path, modules: int) -> Parties:
    """Two sites that have signed for a call; one of the contributions has come by hand."""
    parties = found(folder, 2, HIDDEN, RANK, modules)
    call = made_call(parties, RANK)
    (envelope,) = (path.read_bytes() for path in (parties.home / "calls").glob("*.json"))
    for name in parties.names:
        keep(parties.site(name), call, envelope, parties.now)
    sign_everywhere(parties, call)
    take_in(parties, parties.site(BY_HAND) / "outbox")
    return parties


def take_in(parties: Parties, folder: Path) -> None:
    base = resolve_base(parties.root / "base")
    receipts = intake.receive([folder], parties.home, parties.federation, base, datetime.now(UTC))
    assert [receipt.outcome for receipt in receipts] == ["admitted"]


def copied(template: Parties, root: Path, monkeypatch: pytest.MonkeyPatch) -> Parties:
    """The same parties elsewhere, with a memory and a port of their own."""
    shutil.copytree(template.root, root, symlinks=True)
    for path in (*root.glob("*/site.toml"), root / "hub" / "coordinator.toml"):
        text = path.read_text().replace(str(template.root), str(root))
        path.write_text(text.replace(f"port = {listen_port(template.home)}", f"port = {free_port()}"))
    monkeypatch.setenv("FEDCOMPOSE_HOME", str(root / "memory"))
    return Parties(root, template.names, template.now)


def release_digest(parties: Parties) -> str:
    """Compose (nothing that has to be trained), release, and hash what stands in it."""
    home, federation = parties.home, parties.federation
    members = sorted(intake.admitted(home, federation), key=lambda each: each.site)
    router = StoredTensor("F32", (len(members), HIDDEN), memoryview(bytes(4 * len(members) * HIDDEN)))
    write_atomic(home / "candidate" / "router.safetensors", canonical_safetensors({"weights.0": router}))
    base = federation.base_models[0]
    write_json(
        home / "candidate" / "composition.json",
        {
            "schema": "fedcompose/composition/v1",
            "method": "hard",
            "base": {"name": base.name, "dirHash": base.dir_hash},
            "router": RouterConfig().model_dump(),
            "experts": [{"site": each.site, "domain": each.domain, "dirHash": each.dir_hash} for each in members],
            "targets": ["up_proj"],
            "attention": None,
            "training": {},
        },
    )
    signer = parties.signer("hub")
    made = publish.release(home, signer, federation, home / "candidate", members, datetime.now(UTC))
    return dir_hash({name: digest for name, digest in folder_digests(made.path).items() if name not in WHEN})


# What can go wrong on the way ---------------------------------------------------------------------


@dataclass
class Scene:
    """What a disturbance has to do with."""

    deployed: Deployed
    line: Line

    @property
    def home(self) -> Path:
        return self.deployed.parties.home

    @property
    def site(self) -> Path:
        return self.deployed.parties.site(NEAR)

    def start(self) -> None:
        self.deployed.start_coordinator()
        self.deployed.join(NEAR, self.line.port)

    def received(self) -> int:
        """Bytes that are on the coordinator's disk."""
        partial = next((self.home / "calls").glob(f"*/{NEAR}/windows"), None)
        try:
            windows = partial.read_text().splitlines(keepends=True) if partial else []
        except FileNotFoundError:  # all has come
            windows = []
        return sum(int(line.split()[1]) for line in windows if line.endswith("\n"))

    def while_fetching(self, after_bytes: int = 1) -> None:
        self.deployed.wait(lambda: self.received() >= after_bytes or self.has_come())
        assert not self.has_come(), "it had come before it could be disturbed"

    def has_come(self) -> bool:
        return self.deployed.state(NEAR) in ("received", "admitted")

    def kill_all_of(self, *places: Path) -> None:
        for process in self.deployed.started:
            words = [str(place) for place in places]
            if process.poll() is None and any(word in argument for word in words for argument in process.args):
                os.kill(process.pid, signal.SIGKILL)
                process.wait()


def kill_superlink(scene: Scene) -> None:
    scene.while_fetching()
    scene.deployed.kill(scene.home, "fedcompose_coordinator.superlink")


def kill_superlink_before_anybody_connects(scene: Scene) -> None:
    scene.deployed.kill(scene.home, "fedcompose_coordinator.superlink")


def kill_driver(scene: Scene) -> None:
    scene.while_fetching()
    scene.deployed.kill(scene.home, "fedcompose_coordinator.driver")


def kill_driver_at_the_offer(scene: Scene) -> None:
    scene.deployed.wait(lambda: scene.deployed.state(NEAR) == "fetching")
    scene.deployed.kill(scene.home, "fedcompose_coordinator.driver")


def kill_driver_when_all_has_come(scene: Scene) -> None:
    scene.deployed.wait(scene.has_come)
    scene.deployed.kill(scene.home, "fedcompose_coordinator.driver")


def kill_coordinator(scene: Scene) -> None:
    scene.while_fetching()
    scene.kill_all_of(scene.home)
    scene.deployed.start_coordinator()


def kill_node(scene: Scene) -> None:
    scene.while_fetching()
    scene.deployed.kill(scene.site, "--only node")


def kill_executor(scene: Scene) -> None:
    scene.while_fetching()
    scene.deployed.kill(scene.site, "--only executor")


def kill_executor_before_the_call(scene: Scene) -> None:
    scene.deployed.kill(scene.site, "--only executor")


def kill_join(scene: Scene) -> None:
    scene.while_fetching()
    scene.kill_all_of(scene.site)
    scene.deployed.join(NEAR, scene.line.port)


def cut_and_mend_the_line(scene: Scene) -> None:
    scene.while_fetching()
    scene.line.cut()
    time.sleep(CUT_S)
    scene.line.mend()


def break_connections(scene: Scene) -> None:
    scene.while_fetching()
    scene.line.break_connections()


def power_cut_everywhere(scene: Scene) -> None:
    scene.while_fetching()
    scene.kill_all_of(scene.home, scene.site)
    scene.start()


DISTURBANCES: list[Callable[[Scene], None]] = [
    kill_superlink_before_anybody_connects, kill_superlink, kill_driver_at_the_offer, kill_driver,
    kill_driver_when_all_has_come, kill_coordinator, kill_executor_before_the_call, kill_node, kill_executor, kill_join,
    break_connections, cut_and_mend_the_line, power_cut_everywhere,
]  # fmt: skip


@contextmanager
def scene_of(parties: Parties) -> Iterator[Scene]:
    line = Line(listen_port(parties.home))
    try:
        with running(parties) as deployed:
            scene = Scene(deployed, line)
            scene.start()
            yield scene
    finally:
        line.close()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parties]:
    """A contribution of 20 MB; made once, for every row begins with the same files."""
    before = os.environ.get("FEDCOMPOSE_HOME")
    yield prepare(tmp_path_factory.mktemp("template") / "all", 10)
    if before is not None:
        os.environ["FEDCOMPOSE_HOME"] = before


@pytest.fixture(scope="module")
def undisturbed(template: Parties, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest when the second contribution, too, is carried by hand, and nothing happens to anybody."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        parties = copied(template, tmp_path_factory.mktemp("undisturbed") / "all", monkeypatch)
        take_in(parties, parties.site(NEAR) / "outbox")
        return release_digest(parties)


@pytest.mark.parametrize("disturb", DISTURBANCES, ids=lambda each: each.__name__)
def test_a_contribution_arrives_all_the_same(
    disturb: Callable[[Scene], None],
    template: Parties,
    undisturbed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parties = copied(template, tmp_path / "all", monkeypatch)
    with scene_of(parties) as scene:
        disturb(scene)
        scene.deployed.wait(lambda: scene.deployed.state(NEAR) == "admitted")
    assert release_digest(parties) == undisturbed


def test_a_release_without_it_has_another_digest(
    template: Parties, undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: a digest that everything has would prove nothing."""
    parties = copied(template, tmp_path / "all", monkeypatch)
    assert release_digest(parties) != undisturbed


def test_an_upload_broken_ten_times_sends_little_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDCOMPOSE_HOME", str(tmp_path / "all" / "memory"))
    parties = prepare(tmp_path / "all", 100)
    size = sum(path.stat().st_size for path in (parties.site(NEAR) / "outbox").rglob("*") if path.is_file())
    with scene_of(parties) as scene:
        for share in range(1, 11):
            scene.while_fetching(share * size // 12)
            scene.line.break_connections()
        scene.deployed.wait(lambda: scene.deployed.state(NEAR) == "admitted")
        sent = scene.line.up
    assert size < sent < 1.05 * size


# What can go wrong while it is made ---------------------------------------------------------------

DOMAIN = "counting"
SITE_TOML = """
id = "clinic"
base = "{root}/base"
key = "keys/clinic.key"
[calls]
decide = "run"
release = "run"
[domains.counting]
file = "problems.jsonl"
task = "numeric"
[domains.counting.columns]
solution = "solution"
[domains.counting.traces]
generator = "count_items"
prompts = 24
[domains.counting.training]
validation_count = 10
test_count = 10
warm_up_steps = 4
steps = 4
prompts_per_step = 2
samples_per_prompt = 2
max_new_tokens = 12
"""


@dataclass
class Maker:
    """A site with a call to answer, and nothing done yet."""

    root: Path

    @property
    def site(self) -> Path:
        return self.root / "clinic"

    def work(self) -> subprocess.Popen[bytes]:
        """The worker, until no work is left."""
        environment = os.environ | {
            "FEDCOMPOSE_HOME": str(self.root / "memory"),
            "SOURCE_DATE_EPOCH": (self.root / "now").read_text(),
            "OMP_NUM_THREADS": "1",
        }
        with (self.root / "work.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "fedcompose", "client", "work", "--once", "--site", str(self.site)],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def finish(self) -> None:
        worker = self.work()
        assert worker.wait(WAIT_S) == 0, (self.root / "work.log").read_text()[-3000:]

    def wait(self, done: Callable[[], bool]) -> None:
        give_up = time.monotonic() + WAIT_S
        while not done():
            assert time.monotonic() < give_up, (self.root / "work.log").read_text()[-3000:]
            time.sleep(0.02)

    def pid(self, words: str) -> int | None:
        commands = {each.pid: each.command for each in processes().values()}
        return next((pid for pid, text in commands.items() if words in text and str(self.site) in text), None)

    def kill(self, words: str) -> None:
        self.wait(lambda: self.pid(words) is not None)
        os.kill(self.pid(words) or 0, signal.SIGKILL)

    def steps(self) -> int:
        path = self.site / "runs" / DOMAIN / "progress.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def events(self) -> list[str]:
        (path,) = (self.site / "calls").glob("*.jsonl")
        return [entry.event for entry in ledger.verify(path)]

    def digest(self) -> str:
        """Of all that was signed, signatures included."""
        return dir_hash(folder_digests(self.site / "outbox"))


def kill_trainer(maker: Maker) -> None:
    worker = maker.work()
    maker.wait(lambda: maker.steps() >= 2)
    maker.kill("client train")
    assert worker.wait(WAIT_S) == 0


def kill_worker_while_training(maker: Maker) -> None:
    worker = maker.work()
    maker.wait(lambda: maker.steps() >= 2)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()


def kill_worker_between_training_and_signing(maker: Maker) -> None:
    worker = maker.work()
    maker.wait(lambda: "trained" in maker.events())
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()


def kill_distiller(maker: Maker) -> None:
    worker = maker.work()
    maker.kill("client distill")
    assert worker.wait(WAIT_S) == 0


def kill_signer(maker: Maker) -> None:
    worker = maker.work()
    maker.kill("client contribute")
    assert worker.wait(WAIT_S) == 0


MAKING: list[Callable[[Maker], None]] = [
    kill_trainer, kill_worker_while_training, kill_worker_between_training_and_signing, kill_distiller, kill_signer,
]  # fmt: skip


@pytest.fixture(scope="module")
def unmade(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    root = tmp_path_factory.mktemp("unmade") / "all"
    make_knowing_base(root / "base", {"count_items": "Answer: 5"})
    now = datetime.now(UTC).replace(microsecond=0)
    chair = load_signer(new_key(root / "chair", "root", "root", None, None).private)
    base = resolve_base(root / "base")
    envelope = create_federation("Faults", chair, "root", {"base": base.digest}, FEDERATION, now)
    hub = new_key(root / "hub", "hub", "coordinator", None, None)
    clinic = new_key(root / "clinic" / "keys", "clinic", "site", DOMAIN, None)
    for key in (hub, clinic):
        envelope = enrol(envelope, key.enrolment.read_bytes(), chair, now)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("FEDCOMPOSE_HOME", str(root / "memory"))
        federation = trusted_federation(envelope, [chair.keyid], now)
        call = make_call(
            federation, load_signer(hub.private), "base", ["adapter", "traces"], deadline=now + timedelta(days=7),
            now=now, nonce=bytes(32),
        )  # fmt: skip
    maker = Maker(root)
    write_atomic(maker.site / "federation.json", envelope)
    write_atomic(root / "now", str(int(now.timestamp())).encode())
    rows = [
        {"question": row.question, "answer": row.answer, "solution": row.solution}
        for row in training("count_items", {}, 100)
    ]
    write_atomic(maker.site / "problems.jsonl", "\n".join(map(json.dumps, rows)).encode())
    keep(maker.site, read_own_call(call), call, now)
    record(maker.site, read_own_call(call).id, "approved", now)
    return maker


def copy_of(unmade: Maker, root: Path) -> Maker:
    shutil.copytree(unmade.root, root)
    write_atomic(root / "clinic" / "site.toml", SITE_TOML.format(root=unmade.root).encode())
    return Maker(root)


@pytest.fixture(scope="module")
def made(unmade: Maker, tmp_path_factory: pytest.TempPathFactory) -> str:
    maker = copy_of(unmade, tmp_path_factory.mktemp("made") / "all")
    maker.finish()
    return maker.digest()


@pytest.mark.parametrize("disturb", MAKING, ids=lambda each: each.__name__)
def test_a_contribution_is_made_all_the_same(
    disturb: Callable[[Maker], None], unmade: Maker, made: str, tmp_path: Path
) -> None:
    maker = copy_of(unmade, tmp_path / "all")
    disturb(maker)
    maker.finish()
    assert maker.events() == ["asked", "approved", "started", "trained", "distilled", "signed"]
    assert maker.digest() == made
    assert maker.pid("client") is None
