"""A made-up federation of three sites for the report's tests; every number in it is synthetic.

To look at the page: `python -m tests.coordinator.sample_report DIR`.
"""

from __future__ import annotations

import hashlib
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedcompose.files import write_json
from fedcompose_coordinator.comparison import Asked, Run
from fedcompose_coordinator.comparison import summarise as compare
from fedcompose_coordinator.evaluation import Plan, summarise
from fedcompose_coordinator.grid import Cell, Method
from fedcompose_coordinator.mixed import MixedQuestions
from fedcompose_coordinator.questions import MIXED, Domain
from fedcompose_coordinator.report import write_comparison, write_report

SITES = {"clinic": "clock", "bank": "chain_sum", "archive": "logic"}
TRUE_ACCURACY = {  # of the synthetic answers, in the order of SITES
    "composed": (0.83, 0.79, 0.9), "base": (0.12, 0.27, 0.55), "uniform": (0.52, 0.5, 0.71),
    "random_router": (0.4, 0.45, 0.68), "attention_only": (0.6, 0.62, 0.74),
    "expert:clinic": (0.86, 0.3, 0.56),
    "expert:bank": (0.16, 0.82, 0.58), "expert:archive": (0.11, 0.28, 0.91),
}  # fmt: skip
LAYERS = 30


def sample_plan(per_domain: int = 200) -> Plan:
    domains = [Domain(generator, site, generator, {}, per_domain) for site, generator in SITES.items()]
    return Plan({name: Method(name, digest(name)) for name in TRUE_ACCURACY}, domains, 48)


def write_cells(plan: Plan, folder: Path) -> None:
    """Cells as `measure` writes them, with answers drawn from one hidden difficulty per prompt."""
    for column, domain in enumerate(plan.domains):
        rng = random.Random(domain.name)
        difficulty = [rng.random() for _ in range(domain.count)]
        for method, shares in TRUE_ACCURACY.items():
            noise = random.Random(method + domain.name)
            correct = [int(0.85 * hard + 0.15 * noise.random() < shares[column]) for hard in difficulty]
            fingerprint = plan.cell(method, domain).fingerprint
            cell = {
                "method": method, "questions": domain.name, "fingerprint": fingerprint, "correct": correct,
                "answered": [1] * domain.count, "seconds": 12.5, "distinct": None, "held": 1,
                "routed": routed(column) if method == "composed" else None,
            }  # fmt: skip
            write_json(folder / "cells" / f"{fingerprint[:16]}.json", cell)


COMPARED = {  # of the synthetic answers: single prompts, mixed prompts, share of tokens to the own expert
    "hard": (0.8, 0.55, 0.62), "hard-off": (0.74, 0.41, 0.6), "soft": (0.79, 0.53, 0.5), "soft-off": (0.7, 0.4, 0.5),
    "prompt": (0.83, 0.2, 0.97), "prompt-on": (0.82, 0.3, 0.97), "ties": (0.55, 0.12, None),
    "attention_only": (0.6, 0.31, None), "random_router": (0.4, 0.05, 0.34), "random_router-on": (0.66, 0.2, 0.34),
    "uniform": (0.5, 0.08, None), "oracle": (0.84, 0.19, 1.0), "base": (0.25, 0.02, None),
    "expert:clinic": (0.5, 0.1, None), "expert:bank": (0.48, 0.1, None), "expert:archive": (0.47, 0.1, None),
}  # fmt: skip
SEEDS = (0, 1, 2)


def sample_asked(per_domain: int = 200) -> Asked:
    domains = tuple(Domain(generator, site, generator, {}, per_domain) for site, generator in SITES.items())
    return Asked(domains, MixedQuestions(domains, per_domain), 48)


def sample_runs(asked: Asked, folder: Path, seeds: Sequence[int] = SEEDS) -> list[Run]:
    """Runs with the cells that `measure` would have written; the base and the experts are the same in all."""
    runs = []
    for seed in seeds:
        methods = {name: Method(name, digest(f"{name} {seed}" if "expert" not in name else name)) for name in COMPARED}
        usage = {"hard": {"seconds": 130.0 + seed, "cpu_seconds": 128.0 + seed, "peak_bytes": 1.4e9}}
        runs.append(Run(seed, folder, methods, usage))
        for name, method in methods.items():
            for column, each in enumerate(asked.sets):
                write_compared(asked.cell(method, each), folder, name, column, seed)
    return runs


def write_compared(cell: Cell, folder: Path, name: str, column: int, seed: int) -> None:
    count = len(cell.questions.prompts())
    single, both, own = COMPARED[name]
    hard, noise = random.Random(cell.questions.name), random.Random(f"{name} {cell.questions.name} {seed}")
    answers = [0.8 * hard.random() + 0.2 * noise.random() for _ in range(count)]
    mixed = cell.questions.name == MIXED
    correct = [int(answer < (both if mixed else single)) for answer in answers]
    parts = {"first": [1] * count, "second": correct} if mixed else {}
    others = None if own is None else [round(1000 * (own if i == column else (1 - own) / 2)) for i in range(len(SITES))]
    write_json(folder / "cells" / f"{cell.fingerprint[:16]}.json", {
        "method": name, "questions": cell.questions.name, "fingerprint": cell.fingerprint, "correct": correct, **parts,
        "answered": [1] * count, "seconds": 20.5 + column, "held": 270_000_000, "routed": others and [others] * LAYERS,
        "distinct": None if own is None else 1 + 2 * (1 - own),
    })  # fmt: skip


def sample_comparison(folder: Path, per_domain: int = 200) -> dict[str, Any]:
    asked = sample_asked(per_domain)
    found = compare(sample_runs(asked, folder), asked)
    counts = {"sequences": 12, "never_asked": 5, "same_without": 5, "tokens": 480, "same_tokens": 480}
    return {**found, "blast_radius": counts}


def routed(column: int) -> list[list[int]]:
    layers = []
    for layer in range(LAYERS):
        own = 0.55 + 0.4 * math.sin(layer / 7 + column) ** 2
        rest = (1 - own) / (len(SITES) - 1)
        layers.append([round(20_000 * (own if index == column else rest)) for index in range(len(SITES))])
    return layers


def sample_training() -> dict[str, Any]:
    logs = {}
    for number, (site, domain) in enumerate(SITES.items()):
        rng = random.Random(site)
        rewards = [min(1, 0.45 + 0.4 * (1 - math.exp(-step / 25)) + rng.gauss(0, 0.05)) for step in range(80)]
        logs[site] = {
            "domain": domain, "rewards": rewards, "seconds": 214.0 + 31 * number,
            "validation": [[step, 0.5 + 0.33 * (1 - math.exp(-step / 30))] for step in range(0, 81, 20)],
            "accuracy": {
                "base": share(24 + 20 * number), "warmup": share(130 + 4 * number),
                "rlvr": share(163 - 9 * number),
            },
            "kept": "warmup" if site == "archive" else "rlvr",
        }  # fmt: skip
    return logs


def share(right: int, n: int = 200) -> dict[str, float | int]:
    from fedcompose.intervals import wilson

    return wilson(right, n).as_dict()


def sample_sizes() -> dict[str, Any]:
    return {
        "sites": {
            site: {"adapter": 12_189_344 + 900 * number, "traces": 310_000 + 7000 * number}
            for number, site in enumerate(SITES)
        },
        "release": {
            "router.safetensors": 7_000, "attention/adapter_model.safetensors": 7_400_000, "model.sig": 4_000,
            **{f"ingredients/{site}/adapter_model.safetensors": 12_185_600 for site in SITES},
        },
        "base": 538_000_000,
    }  # fmt: skip


def sample_provenance() -> dict[str, Any]:
    rows = [
        {"site": site, "domain": domain, "kind": kind, "keyid": digest(site), "dirHash": digest(site + kind),
         "signed": "2026-01-15T09:12:00Z", "records": 600 if kind == "traces" else None, "licence": "Apache-2.0"}
        for site, domain in SITES.items() for kind in ("adapter", "traces")
    ]  # fmt: skip
    return {
        "federation": {"id": "urn:uuid:00000000-0000-4000-8000-000000000000", "version": 1, "threshold": 1,
                       "roots": [digest("root")]},
        "base": {"name": "smollm2-135m", "dirHash": digest("base"), "licence": "Apache-2.0"},
        "release": {"signer": "hub", "keyid": digest("hub"), "dirHash": digest("release"),
                    "signed": "2026-01-15T09:31:00Z", "licence": "Apache-2.0"},
        "contributions": rows,
    }  # fmt: skip


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_sample(folder: Path) -> dict[str, Any]:
    plan = sample_plan()
    write_cells(plan, folder / "evaluation")
    evaluation = summarise(plan, folder / "evaluation")
    evaluation["blast_radius"] = {
        "sequences": 12,
        "never_asked": 0,
        "same_without": 0,
        "tokens": 480,
        "same_tokens": 478,
    }
    comparison = sample_comparison(folder / "evaluation")
    write_comparison(comparison, folder)
    return write_report(evaluation, sample_training(), sample_sizes(), sample_provenance(), folder, comparison)


if __name__ == "__main__":
    write_sample(Path(sys.argv[1]))
