from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fedcompose
from fedcompose.bases import Base
from fedcompose.contribution import VerifiedContribution
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.files import dir_hash, folder_digests
from fedcompose.model.composed import assemble
from fedcompose.model.lm import load_base
from fedcompose_coordinator import compose as step
from fedcompose_coordinator.completion import completion_losses, make_pass
from fedcompose_coordinator.compose import compose
from fedcompose_coordinator.lessons import Lesson, encode, micro_batches, plan_batches
from fedcompose_coordinator.methods import Recipe, recipe
from tests.coordinator.letters import LETTERS, admit, train_expert
from tests.federation_sim import FederationSim


def _hard(**settings: Any) -> Recipe:
    return recipe("hard", settings)


QUICK = _hard(steps=6, batch=4, checkpoint_every=2)


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def test_the_router_learns_which_expert_knows_which_domain(
    base: Base, contributions: Sequence[VerifiedContribution], lessons: list[Lesson], tmp_path: Path
) -> None:
    wanted = _hard(steps=30, batch=8, router_lr=3e-2)

    composition = compose(contributions, lessons, base, wanted, 0, tmp_path / "candidate")

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
    wanted = _hard(steps=20, batch=8, router_lr=3e-2)
    compose(contributions, lessons, base, wanted, 0, tmp_path / "candidate")

    model, tokenizer = assemble(base, [each.path for each in contributions], tmp_path / "candidate")
    for domain, letter in LETTERS.items():
        row = encode(tokenizer, [Lesson(domain, 4 * letter.lower(), letter)], [domain])[0]
        written = model.generate(torch.tensor([row.ids[: row.prompt + 1]]), max_new_tokens=4, do_sample=False)
        assert tokenizer.decode(written[0, row.prompt :]) == 5 * letter


def test_the_attention_only_control_runs_the_same_loop_without_experts(
    base: Base, contributions: Sequence[VerifiedContribution], lessons: list[Lesson], tmp_path: Path
) -> None:
    wanted = _hard(steps=20, batch=8, attention_lr=1e-2)

    composition = compose(contributions, lessons, base, wanted, 0, tmp_path / "control", experts=False)

    log = _log(tmp_path / "control")
    assert log[-1]["loss"] < 0.8 * log[0]["loss"] and "share" not in log[0]
    assert composition["experts"] == [] and composition["router"] is None
    assert not (tmp_path / "control" / "router.safetensors").exists()
    model, _ = assemble(base, [], tmp_path / "control")
    assert not hasattr(model, "routing")


class _PowerCut(BaseException):
    pass


@pytest.mark.parametrize("method", ["hard", "gumbel", "remix"])
def test_a_run_that_was_cut_off_continues_to_the_same_digests(
    method: str, base: Base, contributions: Sequence[VerifiedContribution], lessons: list[Lesson], tmp_path: Path
) -> None:
    router = {"top_k": 1} if method == "remix" else None  # two of two would be no choice
    wanted = recipe(method, {"steps": 6, "batch": 4, "checkpoint_every": 2, "selections": 2}, router)

    def cut(done: int, steps: int, note: str) -> None:
        if done == 5:
            raise _PowerCut

    compose(contributions, lessons, base, wanted, 0, tmp_path / "whole")
    with pytest.raises(_PowerCut):
        compose(contributions, lessons, base, wanted, 0, tmp_path / "cut", on_step=cut)
    assert not (tmp_path / "cut").exists()
    steps: list[int] = []
    compose(contributions, lessons, base, wanted, 0, tmp_path / "cut", on_step=lambda done, *_: steps.append(done))

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
    admitted = admit(train_expert(base.path, tmp_path / "alpha", "alpha"))
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

    def keep(*arguments: Any) -> Any:
        built.append(prepare(*arguments))
        return built[-1]

    prepare = step.prepare
    monkeypatch.setattr(step, "prepare", keep)

    def touch(done: int, steps: int, note: str) -> None:
        built[0].model.get_submodule("model.layers.0.mlp.block.up_proj").experts.a[0, 0] += 1

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
    for wanted in (_hard(attention_rank=0), recipe("ties"), recipe("arrow")):
        with pytest.raises(ConfigError) as error:
            compose(contributions, lessons, base, wanted, 0, tmp_path / "candidate", experts=False)
        assert error.value.code == "COMPOSE_NOTHING_TO_TRAIN"


def test_the_loss_is_that_of_the_whole_model_on_completion_tokens_alone(base: Base, lessons: list[Lesson]) -> None:
    model: Any
    model, tokenizer = load_base(base.path, torch.float32)
    rows = encode(tokenizer, lessons[:2] + lessons[-2:], list(LETTERS))

    together = completion_losses(model, make_pass(model, rows, tokenizer.pad_token_id))

    for row, loss in zip(rows, together.tolist(), strict=True):
        logits = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        by_hand = -sum(float(logits[at - 1, row.ids[at]]) for at in range(row.prompt, len(row.ids)))
        assert loss == pytest.approx(by_hand, rel=1e-5)


def test_a_candidate_becomes_a_release_that_loads(sim: FederationSim) -> None:
    for site in sim.sites:
        sim.contribute(site)
    sim.receive()
    lessons = [Lesson(site.domain, "hi", "ho") for site in sim.sites.values()]
    compose(sim.admitted(), lessons, sim.base, QUICK, 0, sim.coordinator_home / "candidate")

    release = sim.release()

    model, _ = fedcompose.load(release.path, [sim.root.keyid], base=sim.base.path)
    assert release.composition["training"]["steps"] == QUICK.settings.steps
    assert model.router.scorer.weights[0].shape == (len(sim.sites), 32)


TWO_PROCESSES = """
import json, sys
from pathlib import Path
from fedcompose_coordinator.compose import compose
from fedcompose_coordinator.lessons import Lesson
from fedcompose_coordinator.methods import recipe
from fedcompose.bases import resolve_base
lessons = [Lesson(*each) for each in json.loads(sys.argv[2])]
wanted = recipe("hard", {"steps": 4, "batch": 8})
compose([], lessons, resolve_base(sys.argv[1]), wanted, 0, Path(sys.argv[3]), experts=False)
"""


@pytest.mark.slow
def test_two_processes_share_the_work_and_learn_the_same(base: Base, lessons: list[Lesson], tmp_path: Path) -> None:
    wanted = _hard(steps=4, batch=8)
    unlike = [replace(each, prompt=each.prompt * (1 + n % 4)) for n, each in enumerate(lessons)]
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    compose([], unlike, base, wanted, 0, tmp_path / "one", experts=False)

    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(tmp_path / "script.py")]
    arguments = [str(base.path), json.dumps([astuple(each) for each in unlike]), str(tmp_path / "two")]
    subprocess.run([*command, *arguments], check=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"})

    one, two = (load_file(tmp_path / name / "attention" / "adapter_model.safetensors") for name in ("one", "two"))
    assert len(micro_batches(plan_batches(encode(load_base(base.path)[1], unlike, ["alpha", "beta"]), 8, 1, 0)[0])) > 1
    assert all(torch.allclose(one[name], two[name], rtol=0, atol=1e-5) for name in one)
