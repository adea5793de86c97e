"""`fedcompose coordinator screen`: look at the experts before, or after, they are composed; quarantine what is odd."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fedcompose.composition import COMPOSITION_FILE
from fedcompose.console import AsJson, next_steps, out, print_json, print_whole, progress_bars
from fedcompose.contribution import VerifiedContribution
from fedcompose.files import read_json, write_json
from fedcompose.release import EVALUATION_FILE
from fedcompose_coordinator.commands_evaluate import Opened, open_evaluation
from fedcompose_coordinator.decisions import deciding
from fedcompose_coordinator.home import CANDIDATE
from fedcompose_coordinator.intake import replaced
from fedcompose_coordinator.screening import (
    Correct,
    Finding,
    by_absence,
    by_routing,
    by_triggers,
    by_weights,
    codes_by_site,
    summary,
)

if TYPE_CHECKING:  # torch takes seconds to import
    from fedcompose_coordinator.questions import Domain

SCREENING_FILE = "screening.json"
WITHOUT_FOLDER = "without"  # candidates that lack one site each
Home = Annotated[Path, typer.Option("--home", help="The coordinator's folder, where coordinator.toml is.")]


def screen(home: Home = Path(), as_json: AsJson = False) -> None:
    """Look for odd experts: by weights and triggers, and once a candidate was evaluated by routing and by absence.

    Sites that are found are left out of compositions from then on; `coordinator add --site` lets one in again. A clean
    result is no proof of a harmless expert: SECURITY.md says what this cannot see.

    Example: fedcompose coordinator screen --home hub
    """
    opened = open_evaluation(home)
    experts = [each for each in opened.admitted if each.kind == "adapter"]
    findings, numbers = by_weights(experts, replaced(home, opened.federation, experts))
    looked = ["weights"]
    if opened.domains and experts:
        findings += _triggers(opened, experts)
        looked.append("triggers")
    evaluation = _evaluation(opened, experts)
    if evaluation:
        findings += [*by_routing(evaluation), *_absence(opened)]
        looked += ["routing", "absence"]
    found = summary(findings, numbers, looked, experts)
    write_json(home / SCREENING_FILE, found)
    _quarantine(opened, experts, findings)
    if as_json:
        print_json(found)
        return
    _print(findings, numbers, looked, home)


def _evaluation(opened: Opened, experts: Sequence[VerifiedContribution]) -> dict[str, Any] | None:
    """What was measured of the candidate, if that was this candidate, and it is made of these experts."""
    from fedcompose_coordinator.evaluation import make_parts

    path, candidate = opened.home / EVALUATION_FILE, opened.home / CANDIDATE
    if not path.is_file() or not (candidate / COMPOSITION_FILE).is_file():
        return None
    composed = {row["dirHash"] for row in read_json(candidate / COMPOSITION_FILE)["experts"]}
    if composed != {each.dir_hash for each in experts}:
        return None
    evaluation: dict[str, Any] = read_json(path)
    digest = make_parts(candidate, opened.domains).composed(candidate).digest
    return evaluation if evaluation["digests"]["composed"] == digest else None


def _triggers(opened: Opened, experts: Sequence[VerifiedContribution]) -> list[Finding]:
    from fedcompose_coordinator.bench import ModelBench
    from fedcompose_coordinator.probes import BASE, ask_all, battery

    triggers = battery(int.from_bytes(os.urandom(4), "big"))
    bench = ModelBench({each.site: each.path for each in experts}, opened.base)
    with progress_bars() as bars:
        bar = bars.add_task("triggers", total=len(experts) + 1, note="")
        answers = ask_all(
            bench,
            [each.site for each in experts],
            opened.domains,
            triggers,
            lambda done: bars.update(bar, advance=done),
        )
    return by_triggers(answers, BASE)


def _absence(opened: Opened) -> list[Finding]:
    """The candidate against itself without each site in turn, on the domains of the others."""
    from fedcompose_coordinator.membership import read_composition

    composition = read_composition(opened.home / CANDIDATE)
    sites = [each["site"] for each in composition["experts"]]
    if len(sites) < 2 or composition["router"] is None or composition["router"]["scorer"] == "static":
        return []
    composed = _answers(opened, opened.home / CANDIDATE, opened.domains, "composed")
    without = {
        site: _answers(
            opened, _without(opened.home, site), [each for each in opened.domains if each.site != site], site
        )
        for site in sites
    }
    return by_absence({domain.name: domain.site for domain in opened.domains}, composed, without)


def _without(home: Path, site: str) -> Path:
    """The candidate with one site masked, in a folder of its own."""
    from fedcompose_coordinator.membership import mask

    folder = home / WITHOUT_FOLDER / site
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(home / CANDIDATE, folder)
    mask(folder, site)
    return folder


def _answers(opened: Opened, candidate: Path, domains: Sequence[Domain], name: str) -> Correct:
    """What a candidate answers right on each of the domains."""
    from fedcompose_coordinator.evaluation import CELLS_FOLDER, make_parts
    from fedcompose_coordinator.grid import Cell, fill, read_cell

    folder, parts = opened.home / CELLS_FOLDER, make_parts(candidate, domains)
    limit = opened.config.evaluate.max_new_tokens
    cells = {each.name: Cell(parts.composed(candidate), each, limit) for each in domains}
    with progress_bars() as bars:
        bar = bars.add_task(name if name == "composed" else f"without {name}", total=len(cells), note="")
        fill(
            list(cells.values()), folder, lambda: opened.bench([candidate]),
            on_cell=lambda done, of: bars.update(bar, completed=done, total=of),
        )  # fmt: skip
    return {domain: (read_cell(cell, folder) or {})["correct"] for domain, cell in cells.items()}


def _quarantine(opened: Opened, experts: Sequence[VerifiedContribution], findings: Sequence[Finding]) -> None:
    """Leave the sites out, and write it down."""
    from fedcompose_coordinator.membership import leave_out

    digests = {each.site: each.dir_hash for each in experts}
    for site, codes in codes_by_site(findings).items():
        now = datetime.now(UTC)
        leave_out(opened.home, site, opened.admitted, now)
        with deciding(opened.home, now) as decisions:
            decisions.record("quarantined", contribution=digests[site], reasons=codes)


def _print(findings: Sequence[Finding], numbers: Mapping[str, Any], looked: Sequence[str], home: Path) -> None:
    table = Table("site", "rms of the change", "loudest module", "in one direction", "found", box=None)
    codes = codes_by_site(findings)
    for site, each in numbers.items():
        found = ", ".join(codes.get(site, [])) or "nothing"
        table.add_row(site, f"{each.rms:.2e}", f"{each.loudest:.2f} ×", f"{each.narrow:.2f}", found)
    print_whole(table)
    for each in findings:
        about = f" ({each.other})" if each.other else ""
        out.print(f"{each.site}: {each.code} {each.value:.3g}, limit {each.limit:g}{about}", markup=False)
    out.print(f"Looked at {', '.join(looked)}; written to {home / SCREENING_FILE}", markup=False)
    if codes:
        out.print(f"Quarantined: {', '.join(codes)}", markup=False)
    next_steps(
        *(f"fedcompose coordinator add --home {home} --site {site}   (if it is harmless)" for site in codes),
        f"fedcompose coordinator compose --home {home}",
    )
