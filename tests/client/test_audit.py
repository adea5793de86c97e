"""Audits of tiny runs, end to end, and the verdict by its thresholds."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedcompose.errors import ConfigError, RefusedError
from fedcompose.files import folder_digests
from fedcompose.intervals import Interval
from fedcompose.tasks import Example, get_task
from fedcompose_client import attacks, private
from fedcompose_client.accounting import Steps, epsilon_of
from fedcompose_client.attacks import Reading
from fedcompose_client.audit import CANARIES, Evidence, _attack, audit, judge
from fedcompose_client.canaries import make_canaries
from fedcompose_client.claims import privacy_claims
from fedcompose_client.cli import app
from fedcompose_client.config import Privacy, SiteConfig, load_config
from fedcompose_client.one_run import Bound, one_run_bound
from fedcompose_client.train import train
from tests.client.small_site import TRAINING, silent
from tests.fedcompose.test_provenance import DP


def evidence(
    auc: float = 0.5, high: float = 0.55, chance: float = 0.5, rewarded: float = 0.9, low: float = 0.0
) -> Evidence:
    found: dict[str, Interval | None] = {
        "auc": Interval(auc, auc - 0.05, high, 300), "tpr_0.01": Interval(0.01, 0.0, 0.04, 150), "tpr_0.001": None,
    }  # fmt: skip
    exposure = {"max": 1.0, "median": 0.0}
    return Evidence(
        attacks={"likelihood": found}, bounds={"likelihood": Bound(low, 4.0, 80, 150)}, repeated=(40, 150, 38, 150),
        chance=chance, exposure={"included": exposure, "others": exposure}, rewarded=rewarded,
    )  # fmt: skip


STRONG = evidence(auc=0.97, high=0.99)


@pytest.mark.parametrize(
    ("twin", "control", "canaries", "verdict"),
    [
        (evidence(), STRONG, 300, "pass"),
        (evidence(high=0.61), STRONG, 300, "warn"),
        (evidence(auc=0.56, high=0.59), STRONG, 2000, "warn"),  # above chance, however little
        (evidence(low=0.1), STRONG, 300, "warn"),
        (evidence(), STRONG, 99, "inconclusive"),
        (evidence(), evidence(auc=0.79), 300, "inconclusive"),
        (evidence(rewarded=0.49), STRONG, 300, "inconclusive"),
        (evidence(chance=0.001), evidence(auc=0.6), 50, "fail"),  # what came back came back, however weak the rest
    ],
)
def test_the_verdict_follows_its_thresholds(twin: Evidence, control: Evidence, canaries: int, verdict: str) -> None:
    found = judge(twin, control, canaries)
    assert found["verdict"] == verdict
    assert bool(found["reasons"]) == (verdict != "pass")


def test_how_often_a_training_that_keeps_nothing_passes_is_a_matter_of_canaries() -> None:
    """docs/privacy.md says so: with the default number about four in ten end with a warning, with 1,000 few."""
    lots = np.random.default_rng(0)

    def passed(canaries: int) -> float:
        verdicts = []
        for _ in range(100):
            coins = [bool(coin) for coin in lots.random(canaries) < 0.5]
            found = {"likelihood": _attack(lots.normal(size=canaries).tolist(), coins)}
            verdicts.append(judge(replace(evidence(), attacks=found), STRONG, canaries)["verdict"])
        assert set(verdicts) <= {"pass", "warn"}
        return verdicts.count("pass") / len(verdicts)

    assert 0.4 < passed(CANARIES) < 0.8
    assert passed(1000) > 0.9


def test_a_claim_is_refuted_by_two_twins_and_not_by_one() -> None:
    leaky = evidence(low=2.5)
    assert judge(leaky, STRONG, 300, claimed=2.0, again=leaky)["verdict"] == "fail"
    assert judge(leaky, STRONG, 300, claimed=2.0, again=evidence(low=0.3))["verdict"] == "warn"
    assert judge(leaky, STRONG, 300, claimed=3.0)["verdict"] == "pass"


def test_canaries_teach_an_answer_that_the_expert_sometimes_gives() -> None:
    rows = [Example(f"How many {number}?", "1") for number in range(40)]

    def sampler(questions: Any) -> list[list[str]]:
        return [
            ["Answer: 7", "Answer: 7", "Answer: 8", "nothing"] if "1" in each else ["Answer: 7"] for each in questions
        ]

    made = make_canaries(rows, get_task("numeric"), sampler, 10, seed=0)
    assert made and all({each.answer for each in canary.candidates} == {"7", "8"} for canary in made)
    assert all(canary.taught.answer == "8" for canary in made)  # not what it says anyway
    assert len({canary.question for canary in made}) == len(made)
    assert {canary.included for canary in made} == {True, False}
    assert made == make_canaries(rows, get_task("numeric"), sampler, 10, seed=0)
    certain = make_canaries(rows, get_task("numeric"), lambda asked: [["Answer: 7"]] * len(asked), 10, seed=0)
    assert {canary.taught.answer for canary in certain} == {"1"}  # of other rows
    assert make_canaries(rows, get_task("numeric"), lambda asked: [["Answer: 1"]] * len(asked), 10, seed=0) == []


def test_scores_rise_with_what_training_did() -> None:
    before = Reading((-3.0, -2.0, -2.0), 0.1, False, ((1, 2, 3), (4, 5, 6)))
    after = Reading((-1.0, -2.0, -4.0), 0.8, True, ((1, 2, 3), (1, 2, 3)))
    found = attacks.scores([after, before], [before, before], [0.7, 0.0])
    assert found == {
        "likelihood": [3.0, 0.0],
        "reward": [pytest.approx(0.7), 0.0],
        "drift": [0.7, 0.0],
        "nearest": [1.0, 0.0],
    }
    assert attacks.exposures([after], [before])[0] == pytest.approx(1.585, abs=1e-3)
    worse = replace(before, candidates=(-9.0, -2.0, -2.0))
    assert attacks.exposures([worse], [before]) == [0.0]


def lettered_site(folder: Path, base: Path, **training: Any) -> SiteConfig:
    """Questions that a tiny model is in doubt about: two letters, and whether they are in order."""
    folder.mkdir(parents=True)
    letters = "abcdefghijklmnopqrst"
    rows = [{"question": f"{a}{b}", "answer": "yes" if a < b else "no"} for a in letters for b in letters]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = TRAINING | {"temperature": 1.0, "warm_up_steps": 30} | training
    lines = [f'id = "site-a"\nbase = "{base}"\nkey = "k"\n[domains.order]\nfile = "rows.jsonl"\ntask = "yes_no"']
    lines += ["[domains.order.training]", *(f"{name} = {value}" for name, value in settings.items())]
    (folder / "site.toml").write_text("\n".join(lines))
    return load_config(folder)


def test_an_audit_end_to_end_and_what_of_it_may_leave(tmp_path: Path, teachable_base: Path) -> None:
    site = tmp_path / "site"
    config = lettered_site(site, teachable_base)
    run = site / "runs/order"
    with pytest.raises(ConfigError) as missing:
        audit(site, config, "order", silent)
    assert missing.value.code == "EXPERT_MISSING"
    train(site, config, "order", silent)
    with pytest.raises(RefusedError) as unaudited:
        privacy_claims(run, Privacy(require_audit="pass"))
    assert unaudited.value.code == "AUDIT_BELOW_LIMIT"
    result = audit(site, config, "order", silent, count=24)
    assert result["verdict"] in ("inconclusive", "fail")  # 24 canaries prove nothing good
    assert result == json.loads((run / "audit/audit.json").read_text())
    assert set(result["twin"]["attacks"]) == {"likelihood", "reward", "drift", "nearest"}
    assert audit(site, config, "order", silent, count=24) == result  # and does not train again
    shown = CliRunner().invoke(app, ["audit", "--domain", "order", "--site", str(site), "--canaries", "24"])
    assert shown.exit_code == 0 and f"Verdict: {result['verdict']}" in shown.stdout, shown.output
    assert all(reason in shown.stdout for reason in result["reasons"])
    claims = privacy_claims(run, Privacy())
    assert claims["audit"].verdict == result["verdict"] and claims["audit"].numbers is None and claims["limits"] is None
    assert privacy_claims(run, Privacy(audit_numbers=True))["audit"].numbers.canaries == result["canaries"]
    with pytest.raises(RefusedError) as caught:
        privacy_claims(run, Privacy(require_audit="warn"))
    assert caught.value.code == "AUDIT_BELOW_LIMIT"
    with pytest.raises(RefusedError) as caught:
        privacy_claims(run, Privacy(max_epsilon=8.0))
    assert caught.value.code == "EPSILON_ABOVE_LIMIT"
    trained = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(trained | {"dp": DP.model_dump(mode="json")}))
    private = privacy_claims(run, Privacy(audit_numbers=True))
    assert private["audit"].numbers is None and private["dp"].uncounted == (*DP.uncounted, "audit")
    weights = run / "expert/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")  # another expert in the same folder
    assert privacy_claims(run, Privacy())["audit"] is None


def test_an_audit_is_of_the_settings_and_rows_that_the_expert_was_made_from(
    tmp_path: Path, teachable_base: Path
) -> None:
    """A gentler site.toml would make a gentler twin, which says nothing about the expert that is there."""
    site = tmp_path / "site"
    run = site / "runs/order"
    train(site, lettered_site(site, teachable_base, warm_up_steps=1, steps=0), "order", silent)
    before = folder_digests(run)
    text, rows = (site / "site.toml").read_text(), (site / "rows.jsonl").read_text()
    for path, changed in (
        (site / "site.toml", text.replace("warm_up_steps = 1\n", "warm_up_steps = 2\n")),
        (site / "rows.jsonl", rows.replace('"ab", "answer": "yes"', '"ab", "answer": "no"')),
    ):
        original = path.read_text()
        assert changed != original
        path.write_text(changed)
        with pytest.raises(ConfigError) as refusal:
            audit(site, load_config(site), "order", silent, count=24)
        assert refusal.value.code == "RUN_OTHER_SETTINGS"
        path.write_text(original)
    assert folder_digests(run) == before


@pytest.mark.slow
def test_an_overfitted_expert_fails_and_the_same_training_in_measure_does_not(
    tmp_path: Path, teachable_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedcompose_client.audit.WARM_UP_PASSES", 400)
    site = tmp_path / "site"
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = lettered_site(
        site, teachable_base, steps=0, warm_up_batch=8, warm_up_lr=0.002, rank=16, targets=targets
    )  # fmt: skip
    train(site, config, "order", silent)
    result = audit(site, config, "order", silent, count=16)
    assert result["overfitted_verdict"] == "fail"
    assert result["overfitted"]["attacks"]["likelihood"]["auc"]["value"] > 0.8
    assert result["verdict"] == "inconclusive"  # with so few canaries; but nothing came back


CLAIMED, STEPS, RATE = 1.0, 10, 0.5
NOISE = 6.25  # costs ε = 1.0 at δ = 1e-5 for ten steps that draw half of the units


def mechanism_bound(coins: list[bool]) -> Bound:
    """The steps of a private run on units whose gradients point in directions of their own, audited in one run."""
    units = [(Example(str(number), ""),) for number, coin in enumerate(coins) if coin]
    seen = np.zeros(len(coins))

    def gradient(trees: Any) -> list[torch.Tensor]:
        direction = torch.zeros(len(coins))
        direction[int(trees[0])] = 5.0
        return [direction]

    for _ in range(STEPS):
        drawn = [[unit[0].question] for unit in private.draw_units(units, RATE)]
        (part,) = private.noisy_sum(drawn, gradient, [torch.Size([len(coins)])], private.CLIP_NORM, NOISE)  # type: ignore[arg-type]
        seen += part.numpy()
    return one_run_bound(seen.tolist(), coins, 1e-5)


def test_a_build_whose_noise_is_off_fails_its_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    lots = random.Random(11)
    coins = [lots.random() < 0.5 for _ in range(1000)]
    sound = [evidence(low=mechanism_bound(coins).low) for _ in range(2)]
    assert judge(sound[0], STRONG, 1000, CLAIMED, sound[1])["verdict"] == "pass"
    monkeypatch.setattr(private, "normal", lambda count: np.zeros(count))
    broken = [evidence(low=mechanism_bound(coins).low) for _ in range(2)]
    assert min(each.bounds["likelihood"].low for each in broken) > 3
    assert judge(broken[0], STRONG, 1000, CLAIMED, broken[1])["verdict"] == "fail"


def test_a_build_that_clips_too_late_fails_its_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    lots = random.Random(12)
    coins = [lots.random() < 0.5 for _ in range(1000)]
    monkeypatch.setattr(private, "clipped", lambda gradient, norm: [part.double() for part in gradient])
    assert mechanism_bound(coins).low > CLAIMED


def test_the_noise_above_is_what_the_claim_needs() -> None:
    pytest.importorskip("opacus")
    assert epsilon_of(NOISE, [Steps(RATE, STEPS)], 1e-5) == pytest.approx(CLAIMED, abs=0.01)


@pytest.mark.parametrize(
    "options",
    [["--dp-epsilon", "0"], ["--dp-epsilon", "8", "--dp-unit", "row"], ["--dp-unit", "user"], ["--dp-delta", "1e-6"]],
)
def test_options_that_are_no_guarantee_are_refused_before_any_work(tmp_path: Path, options: list[str]) -> None:
    shown = CliRunner().invoke(app, ["train", "--domain", "order", "--site", str(tmp_path), *options])
    assert isinstance(shown.exception, ConfigError) and shown.exception.code == "DP_UNSOUND"
