"""Training a tiny random model to the end, and again after being killed in the middle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedcompose.errors import ConfigError
from fedcompose.files import folder_digests
from fedcompose_client.config import SiteConfig
from fedcompose_client.train import train

SMALL = {
    "rank": 2, "validation_count": 10, "test_count": 10, "warm_up_steps": 6, "warm_up_batch": 4, "steps": 6,
    "prompts_per_step": 2, "samples_per_prompt": 4, "max_new_tokens": 8, "warm_up_lr": 0.02, "lr": 0.005,
}  # fmt: skip


class Killed(BaseException):
    """Stands for kill -9: no handler of ours may see it."""


def make_site(folder: Path, base: Path, **training: object) -> SiteConfig:
    folder.mkdir()
    rows = [
        {"question": f"{a}+{b}=?", "answer": str(a + b), "solution": f"{a}+{b}."} for a in range(7) for b in range(7)
    ]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    domain = {
        "file": "sums.jsonl",
        "task": "numeric",
        "columns": {"solution": "solution"},
        "training": SMALL | training,
    }
    return SiteConfig.model_validate({"id": "site-a", "base": str(base), "key": "k", "domains": {"math": domain}})


def silent(stage: str, step: int, steps: int, note: str) -> None:
    pass


def test_training_leaves_an_expert_and_honest_numbers(tmp_path: Path, tiny_base: Path) -> None:
    site = tmp_path / "site"
    result = train(site, make_site(site, tiny_base), "math", silent)
    assert set(result["accuracy"]) == {"base", "warmup", "rlvr"}
    assert all(entry["n"] == 10 for entry in result["accuracy"].values())
    assert result["kept"] in ("warmup", "rlvr")
    assert len(result["rewards"]) == 6
    assert result["warm_up_losses"][-1] < result["warm_up_losses"][0]
    expert = site / "runs/math/expert"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in expert.iterdir()}
    assert json.loads((site / "runs/math/result.json").read_text()) == json.loads(json.dumps(result))


@pytest.mark.parametrize("victim", [("warm_up", 5), ("rlvr", 3), ("rlvr", 6), ("test warmup", 10), ("test rlvr", 10)])
def test_a_killed_run_resumes_to_the_same_expert(tmp_path: Path, tiny_base: Path, victim: tuple[str, int]) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(whole, make_site(whole, tiny_base), "math", silent)
    config = make_site(killed, tiny_base)

    def kill(stage: str, step: int, steps: int, note: str) -> None:
        if (stage, step) == victim:
            raise Killed

    with pytest.raises(Killed):
        train(killed, config, "math", kill)
    train(killed, config, "math", silent)
    assert folder_digests(killed / "runs/math/expert") == folder_digests(whole / "runs/math/expert")


def test_refuses_to_resume_with_other_settings(tmp_path: Path, tiny_base: Path) -> None:
    site = tmp_path / "site"
    train(site, make_site(site, tiny_base), "math", silent)
    other = make_site(tmp_path / "other", tiny_base, lr=0.5)
    with pytest.raises(ConfigError) as caught:
        train(site, other, "math", silent)
    assert caught.value.code == "RUN_OTHER_SETTINGS"
    train(site, other, "math", silent, fresh=True)


def test_progress_is_written_for_watchers(tmp_path: Path, tiny_base: Path) -> None:
    site = tmp_path / "site"
    train(site, make_site(site, tiny_base), "math", silent)
    lines = [json.loads(line) for line in (site / "runs/math/progress.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["stage"] == "rlvr"] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["stage"] == "done"
