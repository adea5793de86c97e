"""Audits of tiny runs, end to end, and the verdict by its thresholds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedcompose.errors import ConfigError, RefusedError
from fedcompose.intervals import Interval
from fedcompose.tasks import Example, get_task
from fedcompose_client import attacks, private
from fedcompose_client.attacks import Reading
from fedcompose_client.audit import Evidence, audit, judge
from fedcompose_client.canaries import make_canaries
from fedcompose_client.claims import privacy_claims
from fedcompose_client.config import Dp, Privacy, SiteConfig
from fedcompose_client.one_run import Bound
from fedcompose_client.train import train
from tests.client.small_site import TRAINING, silent


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


def test_a_claim_is_refuted_by_two_twins_and_not_by_one() -> None:
    leaky = evidence(low=2.5)
    assert judge(leaky, STRONG, 300, claimed=2.0, again=leaky)["verdict"] == "fail"
    assert judge(leaky, STRONG, 300, claimed=2.0, again=evidence(low=0.3))["verdict"] == "pass"
    assert judge(leaky, STRONG, 300, claimed=3.0, again=leaky)["verdict"] == "pass"


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
    domain = {"file": "rows.jsonl", "task": "yes_no", "training": settings}
    return SiteConfig.model_validate({"id": "site-a", "base": str(base), "key": "k", "domains": {"order": domain}})


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
    claims = privacy_claims(run, Privacy())
    assert claims["audit"].verdict == result["verdict"] and claims["audit"].numbers is None and claims["limits"] is None
    assert privacy_claims(run, Privacy(audit_numbers=True))["audit"].numbers.canaries == result["canaries"]
    with pytest.raises(RefusedError) as caught:
        privacy_claims(run, Privacy(require_audit="warn"))
    assert caught.value.code == "AUDIT_BELOW_LIMIT"
    with pytest.raises(RefusedError) as caught:
        privacy_claims(run, Privacy(max_epsilon=8.0))
    assert caught.value.code == "EPSILON_ABOVE_LIMIT"
    settings = json.loads((run / "settings.json").read_text())
    (run / "settings.json").write_text(json.dumps(settings | {"lr": 1.0}))  # another run in the same folder
    assert privacy_claims(run, Privacy())["audit"] is None


@pytest.mark.slow
def test_a_private_run_whose_noise_is_off_fails_its_audit(
    tmp_path: Path, teachable_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broken build: it states ε = 0.5 and adds no noise. The audit must find it out, and not the sound one."""
    verdicts = {}
    for name in ("sound", "broken"):
        site = tmp_path / name
        config = lettered_site(
            site, teachable_base, warm_up_steps=120, warm_up_batch=60, warm_up_lr=0.02, steps=0, rank=16
        )
        if name == "broken":
            monkeypatch.setattr(private, "normal", lambda count: private.np.zeros(count))
        train(site, config, "order", silent, dp=Dp(epsilon=0.5, delta=1e-5))
        verdicts[name] = audit(site, config, "order", silent, count=200)
    assert verdicts["broken"]["verdict"] == "fail" and verdicts["broken"]["epsilon"]["low"] > 0.5
    assert verdicts["sound"]["verdict"] != "fail" and verdicts["sound"]["epsilon"]["low"] < 0.5
