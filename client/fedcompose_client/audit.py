"""How much does training like this keep of single rows? Trains a twin with canaries and attacks it.

Input: the run of `fedcompose client train`. Output: `runs/<domain>/audit/audit.json` with a verdict, its reasons and
all numbers; of these only the verdict may leave the site, and the numbers if its owner says so in site.toml.

The twin is trained by the same code with the same settings on the same file, except that about half of the canaries are
among its rows. Without differential privacy it is given only as many rows as one pass of training visits, so that every
included canary is learned from; with it, the number of rows is part of the guarantee and stays. A second, deliberately
overfitted twin sees only canaries, many times: an attack that finds nothing there has no power, and finding nothing
elsewhere then says nothing. Which attack decides is chosen on that second twin. The shipped expert holds no canary and
serves as the reference: what it says about a row without having seen the canary.

Everything is kept in the audit's folder, so that an interrupted audit goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from fedcompose.bases import Base, resolve_base
from fedcompose.errors import ConfigError
from fedcompose.files import dump_json, write_json
from fedcompose.intervals import Interval, ranking
from fedcompose.model.lm import load_base, merged, prompt_ids
from fedcompose.model.sampling import sample
from fedcompose.provenance import Verdict
from fedcompose.tasks import Example, Task, get_task
from fedcompose_client import attacks
from fedcompose_client.attacks import Reading
from fedcompose_client.canaries import Canary, make_canaries
from fedcompose_client.claims import run_digest
from fedcompose_client.config import Domain, Dp, SiteConfig, Training
from fedcompose_client.data import Splits, same_question
from fedcompose_client.one_run import Bound, hits_at, one_run_bound
from fedcompose_client.overlap import excess_p
from fedcompose_client.own_rows import check_made_from, dp_of, made_from, own_rows
from fedcompose_client.run import OnProgress, new_run, note_of
from fedcompose_client.train import keep, learn

CANARIES = 300
FEWEST_CANARIES = 100
LEAST_POWER = 0.8  # AUC on the overfitted twin
LEAST_REWARDED = 0.5  # share of the included canaries that ever earned unequal rewards
CHANCE = 0.5  # the AUC of an attack that knows nothing
HIGHEST_AUC = 0.60  # upper ends of intervals above which an audit warns
HIGHEST_HITS = 0.05
FALSE_SHARES = (0.01, 0.001)
RARE = 0.01  # of an exact test: extraction is a fact when chance explains it more rarely
DELTA_WITHOUT_CLAIM = 1e-5
WARM_UP_PASSES, PASSES = 10, 4  # of the overfitted twin over its canaries
CODE_SAMPLES = 8


@dataclass(frozen=True)
class Evidence:
    """What attacking one twin showed."""

    attacks: dict[str, dict[str, Interval | None]]  # by attack: auc, tpr_0.01, tpr_0.001
    bounds: dict[str, Bound]
    repeated: tuple[int, int, int, int]  # included canaries repeated, of; others repeated, of
    chance: float  # of so many repeated, if training did not matter
    exposure: dict[str, dict[str, float]]
    rewarded: float

    def auc(self, attack: str) -> Interval:
        found = self.attacks[attack]["auc"]
        assert found is not None  # noqa: S101
        return found


@dataclass
class Bench:
    """The base with the expert and the twins as adapters, and what is asked of them."""

    model: Any
    tokenizer: Any
    task: Task
    settings: Training
    on_progress: OnProgress

    def use(self, name: str, folder: Path) -> None:
        if name not in self.model.peft_config:
            self.model.load_adapter(str(folder), name)
        self.model.set_adapter(name)

    def read(self, stage: str, canaries: Sequence[Canary]) -> list[Reading]:
        count = _counter(self.on_progress, stage, len(canaries))
        return attacks.read(self.model, self.tokenizer, self.task, canaries, self.settings, count)

    def sample(self, questions: Sequence[str]) -> list[list[str]]:
        """Some completions of every question by the active adapter."""
        prompts = [prompt_ids(self.tokenizer, self.task.prompt(question)) for question in questions]
        with merged(self.model):
            groups = sample(
                self.model, self.tokenizer, prompts, count=CODE_SAMPLES, temperature=self.settings.temperature,
                max_new_tokens=self.settings.max_new_tokens, seed=self.settings.seed,
            )  # fmt: skip
        return [[one.text for one in group if one.finished] for group in groups]


def audit(
    site: Path, config: SiteConfig, domain_name: str, on_progress: OnProgress, count: int = CANARIES
) -> dict[str, Any]:
    """Audit a finished run; returns what `audit.json` holds.

    Raises: ConfigError: `EXPERT_MISSING`, `AUDIT_NO_CANARIES`; `RUN_OTHER_SETTINGS` where site.toml or the data no
        longer say what the expert was made from.
    """
    run, domain = site / "runs" / domain_name, config.domain(domain_name)
    if not (run / "expert").is_dir():
        raise ConfigError(
            "EXPERT_MISSING", f"{run} holds no finished expert", fix=f"fedcompose client train --domain {domain_name}"
        )
    dp, base = dp_of(run), resolve_base(config.base)
    own = own_rows(site, domain, dp)
    check_made_from(run, made_from(base.digest, domain, dp, own))
    audited = run_digest(run)
    folder = _folder(run / "audit", {"made_from": audited, "count": count})
    if (folder / "audit.json").exists():
        return dict(json.loads((folder / "audit.json").read_text()))
    settings = domain.training.model_copy(update={"engine": "packed"})
    bench = _bench(base, run, domain, on_progress)
    canaries = _canaries(folder, bench, own.splits.train, count, settings.seed)
    reference = _readings(folder, bench, "expert", run / "expert", canaries)
    trained = Trained(folder, base, bench, settings, own.splits, canaries, reference, own.owners)
    twin = trained.twin(0, dp)
    control = trained.control()
    again = None
    claimed = dp.epsilon if dp else None
    if claimed is not None and _bound(twin, control).low > claimed:
        again = trained.twin(1, dp)
    result = {
        "made_from": audited,
        "target": "twin",
        **judge(twin, control, len(canaries), claimed, again),
        "overfitted_verdict": judge(control, control, len(canaries))["verdict"],
        "claimed": dp.model_dump(mode="json") if dp else None,
    }
    write_json(folder / "audit.json", result)
    return result


def judge(
    twin: Evidence, control: Evidence, canaries: int, claimed: float | None = None, again: Evidence | None = None
) -> dict[str, Any]:
    """The verdict by fixed thresholds, why, and the numbers that it is made from."""
    attack = strongest(control)
    bound, power = twin.bounds[attack], control.auc(attack)
    hits = twin.attacks[attack]["tpr_0.01"]
    reasons: dict[Verdict, list[str]] = {"fail": [], "inconclusive": [], "warn": []}
    if twin.chance < RARE:
        hit, of, other, others = twin.repeated
        reasons["fail"].append(
            f"{hit} of {of} canaries came back word for word, and {other} of {others} that it never saw"
        )
    if claimed is not None and again is not None and min(bound.low, again.bounds[attack].low) > claimed:
        reasons["fail"].append(f"two twins leaked an epsilon above the claimed {claimed:g}")
    elif claimed is not None and bound.low > claimed:
        reasons["warn"].append(f"one twin leaked an epsilon above the claimed {claimed:g}")
    if canaries < FEWEST_CANARIES:
        reasons["inconclusive"].append(f"{canaries} canaries are fewer than {FEWEST_CANARIES}")
    if power.value < LEAST_POWER:
        reasons["inconclusive"].append(f"no attack reached an AUC of {LEAST_POWER} on the overfitted twin")
    if twin.rewarded < LEAST_REWARDED:
        reasons["inconclusive"].append(f"training rewarded only {twin.rewarded:.0%} of the canaries that it was given")
    if claimed is None and bound.low > 0:
        reasons["warn"].append(f"the twin leaked an epsilon of at least {bound.low:.2f}")
    if twin.auc(attack).low > CHANCE:
        reasons["warn"].append(f"the AUC is above chance, at least {twin.auc(attack).low:.2f}")
    if twin.auc(attack).high > HIGHEST_AUC:
        reasons["warn"].append(f"the AUC may be as high as {twin.auc(attack).high:.2f}")
    if hits is not None and hits.high > HIGHEST_HITS:
        reasons["warn"].append(f"at 1 % false alarms up to {hits.high:.0%} may be recognised")
    verdict: Verdict = next((name for name, why in reasons.items() if why), "pass")
    return {
        "verdict": verdict,
        "reasons": [why for name in reasons for why in reasons[name]],
        "attack": attack,
        "canaries": canaries,
        "epsilon": asdict(bound),
        "twin": _plain(twin),
        "overfitted": _plain(control),
    }


def strongest(control: Evidence) -> str:
    """The attack that did best where there was most to find."""
    return max(control.attacks, key=lambda name: control.auc(name).value)


@dataclass(frozen=True)
class Trained:
    """Trains and attacks twins of one run."""

    folder: Path
    base: Base
    bench: Bench
    settings: Training
    splits: Splits
    canaries: Sequence[Canary]
    reference: Sequence[Reading]
    owners: Mapping[int, str] | None

    def twin(self, number: int, dp: Dp | None) -> Evidence:
        """As the expert was trained, with the included canaries among its rows."""
        taught, ordinary = self._taught(), self._ordinary()
        if dp is None:
            settings = self.settings
            visited = max(settings.warm_up_steps * settings.warm_up_batch, settings.steps * settings.prompts_per_step)
            ordinary = ordinary[: max(0, visited - len(taught))]
        settings = self.settings.model_copy(update={"seed": self.settings.seed + 1 + number})
        return self._attacked(f"twin-{number}", settings, [*taught, *ordinary], self.splits.validation, dp)

    def control(self) -> Evidence:
        """Nothing but canaries, many times."""
        settings, taught = self.settings, self._taught()
        longer = {
            "warm_up_steps": _passes(WARM_UP_PASSES, len(taught), settings.warm_up_batch, settings.warm_up_steps),
            "steps": _passes(PASSES, len(taught), settings.prompts_per_step, settings.steps),
        }
        return self._attacked("overfitted", settings.model_copy(update=longer), taught, [], None)

    def _taught(self) -> list[Example]:
        return [canary.taught for canary in self.canaries if canary.included]

    def _ordinary(self) -> list[Example]:
        sources = {same_question(canary.source) for canary in self.canaries}
        return [row for row in self.splits.train if same_question(row.question) not in sources]

    def _attacked(
        self, name: str, settings: Training, rows: list[Example], validation: list[Example], dp: Dp | None
    ) -> Evidence:
        folder = self.folder / name
        splits = Splits(train=rows, validation=validation, test=[])
        rewarded = _train_twin(folder, self.base, self.bench, settings, splits, dp, self.owners)
        found = _readings(self.folder, self.bench, name, folder / "expert", self.canaries)
        drifts = _drifts(self.folder, self.bench, name, self.canaries, found)
        delta = dp.delta if dp else DELTA_WITHOUT_CLAIM
        return evidence(self.canaries, found, self.reference, drifts, rewarded, settings.steps > 0, delta)


def evidence(
    canaries: Sequence[Canary], found: Sequence[Reading], reference: Sequence[Reading], drifts: Sequence[float],
    rewarded: Sequence[str], rewards_matter: bool, delta: float,
) -> Evidence:  # fmt: skip
    """Put the attacks' scores beside the coins."""
    coins = [canary.included for canary in canaries]
    all_scores = attacks.scores(found, reference, drifts)
    bits = attacks.exposures(found, reference)
    hits = [sum(reading.repeated for reading in _of(found, coins, side)) for side in (True, False)]
    included = sum(coins)
    learned = sum(canary.included and note_of(canary.taught) in set(rewarded) for canary in canaries)
    return Evidence(
        attacks={name: _attack(values, coins) for name, values in all_scores.items()},
        bounds={name: one_run_bound(values, coins, delta) for name, values in all_scores.items()},
        repeated=(hits[0], included, hits[1], len(coins) - included),
        chance=excess_p(hits[0], included, hits[1], len(coins) - included),
        exposure={
            "included": attacks.summary(_of(bits, coins, True)), "others": attacks.summary(_of(bits, coins, False))
        },
        rewarded=learned / max(1, included) if rewards_matter else 1.0,
    )  # fmt: skip


def _attack(values: Sequence[float], coins: Sequence[bool]) -> dict[str, Interval | None]:
    members, others = _of(values, coins, True), _of(values, coins, False)
    shares = {f"tpr_{share:g}": hits_at(share, members, others) for share in FALSE_SHARES}
    return {"auc": ranking(members, others), **shares}


def _of(values: Sequence[Any], coins: Sequence[bool], side: bool) -> list[Any]:
    return [value for value, coin in zip(values, coins, strict=True) if coin == side]


def _bound(twin: Evidence, control: Evidence) -> Bound:
    return twin.bounds[strongest(control)]


def _plain(found: Evidence) -> dict[str, Any]:
    return dict(json.loads(dump_json(asdict(found))))


def _passes(passes: int, rows: int, batch: int, steps: int) -> int:
    """Enough steps for so many passes, and no fewer than were asked for; none stays none."""
    return max(steps, math.ceil(passes * rows / batch)) if steps else 0


def _folder(folder: Path, plan: dict[str, Any]) -> Path:
    """The audit's folder, emptied if it is of another run or number of canaries."""
    path = folder / "plan.json"
    if path.exists() and json.loads(path.read_text()) != plan:
        shutil.rmtree(folder)
    write_json(path, plan)
    return folder


def _bench(base: Base, run: Path, domain: Domain, on_progress: OnProgress) -> Bench:
    frozen, tokenizer = load_base(base.path)
    model = PeftModel.from_pretrained(frozen, str(run / "expert"), adapter_name="expert").eval()
    return Bench(model, tokenizer, get_task(domain.task), domain.training, on_progress)


def _canaries(folder: Path, bench: Bench, rows: Sequence[Example], count: int, seed: int) -> list[Canary]:
    path = folder / "canaries.json"
    if not path.exists():
        made = make_canaries(rows, bench.task, bench.sample, count, seed)
        if not {True, False} <= {canary.included for canary in made}:
            raise ConfigError(
                "AUDIT_NO_CANARIES", "no canaries: the expert gives one answer, or none, to almost every question",
                fix="raise the temperature of the domain's training, and train again",
            )  # fmt: skip
        write_json(path, [asdict(canary) for canary in made])
    return [
        Canary(**{**each, "candidates": tuple(Example(**one) for one in each["candidates"])})
        for each in json.loads(path.read_text())
    ]


def _readings(folder: Path, bench: Bench, name: str, adapter: Path, canaries: Sequence[Canary]) -> list[Reading]:
    path = folder / f"readings-{name}.json"
    bench.use(name, adapter)
    if not path.exists():
        write_json(path, [reading.as_dict() for reading in bench.read(f"ask {name}", canaries)])
    return [
        Reading(
            tuple(each["candidates"]), each["reward"], each["repeated"], tuple(tuple(one) for one in each["samples"])
        )
        for each in json.loads(path.read_text())
    ]


def _drifts(folder: Path, bench: Bench, name: str, canaries: Sequence[Canary], found: Sequence[Reading]) -> list[float]:
    """By how much more likely the twin itself finds its samples than the reference does."""
    path = folder / f"drift-{name}.json"
    if not path.exists():
        likely = {}
        for adapter in (name, "expert"):
            bench.model.set_adapter(adapter)
            likely[adapter] = attacks.drift(bench.model, bench.tokenizer, bench.task, canaries, found)
        write_json(path, [ours - theirs for ours, theirs in zip(likely[name], likely["expert"], strict=True)])
    return [float(value) for value in json.loads(path.read_text())]


def _train_twin(
    folder: Path, base: Base, bench: Bench, settings: Training, splits: Splits, dp: Dp | None,
    owners: Mapping[int, str] | None,
) -> list[str]:  # fmt: skip
    """Train as the expert was, unless it is done; returns which questions earned unequal rewards."""
    path = folder / "twin.json"
    if path.exists():
        return list(json.loads(path.read_text())["rewarded"])

    def tell(stage: str, step: int, steps: int, note: str) -> None:
        bench.on_progress(f"{folder.name} {stage}", step, steps, note)

    folder.mkdir(parents=True, exist_ok=True)
    run = new_run(folder, settings, bench.task, splits, base.path, tell)
    if dp and owners is not None:  # every canary is a person of its own
        owners = {id(row): owners.get(id(row), row.question) for row in splits.train}
    learn(run, dp, owners if dp else None)
    keep(run)
    write_json(path, {"rewarded": run.progress.rewarded})
    return run.progress.rewarded


def _counter(on_progress: OnProgress, stage: str, total: int) -> Callable[[int], None]:
    done = 0

    def count(rows: int) -> None:
        nonlocal done
        done += rows
        on_progress(stage, min(done, total), total, "")

    return count
