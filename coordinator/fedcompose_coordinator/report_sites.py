"""The report on what came from the sites and what became of it: their training, sizes, and who signed what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fedcompose_coordinator import figures
from fedcompose_coordinator.figures import Row
from fedcompose_coordinator.headline import FORMS, Number, Place, Sentence, ends, in_order, verdict
from fedcompose_coordinator.markup import Markup, h
from fedcompose_coordinator.report_parts import (
    Report,
    card,
    charts,
    digest,
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

STAGES = {"base": "Base", "warmup": "Warm-up", "rlvr": "RLVR"}
VERDICTS = {
    "better": "a clear gain",
    "worse": "a clear loss",
    "undecided": "too few prompts to call it a gain or a loss",
}
EGRESS = {"adapter": "Adapter", "traces": "Traces", "total": "Left the site"}
SIGNED = {
    "kind": "Signed what",
    "keyid": "Key",
    "dirHash": "Digest",
    "signed": "When",
    "records": "Traces",
    "licence": "Licence",
}


def training(report: Report) -> Markup | None:
    if not report["training"]:
        return None
    gain = report["rlvr_gain_mean"]
    sentence: Sentence = []
    if gain:
        sentence = [
            "On average over sites RLVR changed the accuracy after the warm-up by ",
            Number(("rlvr_gain_mean", "value"), "points"), " points (95\u00a0% interval ",
            *ends(("rlvr_gain_mean",), "points"), f"): {VERDICTS[verdict(gain)]}.",
        ]  # fmt: skip
    return section(
        "training",
        "Training at the sites",
        h(
            "p",
            "What each site reported about its own training, on its own test prompts. It shipped the better "
            "of the warm-up and the RLVR adapter, chosen on validation prompts. ",
            written(report, sentence),
        ),
        charts([_training_card(report, site) for site in _sites(report, report["training"])]),
        note(
            "Thin line: mean reward of a step. Thick line: mean of the last 5 steps. ● validation accuracy. "
            "The filled stage was kept."
        ),
    )


def sizes(report: Report) -> Markup | None:
    cards = [each for each in (_egress(report), _release_files(report)) if each]
    return section("sizes", "Sizes", charts(cards, wide=True)) if cards else None


def provenance(report: Report) -> Markup | None:
    facts = report["provenance"]
    rows = [*facts["contributions"], *_release_row(facts["release"])]
    if not rows:
        return None
    columns = {name: shown for name, shown in SIGNED.items() if any(each.get(name) not in (None, "") for each in rows)}
    signed = [
        row(
            each["site"],
            [_signed_cell(report, index, each, name) for name in columns],
            each["domain"],
            "main" if each["kind"] == "release" else None,
        )
        for index, each in enumerate(rows)
    ]
    return section(
        "provenance",
        "Who made this, from what",
        h(
            "p",
            "A signature proves that its owner said so, not how the training went. Short keys and digests "
            "show their full value on hover, and all of them are in the list below.",
        ),
        table(["Who", *columns.values()], signed, "facts"),
        _trust(facts),
        _full_digests(facts),
    )


def _training_card(report: Report, site: str) -> Markup:
    log = report["training"][site]
    stages = [stage for stage in STAGES if log["accuracy"][stage]]
    rows = [
        number_row(report, STAGES[stage], ("training", site, "accuracy", stage), "bare", kept=log["kept"] == stage)
        for stage in stages
    ]
    if site in report["rlvr_gain"]:
        rows.append(number_row(report, "RLVR added", ("rlvr_gain", site), "points"))
    marks = [
        Row(STAGES[stage], log["accuracy"][stage], "sure" if log["kept"] == stage else "other") for stage in stages
    ]
    curves = log["rewards"] or log["validation"]
    return h(
        "figure",
        h("figcaption", site, h("small", log["domain"])),
        small_table(rows),
        figures.interval_chart(f"Accuracy of {site} by stage", marks) if marks else None,
        figures.training_chart(f"Reward and validation of {site}", log["rewards"], log["validation"])
        if curves
        else None,
        note(number(report, ("training", site, "seconds"), "seconds"), " of training") if log["seconds"] else None,
    )


def _egress(report: Report) -> Markup | None:
    sites = report["sizes"]["sites"]
    if not sites:
        return None
    order = _sites(report, sites)
    rows = [
        row(site, [value_cell(report, ("sizes", "sites", site, kind), "bytes") for kind in EGRESS]) for site in order
    ]
    parts = ("adapter", "traces")
    bars = [(site, [(kind, sites[site][kind]) for kind in parts]) for site in order]
    return card(
        "What left each site, once",
        table(["Site", *EGRESS.values()], rows, "small"),
        figures.bars("Bytes that left each site", bars, FORMS["bytes"]),
        figures.legend(parts),
    )


def _release_files(report: Report) -> Markup | None:
    files = report["sizes"]["release"]
    if not files:
        return None
    named: list[tuple[str, Place]] = [("Release", ("sizes", "release_total"))]
    ordered = sorted(files, key=lambda name: (-files[name], name))
    named += [(name, ("sizes", "release", name)) for name in ordered]
    if report["sizes"]["base"]:
        named.append(("Base, not part of the release", ("sizes", "base")))
    rows = [row(name, [value_cell(report, at, "bytes")]) for name, at in named]
    return card("The release", h("table", h("tbody", rows), class_="small files"))


def _release_row(release: Mapping[str, str]) -> list[dict[str, Any]]:
    """The coordinator's own signature, in the form of a contribution's row."""
    made = {**release, "site": release["signer"], "domain": "coordinator", "kind": "release", "records": None}
    return [made] if release["dirHash"] else []


def _signed_cell(report: Report, index: int, signed: Mapping[str, Any], name: str) -> Markup:
    if name in ("keyid", "dirHash"):
        return h("td", digest(signed[name]))
    if name == "records":
        at: Place = ("provenance", "contributions", index, "records")
        return h("td", number(report, at, "count") if signed["records"] is not None else None)
    return h("td", signed[name])


def _trust(facts: Mapping[str, Any]) -> Markup:
    base, federation = facts["base"], facts["federation"]
    version = f", version {federation['version']}" if federation["version"] else ""
    threshold = f", {federation['threshold']} must sign" if federation["threshold"] else ""
    roots = h("ul", [h("li", h("code", keyid)) for keyid in federation["roots"]], class_="plain")
    return h(
        "dl",
        h("div", h("dt", "Base"), h("dd", base["name"], " ", digest(base["dirHash"]), " ", base["licence"])),
        h("div", h("dt", "Federation"), h("dd", federation["id"], version)),
        h("div", h("dt", "Trust roots", threshold), h("dd", roots)) if federation["roots"] else None,
    )


def _full_digests(facts: Mapping[str, Any]) -> Markup:
    """Keys and digests in full, for readers without a mouse and for paper."""
    named = [(f"{each['site']}, {each['kind']}", each) for each in facts["contributions"]]
    named.append((f"{facts['release']['signer']}, release", facts["release"]))
    named.append((facts["base"]["name"], facts["base"]))
    entries = [
        h("div", h("dt", f"{name}: {what}"), h("dd", h("code", each[key])))
        for name, each in named
        for key, what in (("keyid", "key"), ("dirHash", "digest"))
        if each.get(key)
    ]
    return h("details", h("summary", "All keys and digests in full"), h("dl", entries, class_="full"))


def _sites(report: Report, names: Iterable[str]) -> list[str]:
    """Sites in the order of their domains."""
    return in_order(names, [domain["site"] for domain in report.get("domains", [])])
