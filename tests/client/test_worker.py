"""The worker does the work of approved calls, once, also when it is killed in the middle."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcompose.errors import ConfigError
from fedcompose.supervision import only_one
from fedcompose_client.flower import accept_call
from fedcompose_client.jobs import decide, jobs
from fedcompose_client.worker import work
from tests.client.small_site import TRAINING
from tests.flower_sim import FEDERATION, FlowerSim

QUICK = {"warm_up_steps": 2, "steps": 0, "test_count": 10}
PATIENCE_S = 300


def approved(
    root: Path, base: Path, *, traces: bool = False, federation_id: str = FEDERATION, **training: Any
) -> FlowerSim:
    """A site with data and an approved call; its model is too small to make correct traces."""
    sim = FlowerSim(root, {"site-a": "order"}, federation_id, base)
    site = sim.folder("site-a")
    rows = [{"question": f"{a}{b}", "answer": "yes" if a < b else "no"} for a in range(7) for b in range(7)]
    (site / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = [f"{name} = {value}" for name, value in (TRAINING | training).items()]
    source = '[domains.order.traces]\ngenerator = "logic"\nprompts = 2\n' if traces else ""
    config = (site / "site.toml").read_text().replace("numeric", "yes_no")
    config = config.replace("[domains", '[calls]\nrelease = "run"\n[domains', 1)
    (site / "site.toml").write_text(config + "\n" + source + "[domains.order.training]\n" + "\n".join(settings))
    accept_call(site, sim.call(), sim.now)
    decide(site, jobs(site)[0].call.id, "approved", sim.now)
    return sim


def events(sim: FlowerSim) -> list[str]:
    return [entry.event for entry in jobs(sim.folder("site-a"))[0].events]


def expert_digest(sim: FlowerSim) -> str:
    return hashlib.sha256((sim.outbox("site-a") / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def wait_until(true: Callable[[], bool]) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def test_trains_distills_and_signs_what_was_approved(tmp_path: Path, teachable_base: Path) -> None:
    sim = approved(tmp_path, teachable_base, traces=True, **QUICK)
    work(sim.folder("site-a"), threading.Event(), once=True)
    assert events(sim) == ["asked", "approved", "started", "trained", "distilled", "signed"]
    assert (sim.outbox("site-a") / "adapter" / "model.sig").is_file()
    work(sim.folder("site-a"), threading.Event(), once=True)
    assert len(events(sim)) == 6, "what is ready is not done again"


@pytest.mark.slow
def test_a_step_that_fails_is_written_down_by_its_code(tmp_path: Path, teachable_base: Path) -> None:
    sim = approved(tmp_path, teachable_base, **QUICK)
    (sim.folder("site-a") / "data.jsonl").unlink()
    work(sim.folder("site-a"), threading.Event(), once=True)
    last = jobs(sim.folder("site-a"))[0].events[-1]
    assert (last.event, last.fields["code"]) == ("failed", "DATA_NOT_FOUND")


def test_a_call_that_no_longer_counts_is_not_begun(tmp_path: Path, teachable_base: Path) -> None:
    sim = approved(tmp_path, teachable_base, **QUICK)
    (sim.folder("site-a") / "federation.json").unlink()
    work(sim.folder("site-a"), threading.Event(), once=True)
    assert events(sim) == ["asked", "approved", "failed"]


def test_one_worker_at_a_time(tmp_path: Path, teachable_base: Path) -> None:
    sim = approved(tmp_path, teachable_base, **QUICK)
    site = sim.folder("site-a")
    with only_one(site / "calls" / "worker.pid"), pytest.raises(ConfigError) as refused:
        work(site, threading.Event(), once=True)
    assert refused.value.code == "ALREADY_RUNNING"


@pytest.mark.slow
def test_refusing_ends_the_work(tmp_path: Path, teachable_base: Path) -> None:
    sim = approved(tmp_path, teachable_base, warm_up_steps=100_000)
    site = sim.folder("site-a")
    progress = site / "runs" / "order" / "progress.jsonl"

    def refuse() -> None:
        wait_until(progress.exists)
        decide(site, jobs(site)[0].call.id, "refused", sim.now)

    refusing = threading.Thread(target=refuse)
    refusing.start()
    work(site, threading.Event(), once=True)
    refusing.join()
    assert events(sim) == ["asked", "approved", "started", "refused"]


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_expert(tmp_path: Path, teachable_base: Path) -> None:
    training = {"warm_up_steps": 40, "warm_up_lr": 0.005, "steps": 0}  # more is refused: ADAPTER_TOO_STRONG
    undisturbed, killed = (
        approved(tmp_path / name, teachable_base, federation_id=f"{FEDERATION[:-1]}{name}", **training)
        for name in ("2", "3")
    )
    work(undisturbed.folder("site-a"), threading.Event(), once=True)
    site = killed.folder("site-a")
    progress = site / "runs" / "order" / "progress.jsonl"
    command = [sys.executable, "-m", "fedcompose", "client", "work", "--once", "--site", str(site)]
    for lines in (12, 25):
        worker = subprocess.Popen(command)
        wait_until(lambda lines=lines: progress.exists() and len(progress.read_text().splitlines()) > lines)  # type: ignore[misc]
        worker.kill()
        worker.wait()
        time.sleep(2)  # the trainer notices
    subprocess.run(command, check=True)
    assert events(killed) == ["asked", "approved", "started", "trained", "signed"]
    assert expert_digest(killed) == expert_digest(undisturbed)
