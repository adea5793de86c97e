"""The page: one self-contained HTML file made from `report.json` alone.

No script, no outside request (a content policy forbids both), light and dark by the reader's setting,
readable on a phone and on paper. Every number in the text names the place in `report.json` that it came from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedcompose_coordinator import figures
from fedcompose_coordinator.figures import Row
from fedcompose_coordinator.headline import (
    FORMS,
    IN_SENTENCE,
    Number,
    Place,
    Sentence,
    domain_names,
    ends,
    headline,
    in_order,
    listed,
    verdict,
)
from fedcompose_coordinator.markup import Markup, h, join
from fedcompose_coordinator.report_style import STYLE

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
HEAD = Markup(
    '<meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta name="color-scheme" content="light dark">'
)
BASELINES = ("best_single", "uniform", "random_router", "attention_only", "base")
NAMES = {
    "composed": "Composed model",
    "best_single": "Best single expert",
    "uniform": "Uniform merge",
    "random_router": "Random router",
    "attention_only": "Attention LoRA alone",
    "base": "Base model",
    "own_expert": "Own expert",
}
EXPLAINED = {
    "composed": "router and attention LoRA, one expert per token and layer",
    "best_single": "the expert with the best mean, chosen on these very prompts, which flatters it",
    "uniform": "the mean of all experts' updates, no router, no attention LoRA",
    "random_router": "a random expert for each token and layer, no attention LoRA",
    "attention_only": "the attention LoRA trained on the same data without any expert",
    "base": "the untouched base model",
}
STAGES = {"base": "Base", "warmup": "Warm-up", "rlvr": "RLVR"}
VERDICTS = {
    "better": "a clear gain",
    "worse": "a clear loss",
    "undecided": "too few prompts to call it a gain or a loss",
}
SIGNS = {"better": "▲ ", "worse": "▼ ", "undecided": ""}
MAX_HEAT = 0.5  # opacity of the colour behind 100 %, so that the figures on it stay readable
SHORT_DIGEST = 12
SIGNED = {
    "kind": "Signed what",
    "keyid": "Key",
    "dirHash": "Digest",
    "signed": "When",
    "records": "Traces",
    "licence": "Licence",
}

Report = Mapping[str, Any]


def page(report: Report) -> str:
    """The whole HTML document; equal reports give equal bytes."""
    parts = (
        _summary, _accuracy, _differences, _training, _routing, _sizes, _provenance, _next_steps, _notes,
    )  # fmt: skip
    sections = [section for section in (part(report) for part in parts) if section]
    head = h("head", HEAD, h("title", "fedcompose report"), h("style", Markup(STYLE)))
    body = h("body", _header(report), h("main", sections))
    return f"<!doctype html>\n{h('html', head, body, lang='en')}\n"


def _header(report: Report) -> Markup:
    facts = report["provenance"]
    entries = (
        ("Base", facts["base"]["name"]),
        ("Federation", facts["federation"]["id"]),
        ("Signed by", facts["release"]["signer"]),
        ("Licence", facts["release"]["licence"]),
    )
    domains = domain_names(report)
    title = f"One model for {listed(domains)}" if domains else "One model, several sites"
    shown = [h("div", h("dt", name), h("dd", value)) for name, value in entries if value]
    return h("header", h("p", "fedcompose report", class_="kicker"), h("h1", title), h("dl", shown))


def _summary(report: Report) -> Markup | None:
    sentences = [h("p", _written(report, sentence)) for sentence in headline(report)]
    if not sentences:
        return None
    numbers = (
        (("accuracy_mean", "composed", "value"), "percent", "composed model, mean accuracy"),
        (("accuracy_mean", "base", "value"), "percent", "base model"),
        (("retention_mean", "value"), "whole", "of the experts' gain kept"),
    )
    cards = [
        h("div", h("strong", _n(report, path, form)), h("span", name), class_="card")
        for path, form, name in numbers
        if _has(report, path)
    ]
    sites = str(len({domain["site"] for domain in report["domains"]}))
    cards.append(h("div", h("strong", sites), h("span", "sites, one expert each"), class_="card"))
    return h("section", h("div", sentences, class_="headline"), h("div", cards, class_="cards"), id="summary")


def _accuracy(report: Report) -> Markup | None:
    if not report.get("accuracy"):
        return None
    domains, methods = domain_names(report), _methods(report)
    counts = [
        h(
            "th",
            name,
            h("small", "n = ", _n(report, ("accuracy", methods[0], name, "n"), "count")),
            scope="col",
        )
        for name in domains
    ]
    head = h("tr", h("th", "Method", scope="col"), h("th", "Mean", scope="col"), counts)
    rows = [_accuracy_row(report, method, domains) for method in methods]
    if report.get("majority"):
        label = h("th", "Commonest answer", h("small", "what always giving it would score"), scope="row")
        cells = [h("td", _n(report, ("majority", name), "bare")) for name in domains]
        rows.append(h("tr", label, h("td", ""), cells, class_="quiet"))
    charts = [
        _card(name, figures.interval_chart(f"Accuracy on {name}", _accuracy_marks(report, methods, name)))
        for name in domains
    ]
    return _section(
        "accuracy",
        "Accuracy",
        h(
            "p",
            "Share of right answers in per cent, with the 95\u00a0% interval below it. Stronger colour is ",
            "higher; ◆ marks the expert on its own domain.",
        ),
        _table(head, rows, "matrix"),
        h("div", charts, class_="charts"),
        _note("● composed model, ◆ the domain's own expert, ○ everything else; bars are 95\u00a0% intervals."),
    )


def _accuracy_row(report: Report, method: str, domains: Sequence[str]) -> Markup:
    site = report["best_single"] if method == "best_single" else method.removeprefix("expert:")
    note = EXPLAINED.get(method, f"the LoRA of {site}, frozen")
    label = h("th", _method_name(method), h("small", f"{site}: " if method == "best_single" else "", note))
    mean = _heat_cell(report, ("accuracy_mean", method), False)
    cells = [
        _heat_cell(report, ("accuracy", method, name), method == f"expert:{_owner(report, name)}") for name in domains
    ]
    return h("tr", label, mean, cells, class_="main" if method == "composed" else None)


def _heat_cell(report: Report, path: Place, own: bool) -> Markup:
    value = Number((*path, "value"), "bare")
    return h(
        "td",
        "◆ " if own else None,
        h("b", _n(report, value.path, "bare")),
        h("small", _written(report, ends(path))),
        class_="own" if own else None,
        style=f"--heat-share:{MAX_HEAT * value.value(report):.3f}",
    )


def _accuracy_marks(report: Report, methods: Sequence[str], domain: str) -> list[Row]:
    marks = {"composed": "main", f"expert:{_owner(report, domain)}": "own"}
    return [
        Row(_method_name(method), report["accuracy"][method][domain], marks.get(method, "other")) for method in methods
    ]


def _differences(report: Report) -> Markup | None:
    table, means = report.get("difference"), report.get("difference_mean")
    if not table or not means:
        return None
    domains, others = domain_names(report), in_order(table, list(IN_SENTENCE))
    head = h(
        "tr",
        h("th", "Composed minus …", scope="col"),
        [h("th", name, scope="col") for name in ("Mean", *domains)],
    )
    rows = [
        h(
            "tr",
            h("th", _method_name(name), scope="row"),
            _difference_cell(report, ("difference_mean", name), means[name]),
            [_difference_cell(report, ("difference", name, each), table[name][each]) for each in domains],
        )
        for name in others
    ]
    marks = [
        Row(_method_name(name), means[name], "other" if verdict(means[name]) == "undecided" else "sure")
        for name in others
    ]
    chart = figures.difference_chart("Composed model minus each other, mean over domains", marks)
    return _section(
        "differences",
        "Which differences are clear",
        h(
            "p",
            "The composed model minus each other in points of accuracy, on the same prompts. ▲ and ▼: the ",
            "95\u00a0% interval leaves out zero. No mark: this many prompts cannot tell the two apart.",
        ),
        _table(head, rows, "matrix differences"),
        h("div", _card("Mean over domains, in points", chart), _retention(report), class_="charts"),
    )


def _difference_cell(report: Report, path: Place, interval: Mapping[str, float]) -> Markup:
    said = verdict(interval)
    value = h("b", _n(report, (*path, "value"), "points"))
    return h("td", SIGNS[said], value, h("small", _written(report, ends(path, "points"))), class_=said)


def _retention(report: Report) -> Markup | None:
    intervals = report.get("retention_interval", {})
    kept = [name for name in in_order(intervals, domain_names(report)) if intervals[name]]
    if not kept:
        return None
    rows = [_number_row(report, name, ("retention", name), ("retention_interval", name), "whole") for name in kept]
    chart = figures.interval_chart("Retention", [Row(name, intervals[name], "sure") for name in kept])
    return _card("Kept of the own expert's gain", _small_table(rows), chart)


def _training(report: Report) -> Markup | None:
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
    return _section(
        "training",
        "Training at the sites",
        h(
            "p",
            "What each site reported about its own training, on its own test prompts. It shipped the better "
            "of the warm-up and the RLVR adapter, chosen on validation prompts. ",
            _written(report, sentence),
        ),
        h("div", [_training_card(report, site) for site in _sites(report, report["training"])], class_="charts"),
        _note(
            "Thin line: mean reward of a step. Thick line: mean of the last 5 steps. ● validation accuracy. "
            "The filled stage was kept."
        ),
    )


def _training_card(report: Report, site: str) -> Markup:
    log = report["training"][site]
    at: Place = ("training", site)
    stages = [stage for stage in STAGES if log["accuracy"][stage]]
    rows = [
        _number_row(
            report, STAGES[stage], (*at, "accuracy", stage, "value"), (*at, "accuracy", stage), "bare",
            kept=log["kept"] == stage,
        )
        for stage in stages
    ]  # fmt: skip
    if site in report["rlvr_gain"]:
        gain = ("rlvr_gain", site)
        rows.append(_number_row(report, "RLVR added", (*gain, "value"), gain, "points"))
    marks = [
        Row(STAGES[stage], log["accuracy"][stage], "sure" if log["kept"] == stage else "other") for stage in stages
    ]
    title = f"Reward and validation of {site}"
    return h(
        "figure",
        h("figcaption", site, h("small", log["domain"])),
        _small_table(rows),
        figures.interval_chart(f"Accuracy of {site} by stage", marks) if marks else None,
        figures.training_chart(title, log["rewards"], log["validation"])
        if log["rewards"] or log["validation"]
        else None,
        _note(_n(report, (*at, "seconds"), "seconds"), " of training") if log["seconds"] is not None else None,
    )


def _routing(report: Report) -> Markup | None:
    routing = report.get("routing") or {}
    if not routing.get("share"):
        return None
    experts, share = routing["experts"], routing["share"]
    names = in_order(share, domain_names(report))
    averages = [(name, [_mean(row) for row in zip(*share[name], strict=True)]) for name in names]
    own = [
        (name, [layer[experts.index(_owner(report, name))] for layer in share[name]])
        for name in names
        if _owner(report, name) in experts
    ]
    first = _card(
        "All layers together",
        figures.shares_chart("Share of tokens by expert", averages, experts),
        figures.legend(experts),
    )
    second = _card(
        "To the domain's own expert, by layer",
        figures.heat_map("Share of tokens to the own expert", own, "of the tokens to the own expert"),
        figures.scale(),
    )
    panels = [_layers_card(name, share[name], experts) for name in names]
    return _section(
        "routing",
        "Where the router sent the tokens",
        h(
            "p",
            "Each token goes to exactly one expert in every layer; prompt and answer tokens are counted. ",
            f"Blind chance would send {100 / len(experts):.0f}\u00a0% to each expert.",
        ),
        h("div", first, second, class_="charts"),
        h("details", h("summary", "Every expert in every layer"), h("div", panels, class_="charts")),
    )


def _layers_card(name: str, layers: Sequence[Sequence[float]], experts: Sequence[str]) -> Markup:
    rows = [(expert, [layer[index] for layer in layers]) for index, expert in enumerate(experts)]
    return _card(name, figures.heat_map(f"Share of tokens by layer, {name}", rows, "of the tokens"))


def _sizes(report: Report) -> Markup | None:
    cards = [card for card in (_egress(report), _release_files(report)) if card]
    return _section("sizes", "Sizes", h("div", cards, class_="charts wide")) if cards else None


def _egress(report: Report) -> Markup | None:
    sites = report["sizes"]["sites"]
    if not sites:
        return None
    kinds, order = ("adapter", "traces", "total"), _sites(report, sites)
    names = [h("th", name, scope="col") for name in ("Site", "Adapter", "Traces", "Left the site")]
    rows = [
        h(
            "tr",
            h("th", site, scope="row"),
            [h("td", _n(report, ("sizes", "sites", site, kind), "bytes")) for kind in kinds],
        )
        for site in order
    ]
    bars = [(site, [(kind, sites[site][kind]) for kind in kinds[:2]]) for site in order]
    return _card(
        "What left each site, once",
        _table(h("tr", names), rows, "small"),
        figures.bars("Bytes that left each site", bars, FORMS["bytes"]),
        figures.legend(kinds[:2]),
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
    rows = [h("tr", h("th", name, scope="row"), h("td", _n(report, path, "bytes"))) for name, path in named]
    return _card("The release", h("table", h("tbody", rows), class_="small files"))


def _provenance(report: Report) -> Markup | None:
    facts = report["provenance"]
    rows = [*facts["contributions"], *_release_row(facts["release"])]
    if not rows:
        return None
    columns = {name: title for name, title in SIGNED.items() if any(row.get(name) not in (None, "") for row in rows)}
    table = [
        h(
            "tr",
            h("th", row["site"], h("small", row["domain"]), scope="row"),
            [_signed_cell(report, index, row, name) for name in columns],
            class_="main" if row["kind"] == "release" else None,
        )
        for index, row in enumerate(rows)
    ]
    names = [h("th", title, scope="col") for title in ("Who", *columns.values())]
    return _section(
        "provenance",
        "Who made this, from what",
        h(
            "p",
            "A signature proves that its owner said so, not how the training went. Short keys and digests "
            "show their full value on hover, and all of them are in the list below.",
        ),
        _table(h("tr", names), table, "facts"),
        _trust(facts),
        _full_digests(facts),
    )


def _release_row(release: Mapping[str, str]) -> list[dict[str, Any]]:
    """The coordinator's own signature, in the form of a contribution's row."""
    row = {**release, "site": release["signer"], "domain": "coordinator", "kind": "release", "records": None}
    return [row] if release["dirHash"] else []


def _signed_cell(report: Report, index: int, row: Mapping[str, Any], name: str) -> Markup:
    if name in ("keyid", "dirHash"):
        return h("td", _digest(row[name]))
    if name == "records":
        path: Place = ("provenance", "contributions", index, "records")
        return h("td", _n(report, path, "count") if row["records"] is not None else "")
    return h("td", row[name])


def _trust(facts: Mapping[str, Any]) -> Markup:
    base, federation = facts["base"], facts["federation"]
    version = f", version {federation['version']}" if federation["version"] else ""
    threshold = f", {federation['threshold']} must sign" if federation["threshold"] else ""
    roots = h("ul", [h("li", h("code", keyid)) for keyid in federation["roots"]], class_="plain")
    return h(
        "dl",
        h("div", h("dt", "Base"), h("dd", base["name"], " ", _digest(base["dirHash"]), " ", base["licence"])),
        h("div", h("dt", "Federation"), h("dd", federation["id"], version)),
        h("div", h("dt", "Trust roots", threshold), h("dd", roots)) if federation["roots"] else None,
    )


def _full_digests(facts: Mapping[str, Any]) -> Markup:
    """Keys and digests in full, for readers without a mouse and for paper."""
    named = [(f"{row['site']}, {row['kind']}", row) for row in facts["contributions"]]
    named.append((f"{facts['release']['signer']}, release", facts["release"]))
    named.append((facts["base"]["name"], facts["base"]))
    entries = [
        h("div", h("dt", f"{name}: {what}"), h("dd", h("code", row[key])))
        for name, row in named
        for key, what in (("keyid", "key"), ("dirHash", "digest"))
        if row.get(key)
    ]
    return h("details", h("summary", "All keys and digests in full"), h("dl", entries, class_="full"))


def _next_steps(report: Report) -> Markup:
    roots = report["provenance"]["federation"]["roots"] or ["KEYID"]
    trust = "".join(f" --root-fingerprint {root}" for root in roots)
    commands = (
        ("Check who made it and that no byte changed; this needs no model code:", f"verify release{trust}"),
        ("See what is inside:", "inspect release"),
        ("Answer questions on this machine, as an OpenAI-compatible server:", "serve release"),
    )
    steps = [h("li", what, h("pre", h("code", f"fedcompose {command}"))) for what, command in commands]
    return _section(
        "next",
        "Verify it, serve it",
        h("p", "Take the root fingerprint from somebody you trust: a page cannot vouch for itself."),
        h("ol", steps),
    )


def _notes(report: Report) -> Markup:
    settings = report.get("settings", {})
    tokens = f", at most {settings['max_new_tokens']} new tokens" if "max_new_tokens" in settings else ""
    lines = (
        "Every method answered the same held-out prompts. Sites train on the other part of a fixed split.",
        f"Decoding is {settings.get('decoding', 'greedy')}{tokens}.",
        "Intervals are at 95\u00a0%: Wilson's for an accuracy, Tango's paired score interval for a "
        "difference on the same prompts, a combination of these for a mean, a bootstrap for retention.",
        "They cover the choice of prompts, not another training run with another seed.",
        "Retention is (composed − base) / (own expert − base).",
        "What sites reported about their training is theirs; everything else the coordinator measured.",
    )
    return _section("notes", "How to read this", h("ul", [h("li", line) for line in lines]))


def _section(name: str, title: str, *parts: Markup | None) -> Markup:
    return h("section", h("h2", title), *parts, id=name)


def _card(title: str, *parts: Markup | None) -> Markup:
    return h("figure", h("figcaption", title), *parts)


def _note(*parts: str | Markup) -> Markup:
    return h("p", *parts, class_="note")


def _table(head: Markup, rows: list[Markup], name: str) -> Markup:
    """A table that scrolls sideways inside its own frame when the screen is narrow."""
    return h("div", h("table", h("thead", head), h("tbody", rows), class_=name), class_="scroll", tabindex="0")


def _small_table(rows: list[Markup]) -> Markup | None:
    return h("table", h("tbody", rows), class_="small") if rows else None


def _number_row(report: Report, label: str, value: Place, interval: Place, form: str, *, kept: bool = False) -> Markup:
    badge = h("span", "kept", class_="badge") if kept else None
    return h(
        "tr",
        h("th", label, badge, scope="row"),
        h("td", h("b", _n(report, value, "percent" if form == "bare" else form))),
        h("td", _written(report, ends(interval, form)), class_="quiet range"),
    )


def _methods(report: Report) -> list[str]:
    """Composed first, then the experts, then the baselines; nothing that was not measured."""
    found = [name.removeprefix("expert:") for name in report["accuracy"] if name.startswith("expert:")]
    experts = [f"expert:{site}" for site in _sites(report, found)]
    return [name for name in ("composed", *experts, *BASELINES) if name in report["accuracy"]]


def _method_name(method: str) -> str:
    if method.startswith("expert:"):
        return f"Expert {method.removeprefix('expert:')}"
    return NAMES.get(method, method)


def _sites(report: Report, names: Iterable[str]) -> list[str]:
    """Sites in the order of their domains."""
    return in_order(names, [domain["site"] for domain in report.get("domains", [])])


def _owner(report: Report, name: str) -> str:
    return next((str(domain["site"]) for domain in report["domains"] if domain["name"] == name), "")


def _written(report: Report, sentence: Sentence) -> Markup:
    parts = (_n(report, part.path, part.form) if isinstance(part, Number) else part for part in sentence)
    return join(*parts)


def _n(report: Report, path: Place, form: str = "percent") -> Markup:
    """A number that tells its exact value and, as a JSON pointer, its place in `report.json`."""
    number = Number(path, form)
    pointer = "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in path)
    return h("data", number.text(report), value=repr(number.value(report)), data_at=pointer)


def _has(report: Report, path: Place) -> bool:
    found: Any = report
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found is not None


def _digest(value: str) -> Markup:
    short = value[:SHORT_DIGEST] + "…" if len(value) > SHORT_DIGEST else value
    return h("code", short, title=value)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
