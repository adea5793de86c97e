"""Measure the candidate and everything it must beat, on the same held-out prompts; write `evaluation.json`.

Input: one loaded model that can act as each method, the domains' generators. Output: accuracies, paired
differences and retention with 95 % intervals, and where the router sent the tokens. The work is a grid of
cells, one per method and domain. A finished cell is a file with one 0 or 1 per prompt, bound to the digests
of what was measured: an interrupted run continues where it stopped, a new candidate re-measures only what
changed, and several processes share one grid.

Every method decodes greedily. `best_single` is chosen on the prompts it is scored on, which flatters it, not
us. The random router has no attention LoRA, like the uniform merge; `attention_only` is the attention LoRA
trained without experts.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedcompose.errors import ConfigError, FedcomposeError, MissingError
from fedcompose.files import dir_hash, dump_json, folder_digests, read_json, sha256_hex, write_json
from fedcompose.intervals import (
    Ingredients,
    Interval,
    accuracy,
    mean_interval,
    paired_difference,
    retention,
)
from fedcompose.tasks import Example, Task, generator_task, get_task, held_out

if TYPE_CHECKING:
    from fedcompose.bases import Base
    from fedcompose.contribution import VerifiedContribution

SCHEMA = "fedcompose/evaluation/v1"
EVALUATION_FILE = "evaluation.json"
CELLS_FOLDER = "evaluation"
BASELINES = ("base", "uniform", "random_router", "attention_only")  # besides `composed` and the experts
POLL_S = 0.5


@dataclass(frozen=True)
class Domain:
    """A field of questions: the generator that asks them and the site whose expert learned them."""

    name: str
    site: str
    generator: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is to be measured; `digests` names the exact weights behind each method."""

    domains: Sequence[Domain]
    digests: Mapping[str, str]
    per_domain: int
    max_new_tokens: int
    seed: int = 0

    def cells(self) -> list[tuple[str, Domain]]:
        """Every (method, domain), one method after the other."""
        return list(product(self.digests, self.domains))

    def fingerprint(self, method: str, domain: Domain) -> str:
        """Changes when a cell would have to be measured again."""
        measured = {
            "weights": self.digests[method], "domain": asdict(domain), "count": self.per_domain,
            "max_new_tokens": self.max_new_tokens, "seed": self.seed if method == "random_router" else None,
        }  # fmt: skip
        return sha256_hex(dump_json(measured))


class Bench(Protocol):
    """One loaded model that can act as each method in turn."""

    tokenizer: Any

    def become(self, method: str, seed: int) -> Any:
        """The model, acting as `method` from now on; counting of routed tokens starts at zero."""

    def routed(self) -> list[list[int]] | None:
        """Tokens per layer and expert since `become`; None when the method does not choose experts."""


Answers = Callable[[Any, Any, Task, Sequence[Example], int], list[str]]
OnCell = Callable[[int, int], None]


def make_plan(
    candidate: Path,
    contributions: Sequence[VerifiedContribution],
    domains: Sequence[Domain],
    base: Base,
    *,
    per_domain: int,
    max_new_tokens: int,
    attention_only: Path | None = None,
    seed: int = 0,
) -> Plan:
    """What to measure of a candidate; `attention_only` is the candidate that was trained without experts.

    Raises: ConfigError: `EVALUATION_NO_EXPERT` when a domain's own expert is not among the contributions.
    """
    experts = {each.site: each.dir_hash for each in contributions if each.kind == "adapter"}
    for domain in domains:
        if domain.site not in experts:
            raise ConfigError(
                "EVALUATION_NO_EXPERT",
                f"no expert of {domain.site!a} was admitted, but {domain.name!a} names it as its own",
                expected="one of " + ", ".join(sorted(experts)),
                fix="receive its contribution, or correct the domain's site",
            )
    merged = dir_hash({**experts, "/base": base.digest})
    digests = {
        "composed": dir_hash({"experts": merged, "candidate": dir_hash(folder_digests(candidate))}),
        "base": base.digest,
        "uniform": merged,
        "random_router": merged,
    }
    if attention_only is not None:
        digests["attention_only"] = dir_hash({**folder_digests(attention_only), "/base": base.digest})
    digests |= {f"expert:{site}": dir_hash({"base": base.digest, "expert": digest}) for site, digest in experts.items()}
    return Plan(domains, digests, per_domain, max_new_tokens, seed)


def evaluate(
    plan: Plan,
    home: Path,
    open_bench: Callable[[], Bench],
    answers: Answers,
    *,
    workers: Sequence[str] = (),
    processes: int = 1,
    on_cell: OnCell | None = None,
) -> dict[str, Any]:
    """Measure what is missing, write `home/evaluation.json` and return it.

    With more than one process, `workers` is the command that starts one of them; it calls `measure` with the
    same plan over `home/evaluation`.

    Raises: MissingError: `EVALUATION_WORKER_FAILED`.
    """
    folder = home / CELLS_FOLDER
    if processes > 1 and finished(plan, folder) < len(plan.cells()):
        measure_in_processes(plan, folder, workers, processes, on_cell)
    measure(plan, folder, open_bench, answers, on_cell)
    evaluation = summarise(plan, folder)
    write_json(home / EVALUATION_FILE, evaluation)
    return evaluation


def measure(
    plan: Plan, folder: Path, open_bench: Callable[[], Bench], answers: Answers, on_cell: OnCell | None = None
) -> None:
    """Measure every cell that nobody has measured or is measuring; opens the model only for work.

    Safe to run in several processes at once over the same folder.
    """
    bench: Bench | None = None
    total = len(plan.cells())
    for method, domain in _claim(plan, folder):
        bench = bench or open_bench()
        cell = _measure_cell(plan, bench, answers, method, domain)
        write_json(_cell_path(folder, method, domain), cell)
        if on_cell:
            on_cell(finished(plan, folder), total)


def measure_in_processes(
    plan: Plan, folder: Path, command: Sequence[str], workers: int, on_cell: OnCell | None = None
) -> None:
    """Run `command`, which must end in `measure` over the same plan and folder, `workers` times side by side.

    Raises: MissingError: `EVALUATION_WORKER_FAILED`; finished cells are kept.
    """
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    running = [subprocess.Popen(list(command), env=environment, stdout=subprocess.DEVNULL) for _ in range(workers)]
    try:
        while any(process.poll() is None for process in running) and not any(p.poll() for p in running):
            if on_cell:
                on_cell(finished(plan, folder), len(plan.cells()))
            time.sleep(POLL_S)
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
            process.wait()
    if any(process.returncode for process in running):
        raise MissingError(
            "EVALUATION_WORKER_FAILED",
            "a process that measured part of the grid stopped early",
            got="exit status " + ", ".join(str(process.returncode) for process in running),
            fix="read its message above, then run the same command again; finished cells are kept",
        )
    if on_cell:
        on_cell(finished(plan, folder), len(plan.cells()))


def finished(plan: Plan, folder: Path) -> int:
    """How many cells of the plan are done."""
    return sum(_read_cell(plan, folder, method, domain) is not None for method, domain in plan.cells())


def summarise(plan: Plan, folder: Path) -> dict[str, Any]:
    """The content of `evaluation.json`, from the finished cells alone.

    Raises: ConfigError: `EVALUATION_INCOMPLETE` when cells are missing.
    """
    cells = {(method, domain.name): _read_cell(plan, folder, method, domain) for method, domain in plan.cells()}
    found = {key: cell for key, cell in cells.items() if cell is not None}
    if len(found) < len(cells):
        raise ConfigError(
            "EVALUATION_INCOMPLETE",
            "not every method was measured on every domain",
            expected=f"{len(cells)} cells",
            got=f"{len(found)} cells",
            fix="run `fedcompose coordinator evaluate` again; it continues",
        )
    correct = {
        method: {domain.name: found[method, domain.name]["correct"] for domain in plan.domains}
        for method in plan.digests
    }
    best = _best_single(correct)
    if best:
        correct["best_single"] = correct[best]
    return {
        "schema": SCHEMA,
        "settings": {
            "per_domain": plan.per_domain, "max_new_tokens": plan.max_new_tokens, "decoding": "greedy",
            "confidence": 0.95,
        },
        "seeds": {"random_router": plan.seed},
        "domains": [_describe(domain) for domain in plan.domains],
        "digests": dict(plan.digests),
        "majority": {domain.name: _majority(plan, domain) for domain in plan.domains},
        "best_single": best.removeprefix("expert:") if best else None,
        **_accuracies(correct),
        **_differences(plan, correct),
        **_retention(plan, correct),
        "routing": _routing(plan, found),
        "answered": {
            method: {domain.name: _mean(found[method, domain.name]["answered"]) for domain in plan.domains}
            for method in plan.digests
        },
        "seconds": {
            method: round(sum(found[method, domain.name]["seconds"] for domain in plan.domains), 1)
            for method in plan.digests
        },
    }  # fmt: skip


def _claim(plan: Plan, folder: Path) -> Iterator[tuple[str, Domain]]:
    """Cells that are not done, each held by a lock on its own byte of one file while the caller works on it.

    The kernel lets go of a lock when its process ends, however it ends, so a crash never blocks a cell.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".claims").open("ab") as claims:
        for number, (method, domain) in enumerate(plan.cells()):
            try:
                fcntl.lockf(claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            except (BlockingIOError, PermissionError):
                continue
            if _read_cell(plan, folder, method, domain) is None:
                yield method, domain
            fcntl.lockf(claims, fcntl.LOCK_UN, 1, number)


def _measure_cell(plan: Plan, bench: Bench, answers: Answers, method: str, domain: Domain) -> dict[str, Any]:
    started = time.monotonic()
    task, examples = get_task(generator_task(domain.generator)), _prompts(plan, domain)
    model = bench.become(method, plan.seed)
    completions = answers(model, bench.tokenizer, task, examples, plan.max_new_tokens)
    pairs = list(zip(completions, examples, strict=True))
    return {
        "method": method,
        "domain": domain.name,
        "fingerprint": plan.fingerprint(method, domain),
        "correct": [int(task.is_correct(completion, example.answer)) for completion, example in pairs],
        "answered": [int(task.parse(completion) is not None) for completion in completions],
        "routed": bench.routed(),
        "seconds": round(time.monotonic() - started, 3),
    }


def _prompts(plan: Plan, domain: Domain) -> list[Example]:
    return held_out(domain.generator, domain.config, plan.per_domain)


def _cell_path(folder: Path, method: str, domain: Domain) -> Path:
    """`cells/<method>/<domain>.json`; a colon is not a file name everywhere."""
    return folder / "cells" / method.replace(":", "-") / f"{domain.name}.json"


def _read_cell(plan: Plan, folder: Path, method: str, domain: Domain) -> dict[str, Any] | None:
    """A finished cell, or None when it is missing, unreadable or was measured on something else."""
    path = _cell_path(folder, method, domain)
    if not path.is_file():
        return None
    try:
        cell = read_json(path)
    except FedcomposeError:
        return None
    same = isinstance(cell, dict) and cell.get("fingerprint") == plan.fingerprint(method, domain)
    return cell if same else None


Correct = Mapping[str, Mapping[str, Sequence[int]]]  # method, domain -> one 0 or 1 per prompt


def _best_single(correct: Correct) -> str | None:
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


def _routing(plan: Plan, cells: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[str, Any]:
    """Share of tokens that each expert got from the composed model: share[domain][layer][expert]."""
    counted = {domain.name: cells["composed", domain.name]["routed"] for domain in plan.domains}
    counted = {name: layers for name, layers in counted.items() if layers}
    return {
        "experts": [method.removeprefix("expert:") for method in plan.digests if method.startswith("expert:")],
        "share": {
            name: [[round(count / max(1, sum(layer)), 6) for count in layer] for layer in layers]
            for name, layers in counted.items()
        },
        "tokens": {name: max(sum(layer) for layer in layers) for name, layers in counted.items()},
    }


def _majority(plan: Plan, domain: Domain) -> float:
    """How often one would be right who always gave the commonest answer."""
    answers = Counter(example.answer for example in _prompts(plan, domain))
    return answers.most_common(1)[0][1] / answers.total()


def _describe(domain: Domain) -> dict[str, Any]:
    return {**asdict(domain), "config": dict(domain.config), "task": generator_task(domain.generator)}


def _as_dicts(row: Mapping[str, Interval]) -> dict[str, dict[str, float | int]]:
    return {name: interval.as_dict() for name, interval in row.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
