from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import astuple, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

import fedcompose
from fedcompose.bases import Base, resolve_base
from fedcompose.contribution import VerifiedContribution
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.files import dir_hash, folder_digests
from fedcompose.model.composed import assemble
from fedcompose.model.experts import TARGETS
from fedcompose.model.lm import load_base
from fedcompose_coordinator import compose as step
from fedcompose_coordinator.compose import ComposeSettings, compose
from fedcompose_coordinator.lessons import Lesson, encode, micro_batches, plan_batches
from tests.federation_sim import FederationSim

LETTERS = {"alpha": "A", "beta": "B"}
QUICK = ComposeSettings(steps=6, batch=4, checkpoint_every=2)


def _lessons(domain: str, count: int) -> list[Lesson]:
    """Repeat the domain's letter: a prompt says which letter, an expert has learned to write it."""
    letter = LETTERS[domain]
    return [Lesson(domain, letter.lower() * (3 + n % 4), letter * (6 + n % 3)) for n in range(count)]


@pytest.fixture(scope="module")
def lively_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with longer embeddings: as it was born, no logit of it can exceed 0.7."""
    model: Any
    model, tokenizer = load_base(tiny_base, torch.float32)
    model.get_input_embeddings().weight.data *= 15
    folder = tmp_path_factory.mktemp("base") / "lively"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _train_expert(base: Path, folder: Path, domain: str) -> Path:
    """A small expert that writes its own letter, whatever it is asked."""
    from peft import LoraConfig, get_peft_model

    model: Any
    model, tokenizer = load_base(base, torch.float32)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
    prompts = [lesson.prompt for name in LETTERS for lesson in _lessons(name, 4)]
    lessons = [Lesson(domain, prompt, LETTERS[domain] * 7) for prompt in prompts]
    rows = encode(tokenizer, lessons, [domain])
    for _ in range(25):
        optimizer.zero_grad()
        (step.completion_loss(model, rows, tokenizer.pad_token_id) / len(rows)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink()
    return folder


@pytest.fixture(scope="module")
def contributions(lively_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[VerifiedContribution]:
    store = tmp_path_factory.mktemp("store")
    folders = [_train_expert(lively_base, store / domain, domain) for domain in LETTERS]
    return [_admitted(folder) for folder in folders]


def _admitted(folder: Path) -> VerifiedContribution:
    digests = folder_digests(folder)
    return VerifiedContribution(
        path=folder, kind="adapter", site=f"site-{folder.name}", domain=folder.name, dir_hash=dir_hash(digests),
        keyid="", payload_sha256="", provenance=cast("Any", None), digests=digests,
        received_on=datetime.now(UTC),
    )  # fmt: skip


@pytest.fixture
def base(lively_base: Path) -> Base:
    return resolve_base(lively_base)


@pytest.fixture(scope="module")
def lessons() -> list[Lesson]:
    return [lesson for domain in LETTERS for lesson in _lessons(domain, 12)]


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def test_the_router_learns_which_expert_knows_which_domain(
    base: Base, contributions: Sequence[VerifiedContribution], lessons: list[Lesson], tmp_path: Path
) -> None:
    settings = ComposeSettings(steps=30, batch=8, router_lr=3e-2)

    composition = compose(contributions, lessons, base, settings, 0, tmp_path / "candidate")

    log = _log(tmp_path / "candidate")
    assert [line["step"] for line in log] == list(range(1, 31))
    assert log[0]["routing_accuracy"] < 0.75
    assert composition["training"]["routing_accuracy"] > 0.85 and min(log[-1]["own_share"].values()) > 0.8
    assert log[-1]["loss"] < 0.6 * log[0]["loss"]
    assert log[-1]["router_moved"] > 0.5 and log[-1]["entropy"] < log[0]["entropy"]


def test_a_candidate_holds_what_a_release_needs_and_experts_stay_as_shipped(
    base: Base, contributions: Sequence[VerifiedContribution], lessons: list[Lesson], tmp_path: Path
) -> None:
    composition = compose(contributions, lessons, base, QUICK, 0, tmp_path / "candidate")

    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {
        "candidate/composition.json", "candidate/router.safetensors", "candidate/training.jsonl",
        "candidate/attention/adapter_config.json", "candidate/attention/adapter_model.safetensors",
    }  # fmt: skip
    assert json.loads((tmp_path / "candidate/composition.json").read_text()) == composition
    assert composition["base"] == {"name": base.name, "dirHash": base.digest}
    assert composition["experts"] == [
        {"site": each.site, "domain": each.domain, "dirHash": dir_hash(folder_digests(each.path))}
        for each in contributions
    ]


def test_the_assembled_candidate_writes_as_it_was_taught(
    base: Base, contributions: Sequence[VerifiedContribution], lessons: list[Lesson], tmp_path: Path
) -> None:
    settings = ComposeSettings(steps=20, batch=8, router_lr=3e-2)
    compose(contributions, lessons, base, settings, 0, tmp_path / "candidate")

    model, tokenizer = assemble(base, [each.path for each in contributions], tmp_path / "candidate")
    row = encode(tokenizer, [Lesson("beta", "bbbb", "B")], ["beta"])[0]
    written = model.generate(torch.tensor([row.ids[: row.prompt]]), max_new_tokens=5, do_sample=False)

    assert tokenizer.decode(written[0, row.prompt :]) == "BBBBB"


def test_the_attention_only_control_runs_the_same_loop_without_experts(
    base: Base, contributions: Sequence[VerifiedContribution], lessons: list[Lesson], tmp_path: Path
) -> None:
    settings = ComposeSettings(steps=20, batch=8, attention_lr=1e-2)

    composition = compose(contributions, lessons, base, settings, 0, tmp_path / "control", experts=False)

    log = _log(tmp_path / "control")
    assert log[-1]["loss"] < 0.8 * log[0]["loss"] and "share" not in log[0]
    assert composition["experts"] == [] and composition["router"] is None
    assert not (tmp_path / "control" / "router.safetensors").exists()
    model, _ = assemble(base, [], tmp_path / "control")
    assert not hasattr(model, "routing")


class _PowerCut(BaseException):
    pass


def test_a_run_that_was_cut_off_continues_to_the_same_digests(
    base: Base, contributions: Sequence[VerifiedContribution], lessons: list[Lesson], tmp_path: Path
) -> None:
    def cut(done: int, steps: int, note: str) -> None:
        if done == 5:
            raise _PowerCut

    compose(contributions, lessons, base, QUICK, 0, tmp_path / "whole")
    with pytest.raises(_PowerCut):
        compose(contributions, lessons, base, QUICK, 0, tmp_path / "cut", on_step=cut)
    assert not (tmp_path / "cut").exists()
    steps: list[int] = []
    compose(contributions, lessons, base, QUICK, 0, tmp_path / "cut", on_step=lambda done, *_: steps.append(done))

    whole, again = (folder_digests(tmp_path / name) for name in ("whole", "cut"))
    assert steps == [5, 6]
    for digests in (whole, again):
        del digests["training.jsonl"]  # holds seconds
    assert whole == again


def test_a_checkpoint_of_another_run_is_not_continued(
    base: Base, contributions: Sequence[VerifiedContribution], lessons: list[Lesson], tmp_path: Path
) -> None:
    def cut(done: int, steps: int, note: str) -> None:
        if done == 3:
            raise _PowerCut

    with pytest.raises(_PowerCut):
        compose(contributions, lessons, base, QUICK, 0, tmp_path / "out", on_step=cut)
    steps: list[int] = []
    compose(contributions, lessons, base, QUICK, 1, tmp_path / "out", on_step=lambda done, *_: steps.append(done))

    assert steps == [1, 2, 3, 4, 5, 6]


def test_refuses_an_expert_that_changed_since_it_was_admitted(
    base: Base, lessons: list[Lesson], tmp_path: Path
) -> None:
    admitted = _admitted(_train_expert(base.path, tmp_path / "alpha", "alpha"))
    with (tmp_path / "alpha" / "adapter_config.json").open("a") as config:
        config.write("\n")

    with pytest.raises(RefusedError) as refusal:
        compose([admitted], lessons, base, QUICK, 0, tmp_path / "candidate")
    assert refusal.value.code == "FILE_CHANGED" and not (tmp_path / "candidate").exists()


def test_refuses_when_an_expert_changes_in_memory(
    base: Base,
    contributions: Sequence[VerifiedContribution],
    lessons: list[Lesson],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The guard itself works: a composition that touches one expert weight is refused."""
    built: list[Any] = []

    def keep(model: Any, *arguments: Any) -> Any:
        built.append(compose_model(model, *arguments))
        return built[-1]

    compose_model = step.compose_model
    monkeypatch.setattr(step, "compose_model", keep)

    def touch(done: int, steps: int, note: str) -> None:
        built[0].get_submodule("model.layers.0.mlp.block.up_proj").experts.a[0, 0] += 1

    with pytest.raises(RefusedError) as refusal:
        compose(contributions, lessons, base, QUICK, 0, tmp_path / "candidate", on_step=touch)
    assert refusal.value.code == "EXPERT_CHANGED" and not (tmp_path / "candidate").exists()


def test_says_when_there_is_nothing_to_compose(
    base: Base, contributions: Sequence[VerifiedContribution], lessons: list[Lesson], tmp_path: Path
) -> None:
    for admitted, taught, code in (
        ([], lessons, "COMPOSE_NO_EXPERTS"),
        (contributions, [], "COMPOSE_NO_LESSONS"),
        (contributions, [lesson for lesson in lessons if lesson.domain == "alpha"], "COMPOSE_NO_LESSONS"),
    ):
        with pytest.raises(ConfigError) as error:
            compose(admitted, taught, base, QUICK, 0, tmp_path / "candidate")
        assert error.value.code == code


def test_the_loss_is_that_of_the_whole_model_on_completion_tokens_alone(base: Base, lessons: list[Lesson]) -> None:
    model: Any
    model, tokenizer = load_base(base.path, torch.float32)
    rows = encode(tokenizer, lessons[:2] + lessons[-2:], list(LETTERS))

    together = step.completion_loss(model, rows, tokenizer.pad_token_id)

    one_by_one = 0.0
    for row in rows:
        logits = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        one_by_one -= sum(float(logits[at - 1, row.ids[at]]) for at in range(row.prompt, len(row.ids)))
    assert float(together) == pytest.approx(one_by_one, rel=1e-5)


def test_the_learning_rate_warms_up_and_ends_near_zero() -> None:
    settings = ComposeSettings(steps=40, warm_up=0.1)
    rates = [step.schedule(at, settings) for at in range(40)]

    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8]) and rates[4] == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.01


def test_a_candidate_becomes_a_release_that_loads(sim: FederationSim) -> None:
    for site in sim.sites:
        sim.contribute(site)
    sim.receive()
    lessons = [Lesson(site.domain, "hi", "ho") for site in sim.sites.values()]
    compose(sim.admitted(), lessons, sim.base, QUICK, 0, sim.coordinator_home / "candidate")

    release = sim.release()

    model, _ = fedcompose.load(release.path, [sim.root.keyid], base=sim.base.path)
    assert release.composition["training"]["steps"] == QUICK.steps
    assert model.router.weight.shape == (len(sim.sites), 32)


TWO_PROCESSES = """
import json, sys
from pathlib import Path
from fedcompose_coordinator.compose import ComposeSettings, compose
from fedcompose_coordinator.lessons import Lesson
from fedcompose.bases import resolve_base
lessons = [Lesson(*each) for each in json.loads(sys.argv[2])]
compose([], lessons, resolve_base(sys.argv[1]), ComposeSettings(steps=4, batch=8), 0, Path(sys.argv[3]), experts=False)
"""


@pytest.mark.slow
def test_two_processes_share_the_work_and_learn_the_same(base: Base, lessons: list[Lesson], tmp_path: Path) -> None:
    settings = ComposeSettings(steps=4, batch=8)
    unlike = [replace(each, prompt=each.prompt * (1 + n % 4)) for n, each in enumerate(lessons)]
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    compose([], unlike, base, settings, 0, tmp_path / "one", experts=False)

    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(tmp_path / "script.py")]
    arguments = [str(base.path), json.dumps([astuple(each) for each in unlike]), str(tmp_path / "two")]
    subprocess.run([*command, *arguments], check=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"})

    one, two = (load_file(tmp_path / name / "attention" / "adapter_model.safetensors") for name in ("one", "two"))
    assert len(micro_batches(plan_batches(encode(load_base(base.path)[1], unlike, ["alpha", "beta"]), 8, 1, 0)[0])) > 1
    assert all(torch.allclose(one[name], two[name], rtol=0, atol=1e-5) for name in one)
