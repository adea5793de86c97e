"""What the numbers say, in three plain sentences that claim no more than the intervals allow.

A sentence is text and `Number`s. A number is a place in `report.json` and a way to write it, so the terminal,
`report.json` and the page cannot say different things.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedcompose_coordinator.names import IN_SENTENCE, in_sentence

Place = tuple[str | int, ...]
OPENINGS = {
    "better": "it is clearly better (95\u00a0% interval above zero) than ",
    "worse": "it is clearly worse than ",
    "undecided": "no difference could be shown to ",
}


@dataclass(frozen=True)
class Number:
    """A number of the report, by its path in `report.json`, and how to write it."""

    path: Place
    form: str = "percent"

    def value(self, report: Mapping[str, Any]) -> float:
        return float(look_up(report, self.path))

    def text(self, report: Mapping[str, Any]) -> str:
        return FORMS[self.form](self.value(report))


Sentence = Sequence[str | Number]


def headline(report: Mapping[str, Any]) -> list[Sentence]:
    """How good it is, how much it keeps, which differences are clear; fewer where numbers lack."""
    return [part for part in (_how_good(report), _how_much_kept(report), _what_is_sure(report)) if part]


def look_up(report: Mapping[str, Any], path: Place) -> Any:
    """What lies there; None where nothing does."""
    found: Any = report
    for key in path:
        at = found if isinstance(found, Mapping) else dict(enumerate(found)) if isinstance(found, list) else {}
        found = at.get(key)
    return found


def plain(report: Mapping[str, Any], sentence: Sentence) -> str:
    return "".join(part.text(report) if isinstance(part, Number) else part for part in sentence)


def ends(path: Place, form: str = "bare") -> list[str | Number]:
    """The ends of an interval; the unit is written once."""
    first = {"percent": "bare", "whole": "whole_bare"}.get(form, form)
    return [Number((*path, "low"), first), " to " if form == "points" else "–", Number((*path, "high"), form)]


def in_order(names: Iterable[str], wanted: Sequence[str]) -> list[str]:
    """The names that are wanted, in that order, then the others by the alphabet; JSON keeps no order of keys."""
    present = set(names)
    return [name for name in wanted if name in present] + sorted(present - set(wanted))


def domain_names(report: Mapping[str, Any]) -> list[str]:
    return [domain["name"] for domain in report.get("domains", [])]


def verdict(interval: Mapping[str, float]) -> str:
    """`better` or `worse` only when the whole interval is on that side of zero, else `undecided`."""
    return "better" if interval["low"] > 0 else "worse" if interval["high"] < 0 else "undecided"


def listed(names: Sequence[str]) -> str:
    """a, b and c"""
    return "".join(_comma(index, len(names)) + name for index, name in enumerate(names))


def _how_good(report: Mapping[str, Any]) -> Sentence:
    means = report.get("accuracy_mean", {})
    if "composed" not in means:
        return []
    domains = len(report["accuracy"]["composed"])
    sentence: list[str | Number] = [
        "The composed model answers ", Number(("accuracy_mean", "composed", "value")), " of ",
        Number(("accuracy_mean", "composed", "n"), "count"), " held-out prompts correctly (",
        f"mean over {domains} domains, " if domains > 1 else "", "95\u00a0% interval ",
        *ends(("accuracy_mean", "composed"), "percent"), ")",
    ]  # fmt: skip
    if "base" in means:
        sentence += ["; the base model answers ", Number(("accuracy_mean", "base", "value"))]
    if "best_single" in means:
        single = Number(("accuracy_mean", "best_single", "value"))
        sentence += [f", the best single expert ({report['best_single']}) ", single]
    return [*sentence, "."]


def _how_much_kept(report: Mapping[str, Any]) -> Sentence:
    """Retention, its weakest domain, and the domains that have none because their expert gained nothing."""
    retention = report.get("retention", {})
    kept = [name for name in in_order(retention, domain_names(report)) if retention[name] is not None]
    lost = [name for name in in_order(retention, domain_names(report)) if retention[name] is None]
    if not report.get("retention_mean"):
        return ["No expert is better than the base, so there is no gain to keep."] if lost else []
    sentence: list[str | Number] = [
        "It keeps ", Number(("retention_mean", "value"), "whole"),
        " of what the experts gained over the base on their own domains (95\u00a0% interval ",
        *ends(("retention_mean",), "whole"), ")",
    ]  # fmt: skip
    if len(kept) > 1:
        weakest = min(kept, key=retention.__getitem__)
        sentence += [", least in ", weakest, " (", Number(("retention", weakest), "whole"), ")"]
    if lost:
        sentence += [f"; {listed(lost)} left out, because the expert there is not better than the base"]
    return [*sentence, "."]


def _what_is_sure(report: Mapping[str, Any]) -> Sentence:
    names = in_order(report.get("difference_mean", {}), list(IN_SENTENCE))
    return what_is_sure(report, {name: ("difference_mean", name) for name in names})


def what_is_sure(report: Mapping[str, Any], places: Mapping[str, Place], subject: str = "it") -> Sentence:
    """Better, worse and undecided than whom, each with its difference; the interval where it decides nothing.

    `places` are those of the differences, by the name of the other method.
    """
    sentence: list[str | Number] = []
    for wanted, opening in OPENINGS.items():
        names = [name for name, path in places.items() if verdict(look_up(report, path)) == wanted]
        if not names:
            continue
        opening = opening.replace("it", subject, 1) if not sentence else opening
        sentence.append("; " + opening if sentence else opening[0].upper() + opening[1:])
        for index, name in enumerate(names):
            doubt = [", interval ", *ends(places[name], "points")] if wanted == "undecided" else []
            unit = " points" if len(sentence) == 1 else ""
            sentence += [_comma(index, len(names)) + in_sentence(name), " ("]
            sentence += [Number((*places[name], "value"), "points"), unit, *doubt, ")"]
    return [*sentence, "."] if sentence else []


def _comma(index: int, count: int) -> str:
    return "" if index == 0 else " and " if index == count - 1 else ", "


def _bytes(size: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} B"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _amount(number: float) -> str:
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number:.0f}"


def _signed(text: str) -> str:
    return text.replace("-", "−")


FORMS: Mapping[str, Callable[[float], str]] = {
    "percent": lambda value: f"{100 * value:.1f}\u00a0%",
    "bare": lambda value: f"{100 * value:.1f}",
    "whole": lambda value: _signed(f"{100 * value:.0f}\u00a0%"),
    "whole_bare": lambda value: _signed(f"{100 * value:.0f}"),
    "points": lambda value: _signed(f"{100 * value:+.1f}"),
    "count": lambda value: f"{value:.0f}",
    "decimal": lambda value: f"{value:.1f}",
    "amount": _amount,
    "bytes": _bytes,
    "seconds": _duration,
}
