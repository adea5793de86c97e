"""A whole cycle by hand, in a network namespace without a single interface that is up: nothing can be reached.

The commands in the middle are those of docs/operate.md; from `compose` on they are those of any other day.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedcompose.bases import resolve_base
from fedcompose.demo import with_settings
from fedcompose.drafts import create_federation, enrol
from fedcompose.files import write_atomic
from fedcompose.keys import load_signer, new_key
from fedcompose.tasks import training
from fedcompose.trust_state import trusted_federation
from tests.tiny import make_knowing_base

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
FEDERATION = "urn:uuid:6b0c0000-0000-4000-8000-000000000011"
SHORTER = {
    "validation_count": 10, "test_count": 10, "warm_up_steps": 1, "steps": 1, "prompts_per_step": 2,
    "samples_per_prompt": 2, "max_new_tokens": 12, "batch": 2,
}  # fmt: skip
NAMESPACE = ["unshare", "--user", "--map-root-user", "--net"]
TIMEOUT_S = 600


def has_namespaces() -> bool:
    return shutil.which("unshare") is not None and subprocess.run([*NAMESPACE, "true"], check=False).returncode == 0


pytestmark = pytest.mark.skipif(not has_namespaces(), reason="this kernel gives us no network namespaces")


def cycle() -> list[tuple[str, str]]:
    """Who types what, of the page's last block."""
    page = (ROOT / "docs" / "operate.md").read_text().partition("## Without a network")[2]
    (block,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    lines = [re.match(r"(\w+): +(fedcompose .*?)(?:  .*)?$", line) for line in block.splitlines()]
    return [(line[1], line[2]) for line in lines if line]


@pytest.mark.slow
def test_the_whole_cycle_needs_no_network(tmp_path: Path, private_home: Path) -> None:
    prepare(tmp_path, private_home)
    typed = cycle()
    assert len(typed) == 7
    (tmp_path / "carried").mkdir()
    for machine, command in typed:
        in_namespace(re.sub(r"(call\.json|stick/)$", rf"{tmp_path}/carried/\1", command), tmp_path / machine)
    for command in ("compose", "release"):
        in_namespace(f"fedcompose coordinator {command}", tmp_path / "hub")
    found = json.loads(in_namespace("fedcompose verify release --json", tmp_path / "hub"))
    assert found["verified"]


def test_in_the_namespace_nothing_can_be_reached() -> None:
    """Negative control: outside of it the same connection is made."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        reach = f"import socket; socket.create_connection(('127.0.0.1', {listener.getsockname()[1]}), timeout=2)"
        assert subprocess.run([sys.executable, "-c", reach], check=False).returncode == 0
        inside = subprocess.run([*NAMESPACE, sys.executable, "-c", reach], check=False, capture_output=True)
    assert inside.returncode != 0


def prepare(folder: Path, private_home: Path) -> None:
    """Keys, the federation file, settings and data: what was there before the cable was pulled."""
    base = make_knowing_base(private_home / "bases" / "smollm2-135m", {"count_items": "Answer: 5"})
    now = datetime.now(UTC)
    root = load_signer(new_key(folder / "root", "root", "root", None, None).private)
    envelope = create_federation("Air", root, "root", {"base": resolve_base(base).digest}, FEDERATION, now)
    hub = new_key(folder / "hub" / "keys", "hub", "coordinator", None, None)
    clinic = new_key(folder / "clinic" / "keys", "clinic", "site", "counting", None)
    for key in (hub, clinic):
        envelope = enrol(envelope, key.enrolment.read_bytes(), root, now)
    trusted_federation(envelope, [root.keyid], now)
    for machine in ("hub", "clinic"):
        write_atomic(folder / machine / "federation.json", envelope)
    rows = [
        json.dumps({"question": row.question, "answer": row.answer, "solution": row.solution})
        for row in training("count_items", {}, 100)
    ]
    write_atomic(folder / "clinic" / "problems.jsonl", "\n".join(rows).encode())
    in_namespace(
        "fedcompose client init --id clinic --domain counting --file problems.jsonl --traces count_items",
        folder / "clinic",
    )
    in_namespace("fedcompose coordinator init --id hub", folder / "hub")
    for path in (folder / "clinic" / "site.toml", folder / "hub" / "coordinator.toml"):
        text = path.read_text()
        known = {name: value for name, value in SHORTER.items() if re.search(rf"(?m)^{name} = ", text)}
        path.write_text(with_settings(text, known))


def in_namespace(command: str, folder: Path) -> str:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [*NAMESPACE, "bash", "-euo", "pipefail", "-c", command], cwd=folder, check=False, capture_output=True,
        text=True, timeout=TIMEOUT_S, env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout
