"""The whole flow on one machine: three sites, one coordinator, real keys, a real model, in a fresh folder.

Every step is the command that a person would type, run as a process of its own, so what the demo shows is what a
federation does. It only adds what a demo needs: made-up "private" files, and all the parties in one folder:

    sites/<name>/   coordinator/   root/   release/   logs/   report.html   report.json

An interrupted demo goes on where it stopped: a finished step leaves a mark in `logs/`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fedcompose.errors import FedcomposeError, MissingError
from fedcompose.files import new_folder, write_atomic
from fedcompose.tasks import generator_task, training

BASE = "smollm2-135m"
SITE_ROWS = 1500  # rows of each site's made-up file
FIRST_SEED = 0  # sites' rows; traces are distilled on other seeds, evaluation on the generators' held-out split
LOG_TAIL_LINES = 15


@dataclass(frozen=True)
class Scenario:
    """One site of the demo: its domain, the generator its made-up file comes from, and how its expert is trained."""

    site: str
    domain: str
    generator: str
    config: dict[str, Any]
    reasons: bool  # whether the file has worked solutions; without them the expert answers at once
    training: dict[str, float]


# On two CPU cores, reinforcement was seen to add much where an expert answers at once and little to short chains of
# thought (docs/log.md), so two domains answer at once and one shows its steps.
SCENARIOS = (
    Scenario("clinic", "sums", "chain_sum", {"terms": 2, "max_term": 99}, False, {"max_new_tokens": 16}),
    Scenario("bank", "extremes", "extreme", {}, False, {"max_new_tokens": 16}),
    Scenario(
        "lab",
        "order",
        "order_statistic",
        {},
        True,
        {"warm_up_steps": 24, "steps": 16, "lr": 1e-4, "max_new_tokens": 28},
    ),
)
TRAINING = {"warm_up_steps": 12, "steps": 36}
QUICK_TRAINING = {"warm_up_steps": 5, "steps": 2, "validation_count": 12, "test_count": 12}
QUICK_TRACE_PROMPTS = 32


@dataclass
class Demo:
    """Where a demo lives, and what is running in it now: step → (its command's log, when it started)."""

    out: Path
    seed: int = 0
    quick: bool = False
    base: str = BASE
    scenarios: Sequence[Scenario] = SCENARIOS
    trace_prompts: int = 96  # that each expert is sampled on, for its traces
    on_start: Callable[[str, str], None] = lambda step, command: None
    running: dict[str, tuple[Path, float]] = field(default_factory=dict)

    def step(self, name: str, *arguments: str | Path, threads: int | None = None) -> None:
        """Run one `fedcompose` command unless an earlier demo in this folder finished it.

        Raises: FedcomposeError: `DEMO_STEP_FAILED`, with the end of the command's own output.
        """
        mark = self.out / "logs" / f"{name}.done"
        if mark.exists():
            return
        log = mark.with_suffix(".log")
        self.on_start(name, "fedcompose " + " ".join(map(str, arguments)))
        self.running[name] = (log, time.monotonic())
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "NO_COLOR": "1"}
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        with log.open("w") as stream:
            status = subprocess.run(
                [sys.executable, "-m", "fedcompose", *map(str, arguments)],
                stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=environment, check=False,
            ).returncode  # fmt: skip
        del self.running[name]
        if status:
            raise _failed(name, status, log)
        mark.touch()

    def once(self, name: str, action: Callable[[], None]) -> None:
        """Do something of the demo's own unless an earlier demo in this folder did it."""
        mark = self.out / "logs" / f"{name}.done"
        if not mark.exists():
            action()
            mark.touch()


def run_demo(demo: Demo) -> dict[str, Any]:
    """Run everything and return what `report.json` holds."""
    train_and_receive(demo)
    compose_and_release(demo)
    return dict(json.loads((demo.out / "report.json").read_text()))


def train_and_receive(demo: Demo) -> None:
    """Everything up to the coordinator's store: a federation, every site's training, what they signed taken in."""
    (demo.out / "logs").mkdir(parents=True, exist_ok=True)
    demo.step("base", "base", "pull", demo.base)
    found_federation(demo)
    in_parallel(train_site, [(demo, scenario) for scenario in demo.scenarios])
    hub = demo.out / "coordinator"
    demo.step("collect", "coordinator", "collect", "--home", hub, *_sites(demo))
    demo.step("receive", "coordinator", "receive", hub / "inbox", "--home", hub)


def found_federation(demo: Demo) -> None:
    """Keys, the signed federation file, a folder for every party, and the coordinator's call."""
    root, hub = demo.out / "root", demo.out / "coordinator"
    federation = root / "federation.json"
    new = ("--no-passphrase", "--out")
    demo.step("root-key", "keys", "new", "root", "--role", "root", *new, root / "keys")
    demo.step("hub-key", "keys", "new", "hub", "--role", "coordinator", *new, hub / "keys")
    root_key = root / "keys" / "root.key"
    demo.step(
        "federation", "federation", "init", "--name", "Demo", "--root-key", root_key, "--base", demo.base,
        "--out", federation,
    )  # fmt: skip
    enrolments = [hub / "keys" / "hub.enroll.json"]
    for scenario in demo.scenarios:
        keys = demo.out / "sites" / scenario.site / "keys"
        demo.step(
            f"{scenario.site}-key", "keys", "new", scenario.site, "--role", "site", "--domain", scenario.domain,
            *new, keys,
        )  # fmt: skip
        enrolments.append(keys / f"{scenario.site}.enroll.json")
    for enrolment in enrolments:
        name = enrolment.name.removesuffix(".enroll.json")
        demo.step(
            f"{name}-enroll", "federation", "enroll", enrolment, "--root-key", root_key, "--federation", federation
        )
    for folder in (hub, *(demo.out / "sites" / scenario.site for scenario in demo.scenarios)):
        write_atomic(folder / "federation.json", federation.read_bytes())
    for scenario in demo.scenarios:
        _init_site(demo, scenario)
        demo.once(f"{scenario.site}-settings", partial(_adapt_site, demo, scenario))
    demo.step("hub-init", "coordinator", "init", "--id", "hub", "--home", hub, "--base", demo.base)
    demo.once("hub-settings", partial(_adapt_coordinator, demo))
    demo.step("call", "coordinator", "call", "--home", hub, *_sites(demo))


def train_site(demo: Demo, scenario: Scenario) -> None:
    """What a site's owner does, with one thread: sites train side by side."""
    site = demo.out / "sites" / scenario.site
    for verb in ("train", "distill", "contribute"):
        demo.step(f"{scenario.site}-{verb}", "client", verb, "--domain", scenario.domain, "--site", site, threads=1)


def compose_and_release(demo: Demo) -> None:
    """What the coordinator does; the control without experts is trained beside the real thing."""
    hub = demo.out / "coordinator"
    compose = ("coordinator", "compose", "--home", hub)
    in_parallel(demo_step, [(demo, "compose", compose), (demo, "control", (*compose, "--attention-only"))])
    demo.step("evaluate", "coordinator", "evaluate", "--home", hub)
    demo.step("release", "coordinator", "release", "--home", hub)
    results: list[str | Path] = []
    for scenario in demo.scenarios:
        results += ["--training", demo.out / "sites" / scenario.site / "runs" / scenario.domain / "result.json"]
    demo.step("report", "coordinator", "report", "--home", hub, "--out", demo.out, *results)
    _copy_folder(hub / "release", demo.out / "release")
    demo.step("verify", "verify", demo.out / "release")


def demo_step(demo: Demo, name: str, arguments: Sequence[str | Path]) -> None:
    demo.step(name, *arguments, threads=1)


def in_parallel(function: Callable[..., None], calls: Iterable[tuple[Any, ...]]) -> None:
    """Call `function` with each of the argument tuples, all at once; the first error is raised when all have ended."""
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(function, *arguments) for arguments in calls]
    for each in waiting:
        each.result()


def _init_site(demo: Demo, scenario: Scenario) -> None:
    """The site's own file, made up, and its settings."""
    site = demo.out / "sites" / scenario.site
    rows = training(scenario.generator, scenario.config, SITE_ROWS, FIRST_SEED + demo.seed * 1_000_000)
    named = [{"question": row.question, "answer": row.answer, "solution": row.solution} for row in rows]
    if not scenario.reasons:
        named = [{"question": row.question, "answer": row.answer} for row in rows]
    lines = [json.dumps(row) + "\n" for row in named]
    write_atomic(site / "data.jsonl", "".join(lines).encode())
    demo.step(
        f"{scenario.site}-init", "client", "init", "--site", site, "--id", scenario.site, "--domain", scenario.domain,
        "--file", "data.jsonl", "--task", generator_task(scenario.generator),
        "--traces", scenario.generator, "--base", demo.base, *(["--solution", "solution"] if scenario.reasons else []),
    )  # fmt: skip


def _adapt_site(demo: Demo, scenario: Scenario) -> None:
    """The demo's training settings, typed into `site.toml`."""
    path = demo.out / "sites" / scenario.site / "site.toml"
    settings = (
        TRAINING | scenario.training | (QUICK_TRAINING if demo.quick else {}) | {"seed": demo.seed, "release": '"run"'}
    )
    text = with_settings(path.read_text(), settings)
    config = ", ".join(f"{key} = {json.dumps(value)}" for key, value in scenario.config.items())
    prompts = QUICK_TRACE_PROMPTS if demo.quick else demo.trace_prompts
    source = f"config = {{ {config} }}\nprompts = {prompts}\n"
    generator = f'generator = "{scenario.generator}"\n'
    text = text.replace(generator, generator + source)
    write_atomic(path, text.encode())


def _adapt_coordinator(demo: Demo) -> None:
    """The demo's settings and the domains' public generators, typed into `coordinator.toml`."""
    path = demo.out / "coordinator" / "coordinator.toml"
    lessons = {"steps": 60, "batch": 3 * (len(demo.scenarios) + 1), "mixed_lessons": 45}
    settings = {"processes": 2, "seed": demo.seed, "max_new_tokens": 28} | lessons
    settings |= {"steps": 5, "prompts_per_domain": 12} if demo.quick else {}
    text = with_settings(path.read_text(), settings)
    for scenario in demo.scenarios:
        config = ", ".join(f"{key} = {json.dumps(value)}" for key, value in scenario.config.items())
        text += f'\n[domains.{scenario.domain}]\nsite = "{scenario.site}"\ngenerator = "{scenario.generator}"\n'
        text += f"config = {{ {config} }}\n"
    write_atomic(path, text.encode())


def _sites(demo: Demo) -> list[str | Path]:
    return [part for scenario in demo.scenarios for part in ("--sites", demo.out / "sites" / scenario.site)]


def with_settings(text: str, values: Mapping[str, object]) -> str:
    """The TOML text with the first setting of each name changed, its comment kept."""
    for name, value in values.items():
        text, count = re.subn(rf"^{name} = [^#\n]*", f"{name} = {value}  ", text, count=1, flags=re.MULTILINE)
        if not count:
            raise ValueError(f"no setting {name} in the template")
    return text


def _copy_folder(source: Path, target: Path) -> None:
    with new_folder(target) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)


def _failed(name: str, status: int, log: Path) -> FedcomposeError:
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
    return MissingError(
        "DEMO_STEP_FAILED", f"the step {name!a} ended with status {status}", got=f"its last words:\n{tail}",
        fix=f"see {log}; the same command goes on from here",
    )  # fmt: skip
