"""What the report's sections are built from: tables, cards, and numbers that know their place in the JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedcompose_coordinator.headline import Number, Place, Sentence, ends, look_up, verdict
from fedcompose_coordinator.markup import Child, Markup, h, join

SIGNS = {"better": "▲ ", "worse": "▼ ", "undecided": ""}
MAX_HEAT = 0.5  # opacity of the colour behind 100 %, so that the figures on it stay readable
SHORT_DIGEST = 12

Report = Mapping[str, Any]


def section(name: str, title: str, *parts: Markup | None) -> Markup:
    return h("section", h("h2", title), *parts, id=name)


def card(title: str, *parts: Markup | None) -> Markup:
    return h("figure", h("figcaption", title), *parts)


def charts(*cards: Markup | list[Markup] | None, wide: bool = False) -> Markup:
    """Cards side by side, as many as the screen has room for."""
    return h("div", *cards, class_="charts wide" if wide else "charts")


def note(*parts: Child) -> Markup:
    return h("p", *parts, class_="note")


def table(columns: Sequence[Markup | str], rows: list[Markup], kind: str) -> Markup:
    """A table that scrolls sideways inside its own frame when the screen is narrow."""
    head = h("tr", [name if isinstance(name, Markup) else column(name) for name in columns])
    return h("div", h("table", h("thead", head), h("tbody", rows), class_=kind), class_="scroll", tabindex="0")


def column(name: str, *below: Child) -> Markup:
    return h("th", name, h("small", *below) if below else None, scope="col")


def row(label: Child, cells: Iterable[Markup], below: Child = None, kind: str | None = None) -> Markup:
    """One line of a table; `below` stands small under the label."""
    return h("tr", h("th", label, h("small", below) if below else None, scope="row"), list(cells), class_=kind)


def small_table(rows: list[Markup]) -> Markup | None:
    return h("table", h("tbody", rows), class_="small") if rows else None


def number_row(report: Report, label: Child, at: Place, form: str, *, kept: bool = False) -> Markup:
    """A value with its interval behind it."""
    badge = h("span", "kept", class_="badge") if kept else None
    value = h("td", h("b", number(report, (*at, "value"), "percent" if form == "bare" else form)))
    return row(join(label, badge), [value, h("td", written(report, ends(at, form)), class_="quiet range")])


def heat_cell(report: Report, at: Place, *, form: str = "bare", own: bool = False) -> Markup:
    """A share with its interval; the stronger the colour, the higher."""
    share = min(1.0, max(0.0, Number((*at, "value")).value(report)))
    style = f"--heat-share:{MAX_HEAT * share:.3f}"
    return _interval_cell(report, at, form, "◆ " if own else None, "own" if own else None, style)


def difference_cell(report: Report, at: Place) -> Markup:
    """A difference in points with its interval, and whether its sign is certain."""
    said = verdict(look_up(report, at))
    return _interval_cell(report, at, "points", SIGNS[said], said)


def value_cell(report: Report, at: Place, form: str) -> Markup:
    """One number; an empty cell where there is none."""
    return h("td", number(report, at, form) if has(report, at) else None)


def number(report: Report, at: Place, form: str = "percent") -> Markup:
    """A number that tells its exact value and, as a JSON pointer, its place in the JSON."""
    shown = Number(at, form)
    pointer = "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in at)
    return h("data", shown.text(report), value=repr(shown.value(report)), data_at=pointer)


def written(report: Report, sentence: Sentence) -> Markup:
    parts = (number(report, part.path, part.form) if isinstance(part, Number) else part for part in sentence)
    return join(*parts)


def has(report: Report, at: Place) -> bool:
    return look_up(report, at) is not None


def digest(value: str) -> Markup:
    """Shortened; in full when hovered over."""
    return h("code", value[:SHORT_DIGEST] + "…" if len(value) > SHORT_DIGEST else value, title=value)


def _interval_cell(
    report: Report, at: Place, form: str, mark: str | None, kind: str | None, style: str | None = None
) -> Markup:
    value, limits = number(report, (*at, "value"), form), written(report, ends(at, form))
    return h("td", mark, h("b", value), h("small", limits), class_=kind, style=style)
