"""What a comparison shows, column by column, and as tables in Markdown, for a terminal and for docs/results.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedcompose_coordinator.headline import FORMS, Place, domain_names, look_up, verdict
from fedcompose_coordinator.names import compared, title
from fedcompose_coordinator.questions import MIXED

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
SIGNS = {"better": " ▲", "worse": " ▼", "undecided": ""}
COSTS: Mapping[str, tuple[Place, str]] = {
    "to the own expert": (("routing", "own_share_mean"), "percent"),
    "experts per step": (("routing", "distinct"), "decimal"),
    "router": (("cost", "parameters", "router"), "amount"),
    "attention LoRA": (("cost", "parameters", "attention"), "amount"),
    "composing": (("cost", "composing", "cpu_seconds"), "seconds"),
    "peak memory": (("cost", "composing", "peak_bytes"), "bytes"),
    "answering": (("cost", "answering"), "seconds"),
    "weights held": (("cost", "held"), "bytes"),
}

Comparison = Mapping[str, Any]


def shares(comparison: Comparison) -> dict[str, Place]:
    """Columns of accuracy, and where they lie in a method's row."""
    mixed: dict[str, Place] = {"both of two": ("mixed", "correct")} if comparison["settings"]["mixed"] else {}
    domains: dict[str, Place] = {domain: ("accuracy", domain) for domain in domain_names(comparison)}
    return {"mean": ("accuracy_mean",), **domains, **mixed}


def differences(comparison: Comparison) -> dict[str, Place]:
    """Columns of differences: each minus what it must beat, and the first minus each."""
    first = comparison["first"]
    found: dict[str, Place] = {
        "it − base": ("minus", "base", "mean"),
        "it − own expert": ("minus", "oracle", "mean"),
        "it − best single": ("minus", "best_single", "mean"),
        f"{first} − it": ("first_minus", "mean"),
    }
    if comparison["settings"]["mixed"]:
        found[f"{first} − it, both of two"] = ("first_minus", "sets", MIXED)
    return found


def markdown(comparison: Comparison) -> str:
    """What was right, what is certain, and what it costs; ▲ ▼ mark intervals that leave out zero."""
    settings, seeds = comparison["settings"], ", ".join(map(str, comparison["seeds"]))
    mixed = f", {settings['mixed']} with questions of two" if settings["mixed"] else ""
    what = (
        f"Seeds {seeds}; {settings['per_domain']} prompts of each domain{mixed}; greedy decoding. In brackets 95 % "
        "intervals of a bootstrap that is paired over prompts and seeds."
    )
    kept: dict[str, Place] = {domain: ("retention", domain) for domain in domain_names(comparison)}
    kept = {"mean": ("retention_mean",), **kept}
    return "\n\n".join([
        what,
        _table(comparison, "accuracy", shares(comparison), _share),
        _table(comparison, "kept of the own expert's gain", kept, _share),
        _table(comparison, "points", differences(comparison), _difference),
        _table(comparison, "mean of each seed", {"seeds": ("accuracy_mean", "seeds")}, _several),
        _table(comparison, "routing and cost", {name: place for name, (place, _) in COSTS.items()}, _cost),
    ]) + "\n"  # fmt: skip


def replace_tables(page: str, comparison: Comparison) -> str:
    """The page with the tables between its two marks made anew.

    Raises: ValueError: when a mark is missing.
    """
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"the page has no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n\n{markdown(comparison)}\n{END}{after}"


Shown = Callable[[Any, Place], str]


def _table(comparison: Comparison, what: str, columns: Mapping[str, Place], shown: Shown) -> str:
    rows: list[Sequence[str]] = [[what, *columns], ["---"] * (len(columns) + 1)]
    for name in compared(comparison["methods"], comparison["first"]):
        label = title(name, comparison["first"])
        values = [look_up(comparison, ("methods", name, *place)) for place in columns.values()]
        cells = [
            "–" if value is None else shown(value, place) for value, place in zip(values, columns.values(), strict=True)
        ]
        rows.append([f"**{label}**" if name == comparison["first"] else label, *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _share(found: Any, _: Place) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _difference(found: Any, _: Place) -> str:
    value, low, high = (FORMS["points"](found[end]) for end in ("value", "low", "high"))
    return f"{value} [{low}, {high}]{SIGNS[verdict(found)]}"


def _several(found: Any, _: Place) -> str:
    return " ".join(f"{value:.3f}" for value in found)


def _cost(found: Any, place: Place) -> str:
    return FORMS[next(form for at, form in COSTS.values() if at == place)](found)
