"""The README's tour, run as it is written: every command of it, in its order, in one empty folder.

Three things differ from what a reader does. The base model is a two-layer one, taught to answer every problem alike, in
the place of the one that would be downloaded. The settings files ask for fewer steps and prompts. What the tour says to
repeat for `site-b` is repeated.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.tiny import make_knowing_base

ROOT = Path(__file__).parents[2]
OTHER_SITE = {"site-a": "site-b", "counting": "logic", "count_items": "logic", "numeric": "yes_no"}
SHORTER = {
    "validation_count": 10, "test_count": 10, "warm_up_steps": 1, "steps": 2, "prompts_per_step": 2,
    "samples_per_prompt": 2, "max_new_tokens": 12, "batch": 4, "prompts_per_domain": 10,
}  # fmt: skip
ANSWERS = {"count_items": "Answer: 5", "logic": "Answer: yes"}


def blocks() -> list[str]:
    """The shell blocks of the tour."""
    tour = (ROOT / "README.md").read_text().partition("## A tour")[2].partition("\n## ")[0]
    return re.findall(r"```sh\n(.*?)```", tour, re.DOTALL)


@pytest.fixture(scope="module")
def knowing_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_knowing_base(tmp_path_factory.mktemp("knowing") / "base", ANSWERS)


def test_the_tour_runs_as_written(tmp_path: Path, private_home: Path, knowing_base: Path) -> None:
    shutil.copytree(knowing_base, private_home / "bases" / "smollm2-135m")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    folder = tmp_path / "tour"
    folder.mkdir()
    pull, *steps, use = blocks()
    assert pull == "fedcompose base pull smollm2-135m\n"
    for step in steps:
        run(shortened(step), folder)
        if "site-a" in step and "hub/" not in step:
            run(shortened(for_other_site(step)), folder)
    root = run("sha256sum keys/root.pub", folder).split()[0]
    verify, inspect, chat, serve = use.replace("$ROOT", root).splitlines()
    assert "Verified" in run(verify, folder)
    assert "counting" in run(inspect, folder)
    run(chat, folder, typed="Is True and False true?\n")
    assert answer_of(serve, folder)


def run(script: str, folder: Path, typed: str = "") -> str:
    """Run lines of the README by the shell that a reader would paste them into."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
        input=typed, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def for_other_site(step: str) -> str:
    return re.sub("|".join(OTHER_SITE), lambda found: OTHER_SITE[found.group()], step)


def shortened(step: str) -> str:
    """The same lines, with every settings file adapted as soon as it is there, and $ROOT known in each block."""
    numbers = "; ".join(f"s/^{name} = [0-9]*/{name} = {value}/" for name, value in SHORTER.items())
    adapt = f"sed -i -e '{numbers}' site-?/site.toml hub/coordinator.toml 2>/dev/null || true\n"
    lines = re.split(r"^(?=fedcompose )", step, flags=re.MULTILINE)
    known = "ROOT=$(sha256sum keys/root.pub 2>/dev/null | cut -d' ' -f1) || true\n"
    return known + adapt.join(lines)


def answer_of(serve: str, folder: Path) -> str:
    """Start the server as the README does, but on a free port, and ask it one question."""
    command = [str(Path(sys.executable).parent / "fedcompose"), *serve.split()[1:], "--port", "0"]
    question = {"model": "auto", "messages": [{"role": "user", "content": "Is True true?"}], "max_tokens": 8}
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = next(found.group() for line in server.stdout if (found := re.search(r"http://127[.\d:]+", line)))
            request = urllib.request.Request(  # noqa: S310
                f"{url}/v1/chat/completions", json.dumps(question).encode(), {"Content-Type": "application/json"}
            )
            deadline = time.monotonic() + 60
            while True:
                try:
                    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
                        return str(json.load(response)["choices"][0]["message"]["content"])
                except urllib.error.URLError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.2)
        finally:
            server.send_signal(signal.SIGINT)


def test_the_tour_is_not_empty() -> None:
    assert sum(block.count("fedcompose ") for block in blocks()) > 10
