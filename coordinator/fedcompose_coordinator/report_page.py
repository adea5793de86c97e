"""The page: one self-contained HTML file made from `report.json` alone, or from `comparison.json`.

No script, no outside request (a content policy forbids both), light and dark by the reader's setting,
readable on a phone and on paper. Every number in the text names the place in the JSON that it came from.
"""

from __future__ import annotations

from collections.abc import Iterable

from fedcompose_coordinator import report_results, report_sites
from fedcompose_coordinator.headline import domain_names, headline, listed
from fedcompose_coordinator.markup import Markup, h
from fedcompose_coordinator.report_comparison import comparison
from fedcompose_coordinator.report_evidence import evidence
from fedcompose_coordinator.report_parts import Report, has, number, section, written
from fedcompose_coordinator.report_style import STYLE

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
HEAD = Markup(
    '<meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta name="color-scheme" content="light dark">'
)


def page(report: Report) -> str:
    """The whole HTML document; equal reports give equal bytes."""
    parts = (
        _summary, report_results.accuracy, report_results.differences, report_results.routing, comparison,
        report_sites.training, report_sites.sizes, report_sites.provenance,
        evidence, _next_steps, _notes,
    )  # fmt: skip
    return _document("fedcompose report", _header(report), (part(report) for part in parts))


def comparison_page(found: Report) -> str:
    """The same for `comparison.json` alone."""
    domains = domain_names(found)
    header = h("header", h("p", "fedcompose comparison", class_="kicker"), h("h1", f"On {listed(domains)}"))
    return _document("fedcompose comparison", header, [comparison(found, ())])


def _document(title: str, header: Markup, sections: Iterable[Markup | None]) -> str:
    head = h("head", HEAD, h("title", title), h("style", Markup(STYLE)))
    body = h("body", header, h("main", [each for each in sections if each]))
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
    sentences = [h("p", written(report, sentence)) for sentence in headline(report)]
    if not sentences:
        return None
    numbers = (
        (("accuracy_mean", "composed", "value"), "percent", "composed model, mean accuracy"),
        (("accuracy_mean", "base", "value"), "percent", "base model"),
        (("retention_mean", "value"), "whole", "of the experts' gain kept"),
    )
    cards = [
        h("div", h("strong", number(report, path, form)), h("span", name), class_="card")
        for path, form, name in numbers
        if has(report, path)
    ]
    sites = str(len({domain["site"] for domain in report["domains"]}))
    cards.append(h("div", h("strong", sites), h("span", "sites, one expert each"), class_="card"))
    return h("section", h("div", sentences, class_="headline"), h("div", cards, class_="cards"), id="summary")


def _next_steps(report: Report) -> Markup:
    roots = report["provenance"]["federation"]["roots"] or ["KEYID"]
    trust = "".join(f" --root-fingerprint {root}" for root in roots)
    commands = (
        ("Check who made it and that no byte changed; this needs no model code:", f"verify release{trust}"),
        ("See what is inside:", "inspect release"),
        ("Answer questions on this machine, as an OpenAI-compatible server:", "serve release"),
    )
    steps = [h("li", what, h("pre", h("code", f"fedcompose {command}"))) for what, command in commands]
    return section(
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
        "Those of the candidate cover the choice of prompts, not another training run with another seed.",
        "Retention is (composed − base) / (own expert − base).",
        "What sites reported about their training is theirs; everything else the coordinator measured.",
    )
    return section("notes", "How to read this", h("ul", [h("li", line) for line in lines]))
