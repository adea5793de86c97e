"""The report on ways to compose: every method and seed beside its controls, and a page of its own for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedcompose_coordinator.headline import Number, Place, Sentence, ends, look_up, what_is_sure
from fedcompose_coordinator.markup import Markup, h
from fedcompose_coordinator.names import compared, explained, title, variant
from fedcompose_coordinator.questions import MIXED
from fedcompose_coordinator.report_parts import (
    Report,
    difference_cell,
    heat_cell,
    note,
    row,
    section,
    table,
    value_cell,
    written,
)
from fedcompose_coordinator.report_results import reach
from fedcompose_coordinator.results import COSTS, differences, shares

SPOKEN_OF = ("base", "best_single", "oracle", "uniform", "random_router", "attention_only", "prompt", "soft")


def comparison(report: Report, at: Place = ("comparison",)) -> Markup | None:
    """`at` is where the content of `comparison.json` lies in the report."""
    found = look_up(report, at)
    if not found:
        return None
    names = compared(found["methods"], found["first"])
    sentences = [opening(report, at), certain(report, at), mixed_prompts(report, at)]
    return section(
        "comparison",
        "Ways to compose, compared",
        *(h("p", written(report, sentence)) for sentence in sentences if sentence),
        h("p", reach(report, (*at, "blast_radius"))),
        _accuracy(report, at, names),
        _differences(report, at, names),
        _costs(report, at, names),
        note(
            "Intervals are at 95\u00a0% and cover other prompts and other seeds, by a bootstrap that is paired over "
            "both; with few seeds they know little about seeds, so each seed's mean is shown. “to the own expert”: "
            "share of tokens, prompts included. “experts per step”: distinct ones that a place needs for a decoding "
            "step of eight answers of one domain. Composing is processor time; answering is wall clock for all "
            "prompts of one seed, on whatever else the machine was doing."
        ),
    )


def opening(report: Report, at: Place) -> Sentence:
    """How good the first method is, and what it keeps."""
    found = look_up(report, at)
    me: Place = (*at, "methods", found["first"])
    seeds = f"{len(found['seeds'])} seeds" if len(found["seeds"]) > 1 else "one seed"
    sentence: list[str | Number] = [
        f"Over {len(found['domains'])} domains and {seeds}, {found['first']} answers ",
        Number((*me, "accuracy_mean", "value")), " correctly (95\u00a0% interval ",
        *ends((*me, "accuracy_mean"), "percent"), ")",
    ]  # fmt: skip
    if look_up(report, (*me, "retention_mean")):
        sentence += [
            " and keeps ", Number((*me, "retention_mean", "value"), "whole"),
            " of what each domain's own expert gained (", *ends((*me, "retention_mean"), "whole"), ")",
        ]  # fmt: skip
    return [*sentence, "."]


def certain(report: Report, at: Place) -> Sentence:
    """Whom the first method clearly beats, and whom not."""
    found = look_up(report, at)
    others = [name for name in SPOKEN_OF if name in found["methods"] and name != found["first"]]
    places: dict[str, Place] = {name: (*at, "methods", name, "first_minus", "mean") for name in others}
    return what_is_sure(report, places, found["first"])


def mixed_prompts(report: Report, at: Place) -> Sentence:
    """Both questions of a mixed prompt right, against routing by prompt."""
    found = look_up(report, at)
    me: Place = (*at, "methods", found["first"], "mixed", "correct", "value")
    other: Place = (*at, "methods", "prompt")
    if look_up(report, me) is None or look_up(report, (*other, "mixed")) is None:
        return []
    gap: Place = (*other, "first_minus", "sets", MIXED)
    return [
        "Of prompts with two questions of different domains it gets both right in ", Number(me),
        "; a classifier that chooses one expert per prompt in ", Number((*other, "mixed", "correct", "value")),
        " (difference ", Number((*gap, "value"), "points"), " points, ", *ends(gap, "points"), ").",
    ]  # fmt: skip


def _accuracy(report: Report, at: Place, names: Sequence[str]) -> Markup:
    """Shares, the part of the experts' gain that was kept, and what each seed gave."""
    found = look_up(report, at)
    places, seeds = shares(found), found["seeds"]
    rows = []
    for name in names:
        me: Place = (*at, "methods", name)
        cells = [heat_cell(report, (*me, *place)) for place in places.values()]
        kept = (*me, "retention_mean")
        cells.append(heat_cell(report, kept, form="whole") if look_up(report, kept) else h("td"))
        cells += [value_cell(report, (*me, "accuracy_mean", "seeds", index), "bare") for index in range(len(seeds))]
        rows.append(_row(found, name, cells, explained(name)))
    return table(["Accuracy", *places, "gain kept", *(f"seed {seed}" for seed in seeds)], rows, "matrix")


def _differences(report: Report, at: Place, names: Sequence[str]) -> Markup:
    found = look_up(report, at)
    columns = differences(found)
    rows = [
        _row(found, name, [_difference(report, (*at, "methods", name, *place)) for place in columns.values()])
        for name in names
    ]
    return table(["In points", *columns], rows, "matrix differences")


def _costs(report: Report, at: Place, names: Sequence[str]) -> Markup:
    found = look_up(report, at)
    rows = [
        _row(found, name, [value_cell(report, (*at, "methods", name, *place), form) for place, form in COSTS.values()])
        for name in names
    ]
    return table(["Routing and cost", *COSTS], rows, "costs")


def _difference(report: Report, at: Place) -> Markup:
    """Empty where a method would be compared with itself."""
    return difference_cell(report, at) if look_up(report, at) else h("td")


def _row(found: Any, name: str, cells: Sequence[Markup], below: str = "") -> Markup:
    """A variant stands under its method."""
    changed = variant(name, found["first"])
    kind = "variant" if changed else "main" if name == found["first"] else None
    return row(changed or title(name), cells, below or None, kind)
