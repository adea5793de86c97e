"""The report's pictures as inline SVG: intervals, differences, curves, shares and a heat map.

They take their colours from the page's style sheet, so they follow light, dark and print. Every picture is as
wide as a phone and carries a title for those who cannot see it; every mark tells its number on hover. Shapes
repeat what colours say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedcompose_coordinator.markup import Markup, h, join

WIDTH = 312.0
LABELS = 120.0  # where the plot begins, right of the row labels
RIGHT = WIDTH - 12.0
ROW = 21.0
PALETTE = 7  # colours in the style sheet, after Okabe and Ito: told apart with any colour vision
SMOOTHING = 5  # steps averaged in the thick reward curve


@dataclass(frozen=True)
class Row:
    """One interval to draw; `mark` is `main`, `own`, `sure` or `other`."""

    label: str
    interval: Mapping[str, float]
    mark: str = "other"


def interval_chart(title: str, rows: Sequence[Row]) -> Markup:
    """Shares with their 95 % intervals, on a scale from 0 to 100 %, or as far as an interval goes."""
    height = ROW * len(rows) + 24
    quarters = max([4, *(math.ceil(4 * row.interval["high"] - 1e-9) for row in rows)])

    def x(share: float) -> float:
        return LABELS + (RIGHT - LABELS) * min(1.0, max(0.0, 4 * share / quarters))

    every = math.ceil(quarters / 5)
    ticks = [_tick(x(n / 4), height, f"{25 * n}\u00a0%") for n in range(0, quarters + 1, every)]
    marks = [_interval_row(row, x, ROW * (index + 0.5) + 2, _percent) for index, row in enumerate(rows)]
    return _figure(title, height, ticks + marks)


def difference_chart(title: str, rows: Sequence[Row]) -> Markup:
    """Differences in points around a zero line; the scale is symmetric and fits every interval."""
    height = ROW * len(rows) + 24
    reach = max([0.05, *(max(abs(row.interval["low"]), abs(row.interval["high"])) for row in rows)])
    step = next(step for step in (0.02, 0.05, 0.1, 0.2, 0.25, 0.5) if reach / step <= 4)
    reach = math.ceil(reach / step - 1e-9) * step
    middle = (LABELS + RIGHT) / 2

    def x(difference: float) -> float:
        return middle + (RIGHT - LABELS) / 2 * difference / reach

    count = round(reach / step)
    places = [step * number for number in range(-count, count + 1)]
    every = 2 if count > 2 else 1
    labels = [_points(place, 0) if round(place / step) % every == 0 else "" for place in places]
    ticks = [
        _tick(x(place), height, label, zero=abs(place) < 1e-9) for place, label in zip(places, labels, strict=True)
    ]
    marks = [_interval_row(row, x, ROW * (index + 0.5) + 2, _points) for index, row in enumerate(rows)]
    return _figure(title, height, ticks + marks)


def training_chart(title: str, rewards: Sequence[float], validation: Sequence[Sequence[float]]) -> Markup:
    """Mean reward of each step, thin and smoothed, and validation accuracy as dots; both from 0 to 1."""
    height, top, bottom, left = 150.0, 8.0, 126.0, 34.0
    last = max([1.0, float(len(rewards)), *(float(point[0]) for point in validation)])

    def at(step: float, share: float) -> tuple[float, float]:
        return left + (RIGHT - left) * step / last, bottom - (bottom - top) * share

    grid: list[Markup] = []
    for share in (0.0, 0.5, 1.0):
        _, y = at(0, share)
        grid.append(h("line", x1=left, x2=RIGHT, y1=y, y2=y, class_="grid"))
        grid.append(h("text", f"{share:g}", x=left - 6, y=y + 4, class_="tick end"))
    for step in (0, round(last / 2), round(last)):
        label = "step 0" if step == 0 else str(step)
        grid.append(h("text", label, x=at(step, 0)[0], y=height - 8, class_="tick middle"))
    raw = [at(index + 1, reward) for index, reward in enumerate(rewards)]
    smooth = [at(index + 1, _mean_around(rewards, index)) for index in range(len(rewards))]
    dots = [
        h("circle", h("title", f"step {step:g}: validation accuracy {_percent(share)}"),
          cx=at(step, share)[0], cy=at(step, share)[1], r=4.0, class_="dot main")
        for step, share in validation
    ]  # fmt: skip
    lines = [_line(raw, "curve raw"), _line(smooth, "curve")] if rewards else []
    return _figure(title, height, grid + lines + dots)


def shares_chart(title: str, rows: Sequence[tuple[str, Sequence[float]]], experts: Sequence[str]) -> Markup:
    """One bar per row, cut into the experts' shares; the percentage is written where there is room."""
    row_height = 30.0
    parts: list[Markup] = []
    for index, (label, shares) in enumerate(rows):
        y, left = row_height * index + 4, LABELS
        parts.append(h("text", _short(label), x=LABELS - 8, y=y + 15, class_="label end"))
        for expert, share in enumerate(shares):
            width = (RIGHT - LABELS) * share
            note = f"{label}: {_percent(share)} of the tokens to {experts[expert]}"
            parts.append(
                h("rect", h("title", note), x=left, y=y, width=max(width - 1, 0.0), height=22.0, rx=2.0,
                  style=f"fill:{expert_colour(expert)}")
            )  # fmt: skip
            if width > 34:
                written = h(
                    "text",
                    f"{100 * share:.0f}\u00a0%",
                    x=left + width / 2,
                    y=y + 15,
                    class_="middle",
                    style=f"fill:{text_colour(expert)}",
                )
                parts.append(written)
            left += width
    return _figure(title, row_height * len(rows) + 4, parts)


def heat_map(title: str, rows: Sequence[tuple[str, Sequence[float]]], note: str) -> Markup:
    """Shares from 0 to 1 as strength of one colour, a column per layer; `note` ends each hover text."""
    height = ROW * len(rows) + 26
    layers = max((len(shares) for _, shares in rows), default=0)
    width = (RIGHT - LABELS) / max(1, layers)
    parts: list[Markup] = []
    for index, (label, shares) in enumerate(rows):
        y = ROW * index + 3
        parts.append(h("text", _short(label), x=LABELS - 8, y=y + 13, class_="label end"))
        for layer, share in enumerate(shares):
            hover = h("title", f"{label}, layer {layer + 1}: {_percent(share)} {note}")
            parts.append(
                h("rect", hover, x=LABELS + width * layer, y=y, width=width - min(0.6, width / 8),
                  height=ROW - 3, class_="heat", style=f"fill-opacity:{0.06 + 0.94 * share:.3f}")
            )  # fmt: skip
    for layer in sorted({0, layers // 2, layers - 1} if layers > 2 else range(layers)):
        x = LABELS + width * (layer + 0.5)
        parts.append(h("text", str(layer + 1), x=x, y=height - 8, class_="tick middle"))
    parts.append(h("text", "layer", x=LABELS - 8, y=height - 8, class_="tick end"))
    return _figure(title, height, parts)


def bars(title: str, rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], written: Any) -> Markup:
    """Stacked amounts on one common scale, the total written beside each bar by `written(amount)`."""
    row_height, room = 26.0, 62.0
    largest = max([1.0, *(sum(amount for _, amount in parts) for _, parts in rows)])
    marks: list[Markup] = []
    for index, (label, parts) in enumerate(rows):
        y, left = row_height * index + 4, LABELS
        marks.append(h("text", _short(label), x=LABELS - 8, y=y + 13, class_="label end"))
        for number, (name, amount) in enumerate(parts):
            width = (RIGHT - room - LABELS) * amount / largest
            marks.append(
                h("rect", h("title", f"{label}, {name}: {written(amount)}"), x=left, y=y, width=width,
                  height=18.0, style=f"fill:{expert_colour(number)}")
            )  # fmt: skip
            left += width
        total = written(sum(amount for _, amount in parts))
        marks.append(h("text", total, x=left + 6, y=y + 13, class_="tick"))
    return _figure(title, row_height * len(rows) + 4, marks)


def legend(names: Sequence[str]) -> Markup:
    """Coloured squares with names, in the order of `expert_colour`."""
    entries = [
        h("li", h("span", class_="swatch", style=f"background:{expert_colour(index)}"), name)
        for index, name in enumerate(names)
    ]
    return h("ul", entries, class_="legend")


def scale() -> Markup:
    """What the strengths of the heat map's colour mean."""
    steps = [h("span", style=f"opacity:{0.06 + 0.94 * step / 10:.3f}") for step in range(11)]
    return h("p", "0\u00a0% ", h("span", steps, class_="scale"), " 100\u00a0%", class_="note")


def expert_colour(index: int) -> str:
    """One of seven proven colours; beyond them, hues spread by the golden angle."""
    return f"var(--e{index})" if index < PALETTE else f"hsl({index * 137.508 % 360:.0f} 45% 55%)"


def text_colour(index: int) -> str:
    """What can be read on `expert_colour`."""
    return f"var(--t{index})" if index < PALETTE else "#111"


def _interval_row(row: Row, x: Any, y: float, written: Any) -> Markup:
    value, low, high = (row.interval[name] for name in ("value", "low", "high"))
    hover = f"{row.label}: {written(value)}, 95 % interval {written(low)} to {written(high)}"
    return h(
        "g",
        h("title", hover),
        h("rect", x=0.0, y=y - ROW / 2, width=WIDTH, height=ROW, class_="hit"),
        h("text", _short(row.label), x=LABELS - 8, y=y + 4, class_=f"label end {row.mark}"),
        h("line", x1=x(low), x2=x(high), y1=y, y2=y, class_=f"whisker {row.mark}"),
        _dot(x(value), y, row.mark),
    )


def _dot(x: float, y: float, mark: str) -> Markup:
    """A large dot for the composed model, a diamond for an own expert, a dot if sure, else a ring."""
    if mark == "own":
        corners = f"{x:.2f},{y - 5.5:.2f} {x + 5.5:.2f},{y:.2f} {x:.2f},{y + 5.5:.2f} {x - 5.5:.2f},{y:.2f}"
        return h("polygon", points=corners, class_="dot own")
    return h("circle", cx=x, cy=y, r=5.0 if mark == "main" else 3.5, class_=f"dot {mark}")


def _tick(x: float, height: float, label: str, zero: bool = False) -> Markup:
    return join(
        h("line", x1=x, x2=x, y1=2.0, y2=height - 20, class_="grid zero" if zero else "grid"),
        h("text", label, x=x, y=height - 6, class_="tick middle"),
    )


def _line(points: Sequence[tuple[float, float]], name: str) -> Markup:
    return h("polyline", points=" ".join(f"{x:.2f},{y:.2f}" for x, y in points), class_=name)


def _figure(title: str, height: float, parts: list[Markup]) -> Markup:
    box = f"0 0 {WIDTH:g} {height:g}"
    return h("svg", h("title", title), parts, viewBox=box, role="img", aria_label=title)


def _mean_around(values: Sequence[float], index: int) -> float:
    near = values[max(0, index - SMOOTHING + 1) : index + 1]
    return sum(near) / len(near)


def _short(label: str, limit: int = 21) -> str:
    return label if len(label) <= limit else label[: limit - 1] + "…"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%"


def _points(difference: float, digits: int = 1) -> str:
    """Points with a real sign: +3.1, −0.4, 0."""
    text = f"{100 * difference:+.{digits}f}".replace("-", "−")
    return "0" if abs(difference) < 1e-9 and digits == 0 else text
