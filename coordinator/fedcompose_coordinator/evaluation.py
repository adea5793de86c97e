"""Measure the candidate and everything it must beat, on the same held-out prompts; write `evaluation.json`.

Input: a candidate, the admitted experts, the domains' generators. Output: accuracies, paired differences and
retention with 95 % intervals, where the router sent the tokens, and how far one expert reaches (`blast.py`). The
measuring is in `grid.py`, other ways to compose and other seeds in `comparison.py`.

Every method decodes greedily. `best_single` is chosen on the prompts it is scored on, which flatters it, not
us. The random router has no attention LoRA, like the uniform merge; `attention_only` is the attention LoRA
trained without experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcompose.composition import ATTENTION_FOLDER, COMPOSITION_FILE
from fedcompose.errors import ConfigError
from fedcompose.files import dir_hash, dump_json, folder_digests, read_json, sha256_hex
from fedcompose.intervals import Ingredients, Interval, accuracy, mean_interval, paired_difference, retention
from fedcompose_coordinator.grid import Cell, Method, finished, read_cell
from fedcompose_coordinator.questions import Domain

SCHEMA = "fedcompose/evaluation/v1"
CELLS_FOLDER = "evaluation"
TOLD = (COMPOSITION_FILE, "training.jsonl")  # what a candidate says about itself; no method acts by it
BASELINES = ("base", "uniform", "random_router", "attention_only")  # besides `composed` and the experts


@dataclass(frozen=True)
class Parts:
    """What methods are made of: the base, every site's expert, and folders of candidates."""

    base: str  # digest
    experts: Mapping[str, str]  # site → digest
    candidate: Path  # controls are asked at the same places as its router

    def method(
        self, router: str, candidate: Path | None = None, attention: Path | None = None, seed: int = 0
    ) -> Method:
        """A method with the digest of exactly the weights it needs."""
        used = {"/base": self.base}
        if router.startswith("expert:"):
            used["/expert"] = self.experts[router.removeprefix("expert:")]
        elif router != "none":
            used["/experts"] = dir_hash(dict(self.experts))
        if router == "learned":
            used["/router"] = router_digest(candidate or self.candidate)
        if router == "random":
            used["/points"] = points_digest(self.candidate)
        if attention is not None:
            used["/attention"] = dir_hash(folder_digests(attention / ATTENTION_FOLDER))
        return Method(router, dir_hash(used), candidate or self.candidate, attention, seed)

    def composed(self, candidate: Path) -> Method:
        """A candidate as it would be released."""
        attention = candidate if (candidate / ATTENTION_FOLDER).is_dir() else None
        return self.method("learned", candidate, attention)


@dataclass(frozen=True)
class Plan:
    """What is to be measured."""

    methods: Mapping[str, Method]
    domains: Sequence[Domain]
    max_new_tokens: int

    def cell(self, method: str, domain: Domain) -> Cell:
        return Cell(self.methods[method], domain, self.max_new_tokens)

    def cells(self) -> list[Cell]:
        """Every method on every domain, one method after the other."""
        return [self.cell(method, domain) for method in self.methods for domain in self.domains]


def router_digest(candidate: Path) -> str:
    """Names what a candidate decides by: its router's settings and files, whatever its training said on the way."""
    composition = read_json(candidate / COMPOSITION_FILE)
    deciding = {key: composition.get(key) for key in ("method", "router", "experts")}
    files = {
        name: digest
        for name, digest in folder_digests(candidate).items()
        if name not in TOLD and not name.startswith(f"{ATTENTION_FOLDER}/")
    }
    return dir_hash({**files, "/composition": sha256_hex(dump_json(deciding))})


def points_digest(candidate: Path) -> str:
    """Names the places where a candidate's router is asked, and the order of its experts: what random choices need."""
    composition = read_json(candidate / COMPOSITION_FILE)
    order = [expert["site"] for expert in composition["experts"]]
    return sha256_hex(dump_json([(composition["router"] or {}).get("decides"), order]))


def make_parts(candidate: Path, domains: Sequence[Domain]) -> Parts:
    """What the methods around a candidate are made of, in the order of its router's rows.

    Raises: ConfigError: `EVALUATION_NO_EXPERT` when a domain's own expert is not in the candidate.
    """
    composition = read_json(candidate / COMPOSITION_FILE)
    experts = {row["site"]: row["dirHash"] for row in composition["experts"]}
    for domain in domains:
        if domain.site not in experts:
            raise ConfigError(
                "EVALUATION_NO_EXPERT",
                f"the candidate has no expert of {domain.site!a}, but {domain.name!a} names it as its own",
                expected="one of " + ", ".join(sorted(experts)),
                fix="receive its contribution and compose again, or correct the domain's site",
            )
    return Parts(composition["base"]["dirHash"], experts, candidate)


def make_plan(
    parts: Parts, domains: Sequence[Domain], max_new_tokens: int, attention_only: Path | None = None, seed: int = 0
) -> Plan:
    """What to measure of a candidate; `attention_only` is the candidate that was trained without experts."""
    methods = {
        "composed": parts.composed(parts.candidate),
        "base": parts.method("none"),
        "uniform": parts.method("uniform"),
        "random_router": parts.method("random", seed=seed),
    }
    if attention_only is not None:
        methods["attention_only"] = parts.method("none", attention=attention_only)
    methods |= {f"expert:{site}": parts.method(f"expert:{site}") for site in parts.experts}
    return Plan(methods, domains, max_new_tokens)


def summarise(plan: Plan, folder: Path) -> dict[str, Any]:
    """The content of `evaluation.json`, from the finished cells alone.

    Raises: ConfigError: `EVALUATION_INCOMPLETE` when cells are missing.
    """
    check_complete(plan.cells(), folder)
    found = {
        method: {domain.name: read_cell(plan.cell(method, domain), folder) or {} for domain in plan.domains}
        for method in plan.methods
    }
    correct = {method: {name: cell["correct"] for name, cell in row.items()} for method, row in found.items()}
    best = best_single(correct)
    if best:
        correct["best_single"] = correct[best]
    return {
        "schema": SCHEMA,
        "settings": settings(plan.domains, plan.max_new_tokens),
        "seeds": {"random_router": plan.methods["random_router"].seed},
        "domains": [domain.describe() for domain in plan.domains],
        "digests": {name: method.digest for name, method in plan.methods.items()},
        "majority": {domain.name: domain.majority() for domain in plan.domains},
        "best_single": best.removeprefix("expert:") if best else None,
        **_accuracies(correct),
        **_differences(plan, correct),
        **_retention(plan, correct),
        "routing": _routing(plan, found["composed"]),
        "answered": {
            method: {name: _mean(cell["answered"]) for name, cell in row.items()} for method, row in found.items()
        },
        "seconds": {
            method: round(sum(cell["seconds"] for cell in row.values()), 1) for method, row in found.items()
        },
    }  # fmt: skip


def settings(domains: Sequence[Domain], max_new_tokens: int) -> dict[str, Any]:
    """How everything was measured, alike for all methods."""
    return {
        "per_domain": max((domain.count for domain in domains), default=0), "max_new_tokens": max_new_tokens,
        "decoding": "greedy", "confidence": 0.95,
    }  # fmt: skip


def check_complete(cells: Sequence[Cell], folder: Path) -> None:
    """Raises: ConfigError: `EVALUATION_INCOMPLETE` when cells are missing."""
    done = finished(cells, folder)
    if done < len(cells):
        raise ConfigError(
            "EVALUATION_INCOMPLETE",
            "not every method was measured on every domain",
            expected=f"{len(cells)} cells",
            got=f"{done} cells",
            fix="run `fedcompose coordinator evaluate` again; it continues",
        )


Correct = Mapping[str, Mapping[str, Sequence[int]]]  # method, domain -> one 0 or 1 per prompt


def best_single(correct: Correct) -> str | None:
    """The expert with the best mean over domains; the first of equals."""
    means = {
        method: _mean([_mean(vector) for vector in domains.values()])
        for method, domains in correct.items()
        if method.startswith("expert:")
    }
    return max(means, key=means.__getitem__) if means else None


def _accuracies(correct: Correct) -> dict[str, Any]:
    table = {method: {domain: accuracy(vector) for domain, vector in row.items()} for method, row in correct.items()}
    return {
        "accuracy": {method: _as_dicts(row) for method, row in table.items()},
        "accuracy_mean": {method: mean_interval(list(row.values())).as_dict() for method, row in table.items()},
    }


def _differences(plan: Plan, correct: Correct) -> dict[str, Any]:
    """Composed minus each other method, and each own expert minus the base, on the same prompts."""
    own = {domain.name: correct[f"expert:{domain.site}"][domain.name] for domain in plan.domains}
    others: dict[str, Mapping[str, Sequence[int]]] = {
        name: correct[name] for name in (*BASELINES, "best_single") if name in correct
    }
    others["own_expert"] = own
    table = {
        name: {domain: paired_difference(correct["composed"][domain], row[domain]) for domain in row}
        for name, row in others.items()
    }
    gains = {domain: paired_difference(own[domain], correct["base"][domain]) for domain in own}
    return {
        "difference": {name: _as_dicts(row) for name, row in table.items()},
        "difference_mean": {name: mean_interval(list(row.values())).as_dict() for name, row in table.items()},
        "expert_gain": _as_dicts(gains),
        "expert_gain_mean": mean_interval(list(gains.values())).as_dict(),
    }


def _retention(plan: Plan, correct: Correct) -> dict[str, Any]:
    parts = {
        domain.name: Ingredients(
            base=correct["base"][domain.name],
            expert=correct[f"expert:{domain.site}"][domain.name],
            composed=correct["composed"][domain.name],
        )
        for domain in plan.domains
    }
    per_domain, mean = retention(parts)
    return {
        "retention": {name: part.value if part else None for name, part in per_domain.items()},
        "retention_interval": {name: part.as_dict() if part else None for name, part in per_domain.items()},
        "retention_mean": mean.as_dict() if mean else None,
    }


def _routing(plan: Plan, composed: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Share of tokens that each expert got from the composed model: share[domain][layer][expert]."""
    counted = {name: cell["routed"] for name, cell in composed.items() if cell["routed"]}
    return {
        "experts": [method.removeprefix("expert:") for method in plan.methods if method.startswith("expert:")],
        "share": {name: [[round(share, 6) for share in shares(layer)] for layer in counted[name]] for name in counted},
        "tokens": {name: max(sum(layer) for layer in layers) for name, layers in counted.items()},
    }


def shares(counts: Sequence[int]) -> list[float]:
    """Counts as parts of their sum."""
    return [count / max(1, sum(counts)) for count in counts]


def _as_dicts(row: Mapping[str, Interval]) -> dict[str, dict[str, float | int]]:
    return {name: interval.as_dict() for name, interval in row.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
