"""`fedcompose coordinator evaluate` and `report`: measure the candidate, compare ways to compose, show the numbers."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcompose.bases import Base
from fedcompose.console import AsJson, accuracy_table, next_steps, out, print_json, progress_bars
from fedcompose.contribution import VerifiedContribution
from fedcompose.federation import Federation
from fedcompose.files import dump_json, read_json, sha256_hex, write_json
from fedcompose.gates import GATES_FILE
from fedcompose_coordinator.config import CoordinatorConfig
from fedcompose_coordinator.home import ATTENTION_ONLY, CANDIDATE, members_of, open_home
from fedcompose_coordinator.methods import METHODS

if TYPE_CHECKING:  # torch takes seconds to import
    from fedcompose_coordinator.bench import ModelBench
    from fedcompose_coordinator.comparison import Asked, Run, Wanted
    from fedcompose_coordinator.grid import Cell, Method, OpenBench
    from fedcompose_coordinator.questions import Domain

Home = Annotated[Path, typer.Option("--home", help="The coordinator's folder, where coordinator.toml is.")]


@dataclass(frozen=True)
class Opened:
    """What both ways to evaluate need."""

    home: Path
    config: CoordinatorConfig
    federation: Federation
    base: Base
    admitted: Sequence[VerifiedContribution]
    domains: Sequence[Domain]

    def bench(self, candidates: Sequence[Path]) -> ModelBench:
        from fedcompose_coordinator.bench import open_bench

        return open_bench(candidates, self.admitted, self.base)

    def reach(self, method: Method) -> Mapping[str, int] | None:
        from fedcompose_coordinator.blast import blast_radius

        return blast_radius(method, self.bench([method.candidate] if method.candidate else []), self.domains)


def evaluate(
    home: Home = Path(),
    seeds: Annotated[int, typer.Option(min=0, help="Compare ways to compose, each composed with so many seeds.")] = 0,
    methods: Annotated[str, typer.Option(help="Which ways, separated by commas; all of them by default.")] = "",
    worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
    as_json: AsJson = False,
) -> None:
    """Measure base, experts, candidate and controls on the same held-out prompts.

    With --seeds or --methods: compose what is missing in candidates/ and compare it all in comparison.json,
    comparison.html and comparison.md. It can be interrupted and goes on when it is run again.

    Example: fedcompose coordinator evaluate
    """
    opened = open_evaluation(home)
    if seeds or methods:
        _compare(opened, max(1, seeds), methods, worker, as_json)
    else:
        _evaluate(opened, worker, as_json)


def report(
    home: Home = Path(),
    training: Annotated[
        list[Path] | None, typer.Option(help="A site's runs/DOMAIN/result.json, where its owner shares it. Repeatable.")
    ] = None,
    evidence: Annotated[
        bool, typer.Option("--evidence", help="Also a privacy card of the release: evidence.json, and on the page.")
    ] = False,
    to: Annotated[Path | None, typer.Option("--out", help="Folder for report.html and report.json.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write report.html, to look at, and report.json with the same numbers.

    Example: fedcompose coordinator report --out .
    """
    from fedcompose.release import ReceivedRelease, verify_release
    from fedcompose_coordinator.approvals import read_rule
    from fedcompose_coordinator.evidence import build_evidence
    from fedcompose_coordinator.report import describe_release, training_logs, write_report

    config, federation, base = open_home(home)
    made, members = verify_release(ReceivedRelease(home / "release")), members_of(home, federation)
    sizes, provenance = describe_release(made, members, base.path)
    folder = to or home
    measured = read_json(home / "evaluation.json")
    compared = home / "comparison.json"
    comparison = read_json(compared) if compared.is_file() else None
    found = None
    if evidence:
        rule = read_rule(home, config.approvals, config.approvers)
        found = build_evidence(home, made, members, federation, rule)
        write_json(folder / "evidence.json", found)
    written = write_report(measured, training_logs(training or []), sizes, provenance, folder, comparison, found)
    if as_json:
        print_json(written)
        return
    out.print(accuracy_table(measured["accuracy"]))
    if found is not None:
        out.print(f"Evidence {folder / 'evidence.json'}", markup=False)
    out.print(f"Report {folder / 'report.html'}", markup=False)


def open_evaluation(home: Path) -> Opened:
    """The domains are those of sites that have not been removed."""
    from fedcompose_coordinator.home import received_from
    from fedcompose_coordinator.questions import Domain

    config, federation, base = open_home(home)
    admitted = members_of(home, federation)
    removed = {each.site for each in received_from(home, federation)} - {each.site for each in admitted}
    count = config.evaluate.prompts_per_domain
    domains = [
        Domain(name, declared.site, declared.generator, declared.config, count)
        for name, declared in config.domains.items()
        if declared.site not in removed
    ]
    return Opened(home, config, federation, base, admitted, domains)


def _evaluate(opened: Opened, worker: bool, as_json: bool) -> None:
    from fedcompose.release import EVALUATION_FILE
    from fedcompose_coordinator.evaluation import CELLS_FOLDER, make_parts, make_plan, summarise
    from fedcompose_coordinator.grid import measure

    home, candidate = opened.home, opened.home / CANDIDATE
    control = home / ATTENTION_ONLY if (home / ATTENTION_ONLY).is_dir() else None
    parts = make_parts(candidate, opened.domains)
    plan = make_plan(parts, opened.domains, opened.config.evaluate.max_new_tokens, control, opened.config.compose.seed)
    bench = partial(opened.bench, [candidate])
    if worker:
        measure(plan.cells(), home / CELLS_FOLDER, bench)
        return
    _fill(opened, plan.cells(), bench)
    evaluation = summarise(plan, home / CELLS_FOLDER)
    evaluation["blast_radius"] = opened.reach(plan.methods["composed"])
    write_json(home / EVALUATION_FILE, evaluation)
    if as_json:
        print_json(evaluation)
        return
    out.print(accuracy_table(evaluation["accuracy"]))
    next_steps("fedcompose coordinator release")


def _compare(opened: Opened, seeds: int, methods: str, worker: bool, as_json: bool) -> None:
    from fedcompose_coordinator.comparison import candidates, summarise
    from fedcompose_coordinator.grid import measure
    from fedcompose_coordinator.report import write_comparison
    from fedcompose_coordinator.results import markdown

    names = methods.split(",") if methods else available(opened.admitted)
    numbers = range(opened.config.compose.seed, opened.config.compose.seed + seeds)
    if not worker:
        _compose_missing(opened, candidates(names, numbers))
    runs, asked = runs_of(opened, names, numbers)
    cells, bench = asked.cells(runs), partial(opened.bench, [each for run in runs for each in run.candidates])
    if worker:
        measure(cells, runs[0].folder, bench)
        return
    _fill(opened, cells, bench, "--seeds", str(seeds), "--methods", ",".join(names))
    comparison = summarise(runs, asked)
    comparison["blast_radius"] = opened.reach(runs[0].methods[comparison["first"]])
    write_comparison(comparison, opened.home)
    if as_json:
        print_json(comparison)
        return
    out.print(markdown(comparison), markup=False)
    out.print(f"Comparison {opened.home / 'comparison.html'}", markup=False)


def runs_of(opened: Opened, names: Sequence[str], seeds: Sequence[int]) -> tuple[list[Run], Asked]:
    """What is to be measured for a comparison, once everything is composed.

    Raises: ConfigError: `EVALUATION_NO_EXPERT`.
    """
    from fedcompose_coordinator.comparison import Asked, candidates, make_run
    from fedcompose_coordinator.evaluation import make_parts
    from fedcompose_coordinator.mixed import MixedQuestions

    wanted = opened.config.evaluate
    mixed = MixedQuestions(tuple(opened.domains), wanted.prompts_per_domain)
    parts = make_parts(opened.home / candidates(names, seeds)[0].folder, opened.domains)
    runs = [make_run(opened.home, parts, names, seed) for seed in seeds]
    return runs, Asked(opened.domains, mixed, wanted.max_new_tokens)


def _fill(opened: Opened, cells: Sequence[Cell], bench: OpenBench, *options: str) -> None:
    """Measure the missing cells, with progress on the screen; `options` make a worker measure the same ones."""
    from fedcompose_coordinator.evaluation import CELLS_FOLDER
    from fedcompose_coordinator.grid import fill, finished

    folder, home = opened.home / CELLS_FOLDER, str(opened.home)
    worker = [sys.executable, "-m", "fedcompose", "coordinator", "evaluate", "--home", home, "--worker", *options]
    with progress_bars() as bars:
        bar = bars.add_task("evaluate", total=len(cells), completed=finished(cells, folder), note="")
        fill(
            cells, folder, bench, workers=worker, processes=opened.config.evaluate.processes,
            on_cell=lambda done, of: bars.update(bar, completed=done, total=of),
        )  # fmt: skip


def available(admitted: Sequence[VerifiedContribution]) -> list[str]:
    """Every method that can run here: LoRAHub's search needs a package of its own, and one method the sites' gates."""
    gates = all(GATES_FILE in each.digests for each in admitted if each.kind == "adapter")
    missing = {*([] if find_spec("nevergrad") else ["lorahub"]), *([] if gates else ["phatgoose-sites"])}
    return [name for name in METHODS if name not in missing]


def _compose_missing(opened: Opened, wanted: Sequence[Wanted]) -> None:
    """Compose each candidate that is not there, or was made of other things, in a process of its own."""
    from fedcompose_coordinator.processes import Usage, run_all

    inputs = inputs_digest(opened)
    missing = [each for each in wanted if _inputs_of(opened.home / each.usage_file) != inputs]
    compose = [sys.executable, "-m", "fedcompose", "coordinator", "compose", "--home", str(opened.home)]
    commands = [[*compose, *each.arguments, "--out", str(opened.home / each.folder)] for each in missing]
    with progress_bars() as bars:
        bar = bars.add_task("compose", total=len(wanted), completed=len(wanted) - len(missing), note="")

        def done(number: int, usage: Usage) -> None:
            write_json(opened.home / missing[number].usage_file, {"inputs": inputs, "usage": asdict(usage)})
            bars.update(bar, advance=1, note=missing[number].method)

        run_all(commands, opened.config.evaluate.processes, on_done=done)


def inputs_digest(opened: Opened) -> str:
    """Names what candidates are made of here; the method and the seed come on top."""
    settings = opened.config.compose.model_dump(mode="json", exclude={"method", "seed"}, exclude_unset=True)
    contributions = sorted(each.dir_hash for each in opened.admitted)
    return sha256_hex(dump_json({"settings": settings, "contributions": contributions, "base": opened.base.digest}))


def _inputs_of(usage_file: Path) -> str | None:
    return str(read_json(usage_file)["inputs"]) if usage_file.is_file() else None
