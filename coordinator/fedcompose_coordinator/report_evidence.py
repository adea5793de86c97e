"""The report on privacy: one card per site, what was guarded and what was not, and how to take a site out again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedcompose_coordinator.markup import Markup, h
from fedcompose_coordinator.report_parts import Report, card, charts, note, row, section, table

ENFORCED = {True: "yes", False: "no", None: "cannot be seen from here"}
NONE = "none"


def evidence(report: Report) -> Markup | None:
    """The privacy section, where the report was asked for it."""
    found = report.get("evidence")
    if not found:
        return None
    return section(
        "privacy",
        "What may leak, and what was done about it",
        h("p", found["statement"]),
        charts([_card(site) for site in found["sites"]], wide=True),
        table(["Guard", "Enforced"], [_guard(each) for each in found["guards"]], "facts"),
        h("h3", "Taking a site out"),
        h("ul", [_remedy(each) for each in found["removal"]]),
        h("h3", "What none of this shows"),
        h("ul", [h("li", line) for line in found["limits"]]),
        note(f"Decision ledger: {found['ledger']['entries']} entries, head {found['ledger']['head']}."),
    )


def _guard(each: Mapping[str, Any]) -> Markup:
    return row(each["guard"], [h("td", ENFORCED[each["enforced"]])])


def _remedy(each: Mapping[str, Any]) -> Markup:
    command = h("code", each["command"]) if each["command"] else None
    return h("li", h("b", each["remedy"]), f": {each['does']}. ", command)


def _card(site: Mapping[str, Any]) -> Markup:
    entries = (
        ("Differential privacy", _privacy(site["differential_privacy"])),
        ("Memorisation audit", _audit(site["audit"])),
        ("Traces", _traces(site["traces"])),
        ("Gates learned from its rows", "yes" if site["gates"] else "no"),
        ("Terms of use", _terms(site["terms"])),
        ("Numbers it reported", ", ".join(f"{name} {value:g}" for name, value in site["numbers"].items()) or NONE),
        ("Bytes held here", f"{site['bytes']:,}"),
        ("Receipts", _receipts(site["receipts"])),
    )
    shown = [h("div", h("dt", name), h("dd", value)) for name, value in entries]
    return card(f"{site['site']} ({site['domain']})", h("dl", shown))


def _privacy(stated: Mapping[str, Any] | None) -> str:
    if stated is None:
        return NONE
    return (
        f"ε {stated['epsilon']:g}, δ {stated['delta']:g} per {stated['unit']}, {stated['trust_model']}, "
        f"{stated['sampler']} sampling, accountant {stated['accountant']}; "
        f"not counted: {', '.join(stated['uncounted']) or NONE}"
    )


def _audit(stated: Mapping[str, Any] | None) -> str:
    if stated is None:
        return "none: nothing was measured"
    numbers = stated.get("numbers")
    said = f"{stated['verdict']}, on a {stated['target']}"
    if not numbers:
        return f"{said}; its owner kept the numbers, so the power is not known here"
    return (
        f"{said}; AUC {numbers['auc']:.3f} (up to {numbers['auc_high']:.3f}); the same attack on an overfitted twin "
        f"{numbers['power_auc']:.3f}; ε at least {numbers['epsilon_low']:.2f}, where {numbers['canaries']} canaries "
        f"could show {numbers['epsilon_cap']:.2f} at most"
    )


def _traces(stated: Mapping[str, Any] | None) -> str:
    if stated is None:
        return NONE
    counts = ", ".join(f"{count} of class {name}" for name, count in stated["classes"].items())
    return f"{counts}; data declared non-private" if stated["declared_non_private"] else counts


def _terms(stated: Mapping[str, Any] | None) -> str:
    if stated is None:
        return NONE
    return f"{stated['purpose']}; by {', '.join(stated['recipients'])}; until {stated['expires']}; {stated['contact']}"


def _receipts(signed: list[Mapping[str, Any]]) -> str:
    if not signed:
        return "none: it was carried by hand, or this coordinator could not sign"
    return "; ".join(
        f"{each['bytes']:,} bytes of call {each['call']}, site's ledger at {each['site_ledger']['entries']} entries, "
        f"head {each['site_ledger']['head']}" for each in signed
    )  # fmt: skip
