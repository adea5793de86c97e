"""The report on the candidate, as the coordinator measured it: accuracy, differences, routing, reach of an expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from fedcompose_coordinator import figures
from fedcompose_coordinator.figures import Row
from fedcompose_coordinator.headline import Number, Place, Sentence, domain_names, in_order, look_up, verdict
from fedcompose_coordinator.markup import Markup, h
from fedcompose_coordinator.names import CONTROLS, IN_SENTENCE, explained, title
from fedcompose_coordinator.report_parts import (
    Report,
    card,
    charts,
    column,
    difference_cell,
    heat_cell,
    note,
    number,
    number_row,
    row,
    section,
    small_table,
    table,
    value_cell,
    written,
)


def accuracy(report: Report) -> Markup | None:
    if not report.get("accuracy"):
        return None
    domains, methods = domain_names(report), _methods(report)
    counts = [column(name, "n = ", number(report, ("accuracy", methods[0], name, "n"), "count")) for name in domains]
    rows = [_accuracy_row(report, method, domains) for method in methods]
    if report.get("majority"):
        always = [value_cell(report, ("majority", name), "bare") for name in domains]
        rows.append(row("Commonest answer", [h("td"), *always], "what always giving it would score", "quiet"))
    cards = [
        card(name, figures.interval_chart(f"Accuracy on {name}", _accuracy_marks(report, methods, name)))
        for name in domains
    ]
    return section(
        "accuracy",
        "Accuracy",
        h(
            "p",
            "Share of right answers in per cent, with the 95\u00a0% interval below it. Stronger colour is ",
            "higher; ◆ marks the expert on its own domain.",
        ),
        table(["Method", "Mean", *counts], rows, "matrix"),
        charts(cards),
        note("● composed model, ◆ the domain's own expert, ○ everything else; bars are 95\u00a0% intervals."),
    )


def differences(report: Report) -> Markup | None:
    means = report.get("difference_mean")
    if not report.get("difference") or not means:
        return None
    domains, others = domain_names(report), in_order(means, list(IN_SENTENCE))
    rows = [
        row(
            title(name),
            [
                difference_cell(report, ("difference_mean", name)),
                *(difference_cell(report, ("difference", name, domain)) for domain in domains),
            ],
        )
        for name in others
    ]
    marks = [Row(title(name), means[name], sureness(means[name])) for name in others]
    return section(
        "differences",
        "Which differences are clear",
        h(
            "p",
            "The composed model minus each other in points of accuracy, on the same prompts. ▲ and ▼: the ",
            "95\u00a0% interval leaves out zero. No mark: this many prompts cannot tell the two apart.",
        ),
        table(["Composed minus …", "Mean", *domains], rows, "matrix differences"),
        charts(
            card(
                "Mean over domains, in points",
                figures.difference_chart("Composed model minus each other, mean over domains", marks),
            ),
            _retention(report),
        ),
    )


def routing(report: Report) -> Markup | None:
    where = report.get("routing") or {}
    if not where.get("share"):
        return None
    experts, share = where["experts"], where["share"]
    names = in_order(share, domain_names(report))
    averages = [(name, [mean(layer) for layer in zip(*share[name], strict=True)]) for name in names]
    own = [
        (name, [layer[experts.index(_owner(report, name))] for layer in share[name]])
        for name in names
        if _owner(report, name) in experts
    ]
    return section(
        "routing",
        "Where the router sent the tokens",
        h(
            "p",
            "Counted is the expert with the most weight, for every token of prompts and answers, in every layer. ",
            f"Blind chance would send {100 / len(experts):.0f}\u00a0% to each expert. ",
            reach(report, ("blast_radius",)),
        ),
        charts(
            card(
                "All layers together",
                figures.shares_chart("Share of tokens by expert", averages, experts),
                figures.legend(experts),
            ),
            card(
                "To the domain's own expert, by layer",
                figures.heat_map("Share of tokens to the own expert", own, "of the tokens to the own expert"),
                figures.scale(),
            ),
        ),
        h(
            "details",
            h("summary", "Every expert in every layer"),
            charts([_layers_card(name, share[name], experts) for name in names]),
        ),
    )


def reach(report: Report, at: Place) -> Markup | None:
    """What experts that were never asked, and the other prompts of a batch, have to do with an answer."""
    if not look_up(report, at):
        return None
    sequences, apart, same, tokens, alike = (
        Number((*at, name), "count") for name in ("sequences", "never_asked", "same_without", "tokens", "same_tokens")
    )
    deleted: Sentence = ["every expert had a part in each of them."]
    if apart.value(report):
        deleted = [
            apart, " times an expert had no part in one, and without that expert every logit stayed the same, bit for "
            "bit, in ", same, " of them.",
        ]  # fmt: skip
    return written(report, [
        "Reach of an expert, tried on ", sequences, " sequences: ", *deleted, " Beside other prompts, ", alike, " of ",
        tokens, " next tokens are the same as alone.",
    ])  # fmt: skip


def sureness(interval: Mapping[str, float]) -> str:
    """How a difference is drawn."""
    return "other" if verdict(interval) == "undecided" else "sure"


def _accuracy_row(report: Report, method: str, domains: Sequence[str]) -> Markup:
    below = explained(method)
    if method == "best_single":
        below = f"{report['best_single']}: {below}"
    own = [name for name in domains if method == f"expert:{_owner(report, name)}"]
    cells = [heat_cell(report, ("accuracy", method, name), own=name in own) for name in domains]
    mean_cell = heat_cell(report, ("accuracy_mean", method))
    return row(title(method), [mean_cell, *cells], below, "main" if method == "composed" else None)


def _accuracy_marks(report: Report, methods: Sequence[str], domain: str) -> list[Row]:
    marks = {"composed": "main", f"expert:{_owner(report, domain)}": "own"}
    return [Row(title(name), report["accuracy"][name][domain], marks.get(name, "other")) for name in methods]


def _retention(report: Report) -> Markup | None:
    intervals = report.get("retention_interval", {})
    kept = [name for name in in_order(intervals, domain_names(report)) if intervals[name]]
    if not kept:
        return None
    rows = [number_row(report, name, ("retention_interval", name), "whole") for name in kept]
    chart = figures.interval_chart("Retention", [Row(name, intervals[name], "sure") for name in kept])
    return card("Kept of the own expert's gain", small_table(rows), chart)


def _layers_card(name: str, layers: Sequence[Sequence[float]], experts: Sequence[str]) -> Markup:
    rows = [(expert, [layer[index] for layer in layers]) for index, expert in enumerate(experts)]
    return card(name, figures.heat_map(f"Share of tokens by layer, {name}", rows, "of the tokens"))


def _methods(report: Report) -> list[str]:
    """Composed first, then the experts in the order of their domains, then the controls that were measured."""
    found = [name for name in report["accuracy"] if name.startswith("expert:")]
    experts = in_order(found, [f"expert:{domain['site']}" for domain in report.get("domains", [])])
    return [name for name in ("composed", *experts, *CONTROLS) if name in report["accuracy"]]


def _owner(report: Report, name: str) -> str:
    return next((str(domain["site"]) for domain in report["domains"] if domain["name"] == name), "")
