"""Build HTML and SVG from nested calls, in which text is escaped because it cannot be otherwise.

`h("td", "a < b", class_="own")` is markup; a plain string among the children is text. Only `Markup` passes
unescaped, and only this module and literal strings make `Markup`. Characters that could hide or reorder text
are made visible.
"""

from __future__ import annotations

import html
import unicodedata

UNSEEN = {
    "Cc",
    "Cf",
    "Cs",
    "Co",
    "Cn",
    "Zl",
    "Zp",
}  # controls, bidirectional overrides, zero width, line separators


class Markup(str):
    """A piece of HTML or SVG that may be shown as it is."""

    __slots__ = ()


Child = str | Markup | None


def h(name: str, *children: Child | list[Markup], **attributes: object) -> Markup:
    """One element; `class_` becomes `class`, `data_at` becomes `data-at`, None leaves an attribute out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_attribute(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: Child | list[Markup]) -> Markup:
    """Children one after the other; text is escaped, None is nothing."""
    return Markup("".join(_child(child) for child in children))


def escape(text: str) -> str:
    return html.escape(visible(text), quote=True)


def visible(text: str) -> str:
    """The text with every control, override and zero-width character replaced by U+FFFD."""
    return "".join("\ufffd" if unicodedata.category(c) in UNSEEN and c != "\n" else c for c in text)


def _child(child: Child | list[Markup]) -> str:
    if child is None:
        return ""
    if isinstance(child, list):
        return "".join(child)
    return child if isinstance(child, Markup) else escape(child)


def _attribute(value: object) -> str:
    """Coordinates with at most two decimals: enough for a picture, and the same on every machine."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)
