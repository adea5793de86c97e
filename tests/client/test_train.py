"""Training a tiny random model to the end, and again after being killed in the middle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedcompose.errors import ConfigError
from fedcompose.files import folder_digests
from fedcompose.tasks import Example
from fedcompose_client.config import Domain
from fedcompose_client.data import Splits
from fedcompose_client.own_rows import OwnRows, made_from
from fedcompose_client.train import train
from tests.client.small_site import make_site, silent


class Killed(BaseException):
    """Stands for kill -9: no handler of ours may see it."""


def test_training_leaves_an_expert_and_honest_numbers(tmp_path: Path, teachable_base: Path) -> None:
    site = tmp_path / "site"
    result = train(site, make_site(site, teachable_base), "order", silent)
    assert set(result["accuracy"]) == {"base", "warmup", "rlvr"}
    assert all(entry["n"] == 10 for entry in result["accuracy"].values())
    assert result["kept"] in ("warmup", "rlvr")
    assert len(result["rewards"]) == 6 and max(result["rewards"]) > 0.2  # there was something to learn from
    assert result["warm_up_losses"][-1] < result["warm_up_losses"][0]
    expert = site / "runs/order/expert"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in expert.iterdir()}
    assert json.loads((site / "runs/order/result.json").read_text()) == json.loads(json.dumps(result))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, teachable_base: Path) -> dict[str, str]:
    """The files of an expert whose training nothing interrupted."""
    site = tmp_path_factory.mktemp("sites") / "whole"
    train(site, make_site(site, teachable_base), "order", silent)
    return folder_digests(site / "runs/order/expert")


@pytest.mark.parametrize("victim", [("warm_up", 5), ("rlvr", 3), ("rlvr", 6), ("test warmup", 10), ("test rlvr", 10)])
def test_a_killed_run_resumes_to_the_same_expert(
    tmp_path: Path, teachable_base: Path, whole: dict[str, str], victim: tuple[str, int]
) -> None:
    site = tmp_path / "killed"
    config = make_site(site, teachable_base)

    def kill(stage: str, step: int, steps: int, note: str) -> None:
        if (stage, step) == victim:
            raise Killed

    with pytest.raises(Killed):
        train(site, config, "order", kill)
    train(site, config, "order", silent)
    assert folder_digests(site / "runs/order/expert") == whole


def test_refuses_to_resume_with_other_settings(tmp_path: Path, teachable_base: Path) -> None:
    site = tmp_path / "site"
    train(site, make_site(site, teachable_base, warm_up_steps=1, steps=0), "order", silent)
    other = make_site(tmp_path / "other", teachable_base, warm_up_steps=1, steps=0, warm_up_lr=0.5)
    with pytest.raises(ConfigError) as caught:
        train(site, other, "order", silent)
    assert caught.value.code == "RUN_OTHER_SETTINGS"
    made = [site / "runs/order" / name for name in ("traces.jsonl", "review.json", "audit/audit.json")]
    for path in made:  # of the old expert
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    train(site, other, "order", silent, fresh=True)
    assert not any(path.exists() for path in made)


def test_a_run_is_made_from_solutions_and_owners_too(tmp_path: Path) -> None:
    rows = [Example("1 + 1?", "2", "two"), Example("2 + 2?", "4", "four")]
    ordinary = Domain(file=Path("rows.jsonl"), task="numeric")
    names = []
    for solutions in (("two", "four"), ("two", "vier"), (None, None)):
        solved = [replace(row, solution=solution) for row, solution in zip(rows, solutions, strict=True)]
        for owners in (None, ("ann", "ben"), ("ann", "ann")):
            of = {id(row): owner for row, owner in zip(solved, owners, strict=True)} if owners else None
            names.append(made_from("0" * 64, ordinary, None, OwnRows(solved, Splits([], [], []), of)))
    assert len(set(names)) == len(names)


def test_progress_is_written_for_watchers(tmp_path: Path, teachable_base: Path) -> None:
    site = tmp_path / "site"
    train(site, make_site(site, teachable_base, warm_up_steps=1), "order", silent)
    lines = [json.loads(line) for line in (site / "runs/order/progress.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["stage"] == "rlvr"] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["stage"] == "done"
