"""A made-up federation of three sites for the report's tests; every number in it is synthetic.

To look at the page: `python -m tests.coordinator.sample_report DIR`.
"""

from __future__ import annotations

import hashlib
import math
import random
import sys
from pathlib import Path
from typing import Any

from fedcompose.files import write_json
from fedcompose_coordinator.evaluation import Domain, Plan, summarise
from fedcompose_coordinator.report import write_report

SITES = {"clinic": "clock", "bank": "chain_sum", "archive": "logic"}
TRUE_ACCURACY = {  # of the synthetic answers, in the order of SITES
    "composed": (0.83, 0.79, 0.9), "base": (0.12, 0.27, 0.55), "uniform": (0.52, 0.5, 0.71),
    "random_router": (0.4, 0.45, 0.68), "attention_only": (0.6, 0.62, 0.74),
    "expert:clinic": (0.86, 0.3, 0.56),
    "expert:bank": (0.16, 0.82, 0.58), "expert:archive": (0.11, 0.28, 0.91),
}  # fmt: skip
LAYERS = 30


def sample_plan(per_domain: int = 200) -> Plan:
    domains = [Domain(generator, site, generator, {}) for site, generator in SITES.items()]
    digests = {method: digest(method) for method in TRUE_ACCURACY}
    return Plan(domains, digests, per_domain, max_new_tokens=48)


def write_cells(plan: Plan, folder: Path) -> None:
    """Cells as `measure` writes them, with answers drawn from one hidden difficulty per prompt."""
    for column, domain in enumerate(plan.domains):
        rng = random.Random(domain.name)
        difficulty = [rng.random() for _ in range(plan.per_domain)]
        for method, shares in TRUE_ACCURACY.items():
            noise = random.Random(method + domain.name)
            correct = [int(0.85 * hard + 0.15 * noise.random() < shares[column]) for hard in difficulty]
            cell = {
                "method": method, "domain": domain.name, "fingerprint": plan.fingerprint(method, domain),
                "correct": correct, "answered": [1] * plan.per_domain, "seconds": 12.5,
                "routed": routed(column) if method == "composed" else None,
            }  # fmt: skip
            write_json(folder / "cells" / method.replace(":", "-") / f"{domain.name}.json", cell)


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
    return write_report(evaluation, sample_training(), sample_sizes(), sample_provenance(), folder)


if __name__ == "__main__":
    write_sample(Path(sys.argv[1]))
