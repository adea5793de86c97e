"""Types the first day of docs/operate.md: three organisations, a coordinator and a root, each in a folder of its own.

    python examples/three_organisations/run.py day            as it stands there (the better part of an hour, two cores)
    python examples/three_organisations/run.py day --quick    with few training steps (minutes)

Every block of that page says in its first line on which machines it is typed, and `mail` between them. A block for
several is written for the first; the others type their own name and domain. What goes on (`service`) ends with the day.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fedcompose.bases import cache_dir
from fedcompose.demo import with_settings
from fedcompose.files import write_atomic
from fedcompose.tasks import training

PAGE = Path(__file__).parents[2] / "docs" / "operate.md"
BLOCK = re.compile(r"^```sh ([a-z ]+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
DOMAINS = {"clinic": "counting", "bank": "logic", "lab": "sums"}
GENERATORS = {"clinic": "count_items", "bank": "logic", "lab": "chain_sum"}
MACHINES = ("ann", "hub", *DOMAINS)
ROWS = 700
PORT = "9443"  # of the page; here a free one takes its place
QUICK = {
    "validation_count": 20, "test_count": 20, "warm_up_steps": 6, "steps": 2, "prompts_per_domain": 20, "processes": 2,
}  # fmt: skip
ASKED_TIMEOUT_S = 300
STOP_TIMEOUT_S = 30


@dataclass
class Day:
    """The folder with all machines, the settings to change in it, and what is running."""

    folder: Path
    settings: Mapping[str, int]
    port: str
    services: list[subprocess.Popen[bytes]] = field(default_factory=list)


def blocks() -> list[tuple[list[str], str]]:
    """Who types what, in the order of the page."""
    return [(tags.split(), text) for tags, text in BLOCK.findall(PAGE.read_text())]


@contextmanager
def morning(folder: Path, settings: Mapping[str, int]) -> Iterator[Day]:
    """An empty folder for each machine, the sites' data, a passphrase each; in the evening nothing goes on."""
    day = Day(folder, settings, free_port())
    for machine in MACHINES:
        home = folder / machine / ".fedcompose"
        home.mkdir(parents=True)
        (home / "bases").symlink_to(cache_dir())
        (home / "passphrase").write_text(secrets.token_hex(16))
        (home / "passphrase").chmod(0o600)
    for machine, generator in GENERATORS.items():
        rows = [vars(each) for each in training(generator, {}, ROWS)]
        lines = [json.dumps({name: row[name] for name in ("question", "answer", "solution")}) for row in rows]
        (folder / machine / "problems.jsonl").write_text("\n".join(lines) + "\n")
    try:
        yield day
    finally:
        for service in day.services:
            service.send_signal(signal.SIGTERM)
        for service in day.services:
            service.wait(STOP_TIMEOUT_S)
        if (folder / "hub" / "coordinator.toml").exists():
            run(day, "hub", "fedcompose coordinator stop || true")


def play(day: Day, tags: list[str], text: str) -> None:
    """One block, on each of its machines."""
    if "mail" in tags:
        run(day, "", text)
        return
    machines = [tag for tag in tags if tag in MACHINES]
    for machine in machines:
        typed = text if machine == machines[0] else as_typed_by(machine, machines[0], text)
        if "asked" in tags:
            wait_for_call(day, machine)
        if "service" in tags:
            start(day, machine, typed)
        else:
            run(day, machine, typed)
    adapt(day)


def as_typed_by(machine: str, first: str, text: str) -> str:
    return re.sub(rf"\b{first}\b", machine, re.sub(rf"\b{DOMAINS.get(first)}\b", DOMAINS.get(machine, ""), text))


def run(day: Day, machine: str, text: str) -> str:
    """Lines typed at a machine; '' is wherever the mail is carried."""
    for line in text.splitlines():
        print(f"{machine or 'mail'}$ {line}", flush=True)
    done = subprocess.run(
        command(text, day), cwd=day.folder / machine, env=environment(day, machine), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, check=False, text=True,
    )  # fmt: skip
    print(done.stdout, flush=True)
    if done.returncode:
        sys.exit(f"{machine}: exit status {done.returncode}")
    return done.stdout


def start(day: Day, machine: str, text: str) -> None:
    print(f"{machine}$ {text.strip()} &", flush=True)
    with (day.folder / machine / "join.log").open("wb") as log:
        service = subprocess.Popen(
            command(f"exec {text}", day), cwd=day.folder / machine, env=environment(day, machine),
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    day.services.append(service)


def command(text: str, day: Day) -> list[str]:
    return ["bash", "-euo", "pipefail", "-c", text.replace(PORT, day.port)]


def environment(day: Day, machine: str) -> dict[str, str]:
    """Each machine has its own memory; the person at it has a passphrase, and has heard Ann's fingerprint."""
    home = day.folder / machine / ".fedcompose"
    root = day.folder / "ann" / "keys" / "ann.pub"
    own = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FEDCOMPOSE_HOME": str(home),
        "FEDCOMPOSE_PASSPHRASE_FILE": str(home / "passphrase"),
        "ANN": hashlib.sha256(root.read_bytes()).hexdigest() if root.exists() else "",
        "OMP_NUM_THREADS": "1",  # three sites train side by side
        "NO_COLOR": "1",
    }
    return {**os.environ, **own}


def wait_for_call(day: Day, machine: str) -> None:
    """People are told by mail that a call is out; here we look."""
    give_up = time.monotonic() + ASKED_TIMEOUT_S
    while not list((day.folder / machine / "calls").glob("*.json")):
        if time.monotonic() > give_up:
            sys.exit(f"{machine}: no call has come in {ASKED_TIMEOUT_S} s; see {machine}/join.log")
        time.sleep(1)


def adapt(day: Day) -> None:
    """The settings that were asked for, in every settings file that is there; and nobody is asked a second time."""
    for path in (*day.folder.glob("*/site.toml"), *day.folder.glob("*/coordinator.toml")):
        text = path.read_text()
        wanted = {"release": '"run"', **day.settings}
        known = {name: value for name, value in wanted.items() if re.search(rf"(?m)^{name} = ", text)}
        adapted = with_settings(text, known)
        if adapted != text:
            write_atomic(path, adapted.encode())


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    subprocess.run([Path(sys.executable).parent / "fedcompose", "base", "pull", "smollm2-135m"], check=True)
    with morning(arguments.folder, QUICK if arguments.quick else {}) as day:
        for tags, text in blocks():
            play(day, tags, text)
    print(f"The release: {arguments.folder / 'clinic' / 'release'}")


if __name__ == "__main__":
    main()
