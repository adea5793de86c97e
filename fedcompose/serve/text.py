"""Text from tokens as they come: whole characters only, and never a part of a stop string.

Every token keeps its own text, so that what is known about a token (who wrote it) stays with its words. The
texts joined are what the tokenizer would decode at the end, up to the first stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Note = TypeVar("Note")

CUT_CHARACTER = "\ufffd"  # what decoders put for bytes that are no whole character, yet or ever


class TextStream(Generic[Note]):
    """Tokens in, `(text, note)` out, one for each token and in order, as soon as its text is certain.

    Of the tokens that make up one character the last one has it; the others have no text. `stopped` says that a
    stop string was found: it and what follows are dropped, and nothing may be pushed any more.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, stops
        self._ids: list[int] = []  # those whose text came last, for context, then those without text yet
        self._known = 0  # how many of `_ids` are context: decoders treat the start of a text differently
        self._pending: list[tuple[str, Note]] = []
        self.stopped = False

    def push(self, token: int, note: Note) -> list[tuple[str, Note]]:
        """Take in one token; what can be told now."""
        self._ids.append(token)
        fresh = self._fresh()
        whole = not fresh.endswith(CUT_CHARACTER)
        self._pending.append((fresh if whole else "", note))
        if not whole:
            return []
        del self._ids[: self._known]
        self._known = len(self._ids)
        return self._release()

    def flush(self) -> list[tuple[str, Note]]:
        """The rest, when no token follows."""
        if len(self._ids) > self._known and self._pending:
            self._pending[-1] = (self._fresh(), self._pending[-1][1])
        ready = self._release()
        rest, self._pending = self._pending, []
        return ready + rest

    def _fresh(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._known])) :]

    def _release(self) -> list[tuple[str, Note]]:
        held = "".join(text for text, _ in self._pending)
        found = [place for stop in self._stops if (place := held.find(stop)) >= 0]
        if found:
            self.stopped = True
            ready, self._pending = _before(self._pending, min(found)), []
            return ready
        certain = len(held) - max((_overlap(held, stop) for stop in self._stops), default=0)
        count = end = 0
        for text, _ in self._pending:
            end += len(text)
            if end > certain:
                break
            count += 1
        ready, self._pending = self._pending[:count], self._pending[count:]
        return ready


def _before(pieces: Sequence[tuple[str, Note]], end: int) -> list[tuple[str, Note]]:
    """The pieces of the first `end` characters, the last one cut where they end."""
    kept, start = [], 0
    for text, note in pieces:
        if start >= end:
            break
        kept.append((text[: end - start], note))
        start += len(text)
    return kept


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` could be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
