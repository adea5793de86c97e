"""Compare ways to compose over several seeds, beside the controls that each has to beat; `comparison.json`.

Input: candidates of every method and seed, in `candidates/`, and the cells of the grid. Output: one row per method,
for its domains and for prompts that mix two of them, with 95 % intervals of a paired bootstrap over prompts and seeds;
what it keeps of the experts' gain, where it sends tokens, what it costs. Every router appears twice, with an attention
LoRA and without: its own where its method trains one, else that of the first method.

The controls: the base, each single expert and the best of them, chosen on the prompts it is scored on; the uniform
merge; a random router; the oracle, which is told each prompt's domain (of a mixed prompt, that of its first
question); a classifier of prompts; the attention LoRA trained without experts. A run is one seed: in one federation
other seeds change what is composed, in a study that trains its sites anew they change the experts too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedcompose.adapter import MAX_WEIGHTS_BYTES, WEIGHTS_FILE
from fedcompose.composition import ATTENTION_FOLDER, COMPOSITION_FILE, MAX_ROUTER_BYTES, ROUTER_FILE
from fedcompose.errors import ConfigError
from fedcompose.files import read_json, read_limited
from fedcompose.intervals import Draws, Resampling, drawn_interval, drawn_ratio
from fedcompose.tensors import parse_safetensors
from fedcompose_coordinator.evaluation import (
    CELLS_FOLDER,
    Parts,
    best_single,
    check_complete,
    settings,
    shares,
)
from fedcompose_coordinator.grid import Cell, Method, read_cell
from fedcompose_coordinator.methods import DEFAULT_METHOD, METHODS
from fedcompose_coordinator.mixed import MixedQuestions
from fedcompose_coordinator.names import OFF, ON
from fedcompose_coordinator.questions import MIXED, Domain, Questions

SCHEMA = "fedcompose/comparison/v1"
CANDIDATES_FOLDER = "candidates"
ATTENTION_ONLY = "attention_only"
CLASSIFIER = "prompt"  # the method that is a control in every comparison
CONTROLS = {"random_router": "random", "uniform": "uniform", "oracle": "oracle"}
MEASURES = ("base", "oracle", "best_single")  # what every row is compared with, besides the first method


@dataclass(frozen=True)
class Wanted:
    """A candidate to compose: a method and a seed."""

    method: str
    seed: int

    @property
    def folder(self) -> str:
        return f"{CANDIDATES_FOLDER}/{self.method}-{self.seed}"

    @property
    def usage_file(self) -> str:
        """What composing it took, and from which inputs it was made."""
        return f"{self.folder}.json"

    @property
    def arguments(self) -> list[str]:
        """Of `fedcompose coordinator compose`."""
        alone = self.method == ATTENTION_ONLY
        how = ["--attention-only", "--method", DEFAULT_METHOD] if alone else ["--method", self.method]
        return [*how, "--seed", str(self.seed)]


@dataclass(frozen=True)
class Run:
    """All methods at one seed, the folder of their cells, and what composing them took."""

    seed: int
    folder: Path
    methods: Mapping[str, Method]  # the first one is what others are compared with
    usage: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def candidates(self) -> list[Path]:
        """Those that have a router or a merge."""
        found = (method.candidate for method in self.methods.values() if method.router == "learned")
        return list(dict.fromkeys(folder for folder in found if folder))

    @property
    def sites(self) -> list[str]:
        """In the order of the routers' rows."""
        return [name.removeprefix("expert:") for name in self.methods if name.startswith("expert:")]


@dataclass(frozen=True)
class Asked:
    """What every method of every run is asked."""

    domains: Sequence[Domain]
    mixed: MixedQuestions
    max_new_tokens: int

    def cell(self, method: Method, questions: Questions) -> Cell:
        """Mixed prompts have two answers and so twice the room."""
        return Cell(method, questions, self.max_new_tokens * (2 if questions is self.mixed else 1))

    @cached_property
    def sets(self) -> list[Questions]:
        """Mixed prompts only where two domains can be mixed."""
        return [*self.domains, *([self.mixed] if self.mixed.pairs else [])]

    def cells(self, runs: Sequence[Run]) -> list[Cell]:
        """Each once, also where runs share them."""
        found = [self.cell(method, each) for run in runs for method in run.methods.values() for each in self.sets]
        return list({cell.fingerprint: cell for cell in found}.values())


def candidates(names: Sequence[str], seeds: Sequence[int]) -> list[Wanted]:
    """Everything that has to be composed for a comparison of these methods.

    Raises: ConfigError: `METHOD_UNKNOWN`.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ConfigError("METHOD_UNKNOWN", f"there is no method {unknown[0]!a}", expected=", ".join(METHODS))
    wanted = [name for name in dict.fromkeys([*names, CLASSIFIER, ATTENTION_ONLY]) if name not in CONTROLS]
    return [Wanted(name, seed) for seed in seeds for name in wanted]


def make_run(home: Path, parts: Parts, names: Sequence[str], seed: int) -> Run:
    """The methods of one seed, from the candidates in `home`; the first name is the one others are compared with."""
    wanted = {each.method: each for each in candidates(names, [seed])}
    folders = {name: home / each.folder for name, each in wanted.items()}
    first = folders[next(name for name in names if name not in CONTROLS)]
    parts = replace(parts, candidate=first)
    attention = first if (first / ATTENTION_FOLDER).is_dir() else None
    methods: dict[str, Method] = {}
    for name, folder in folders.items():
        if name == ATTENTION_ONLY:
            methods[ATTENTION_ONLY] = parts.method("none", attention=folder)
            continue
        methods[name] = parts.composed(folder)
        if methods[name].attention:
            methods[name + OFF] = parts.method("learned", folder)
        elif attention and read_json(folder / COMPOSITION_FILE)["router"]:
            methods[name + ON] = parts.method("learned", folder, attention)
    for name, router in CONTROLS.items():
        methods[name] = parts.method(router, seed=seed)
        if attention:
            methods[name + ON] = parts.method(router, attention=attention, seed=seed)
    methods["base"] = parts.method("none")
    methods |= {f"expert:{site}": parts.method(f"expert:{site}") for site in parts.experts}
    files = {name: home / each.usage_file for name, each in wanted.items()}
    usage = {name: read_json(file)["usage"] for name, file in files.items() if file.is_file()}
    return Run(seed, home / CELLS_FOLDER, methods, usage)


def summarise(runs: Sequence[Run], asked: Asked) -> dict[str, Any]:
    """The content of `comparison.json`, from the finished cells alone.

    Raises: ConfigError: `EVALUATION_INCOMPLETE` when cells are missing.
    """
    for run in runs:
        check_complete(asked.cells([run]), run.folder)
    first = next(iter(runs[0].methods))
    table = Table(runs, asked, first)
    return {
        "schema": SCHEMA,
        "settings": settings(asked.domains, asked.max_new_tokens) | {"mixed": len(asked.mixed.pairs)},
        "seeds": [run.seed for run in runs],
        "first": first,
        "domains": [domain.describe() for domain in asked.domains],
        "methods": {name: table.row(name) for name in table.names()},
    }


class Table:
    """The answers of all methods and what can be said about them; every number comes from the same resampling."""

    def __init__(self, runs: Sequence[Run], asked: Asked, first: str) -> None:
        self.runs, self.asked, self.first = runs, asked, first
        self.domains = [domain.name for domain in asked.domains]
        self.cells = [measured(run, asked) for run in runs]  # of each run: name → set of questions → cell
        self.sizes = {each.name: len(each.prompts()) for each in asked.sets}
        self.total = sum(self.sizes[domain] for domain in self.domains)
        self.resampling = Resampling(self.sizes, len(runs))
        self.drawn: dict[tuple[str, str, str], Draws] = {}

    def names(self) -> list[str]:
        return list(self.cells[0])

    def draws(self, name: str, questions: str, mark: str = "correct") -> Draws:
        """The share of right answers of one method on one set of questions."""
        key = (name, questions, mark)
        if key not in self.drawn:
            answers = [cells[name][questions][mark] for cells in self.cells]
            self.drawn[key] = self.resampling.mean(questions, answers)
        return self.drawn[key]

    def mean(self, name: str) -> Draws:
        """Over domains."""
        return np.asarray(np.mean([self.draws(name, domain) for domain in self.domains], axis=0))

    def row(self, name: str) -> dict[str, Any]:
        """Everything about one method."""
        kept = {domain: self.retention(name, domain) for domain in self.domains}
        return {
            **self.accuracy(name),
            "minus": {other: self.difference(name, other) for other in MEASURES if other != name},
            "first_minus": self.difference(self.first, name) if name != self.first else None,
            "retention": {domain: interval(draws, self.sizes[domain]) for domain, draws in kept.items()},
            "retention_mean": interval(mean_of(kept.values()), self.total),
            "mixed": self.mixed(name),
            "routing": self.routing(name),
            "cost": self.cost(name),
        }

    def accuracy(self, name: str) -> dict[str, Any]:
        """Of every domain and of their mean, with what each seed gave."""
        seeds = {domain: [mean(cells[name][domain]["correct"]) for cells in self.cells] for domain in self.domains}
        means = [mean(values) for values in zip(*seeds.values(), strict=True)]
        found = {d: {**interval(self.draws(name, d), self.sizes[d]), "seeds": seeds[d]} for d in self.domains}
        return {"accuracy": found, "accuracy_mean": {**interval(self.mean(name), self.total), "seeds": means}}

    def difference(self, name: str, other: str) -> dict[str, Any]:
        """On the same prompts and seeds: of every set of questions, and of the mean over domains."""
        sets = {each: interval(self.draws(name, each) - self.draws(other, each), n) for each, n in self.sizes.items()}
        return {"mean": interval(self.mean(name) - self.mean(other), self.total), "sets": sets}

    def retention(self, name: str, domain: str) -> Draws:
        """(method − base) / (own expert − base); the oracle lets the own expert speak."""
        base = self.draws("base", domain)
        return drawn_ratio(self.draws(name, domain) - base, self.draws("oracle", domain) - base)

    def mixed(self, name: str) -> dict[str, Any] | None:
        """Both right, and each of the two by itself."""
        if MIXED not in self.sizes:
            return None
        n = self.sizes[MIXED]
        return {mark: interval(self.draws(name, MIXED, mark), n) for mark in ("correct", "first", "second")}

    def routing(self, name: str) -> dict[str, Any] | None:
        """What went to each domain's own expert, a mean over points and runs, prompts included; None where nobody
        chooses. `distinct`: experts that a point needs for a decoding step of a few rows."""
        found = [(domain, cells[name][domain.name]) for cells in self.cells for domain in self.asked.domains]
        if not all(cell["routed"] for _, cell in found):
            return None
        own: dict[str, list[float]] = {domain: [] for domain in self.domains}
        for domain, cell in found:
            own[domain.name] += [shares(point)[self.runs[0].sites.index(domain.site)] for point in cell["routed"]]
        distinct = [cell["distinct"] for _, cell in found if cell["distinct"] is not None]
        return {
            "own_share": {domain: mean(each) for domain, each in own.items()},
            "own_share_mean": mean(mean(each) for each in own.values()),
            "distinct": mean(distinct) if distinct else None,
        }

    def cost(self, name: str) -> dict[str, Any]:
        """Numbers beside base and experts, bytes of weights in memory, seconds of answering, what composing took."""
        rows = [cells[name].values() for cells in self.cells]
        usages = [run.usage[name] for run in self.runs if name in run.usage]
        return {
            "parameters": parameters(self.runs[0].methods[name]) if name in self.runs[0].methods else None,
            "held": max(cell["held"] for row in rows for cell in row),
            "answering": mean(sum(cell["seconds"] for cell in row) for row in rows),
            "composing": {key: mean(usage[key] for usage in usages) for key in usages[0]} if usages else None,
        }


def measured(run: Run, asked: Asked) -> dict[str, dict[str, dict[str, Any]]]:
    """The cells of one run; its best single expert is one more method."""
    found = {
        name: {each.name: read_cell(asked.cell(method, each), run.folder) or {} for each in asked.sets}
        for name, method in run.methods.items()
    }
    best = best_single({name: {d.name: row[d.name]["correct"] for d in asked.domains} for name, row in found.items()})
    return {**found, "best_single": found[best]} if best else found


def parameters(method: Method) -> dict[str, int]:
    """Numbers in the router and in the attention LoRA that a method uses."""
    router = method.candidate / ROUTER_FILE if method.router == "learned" and method.candidate else None
    lora = method.attention / ATTENTION_FOLDER / WEIGHTS_FILE if method.attention else None
    return {
        "router": numbers(router, MAX_ROUTER_BYTES) if router and router.is_file() else 0,
        "attention": numbers(lora, MAX_WEIGHTS_BYTES) if lora else 0,
    }


def numbers(path: Path, max_bytes: int) -> int:
    """How many numbers a file of tensors holds."""
    return sum(math.prod(tensor.shape) for tensor in parse_safetensors(read_limited(path, max_bytes)).values())


def interval(draws: Draws, n: int) -> Any:
    """As JSON; None for a value that does not exist."""
    found = drawn_interval(draws, n)
    return found.as_dict() if found else None


def mean_of(several: Iterable[Draws]) -> Draws:
    """The mean of those that have a value."""
    found = [draws for draws in several if not np.isnan(draws[0])]
    return np.asarray(np.mean(found, axis=0)) if found else np.array([np.nan])


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
