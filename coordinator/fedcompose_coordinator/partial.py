"""A contribution on its way, window by window, into a folder that outlives this process.

    calls/<call>/<site>/offer.json     what the site announced
    calls/<call>/<site>/windows        one line for each window that came and is on disk: its start and length
    calls/<call>/<site>/files/         the bytes, each where it belongs

Windows may come in any order. A window counts when its line is written, after its bytes; so after a crash at most the
windows that were on their way are asked for again. When all bytes are there, every file is compared with its announced
digest, and only then does the contribution become a folder of the inbox.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fedcompose import wire
from fedcompose.errors import FedcomposeError, RefusedError
from fedcompose.files import disk_errors, dump_json, read_json, sha256_file, write_atomic
from fedcompose.wire import Part, Slice

MIN_WINDOW_BYTES = 256 << 10
FIRST_WINDOW_BYTES = 4 << 20
SUCCESSES_TO_GROW = 8  # once something was lost, so that a connection that keeps breaking stays with small windows
WINDOWS_AHEAD = 4  # asked for at a time; a site's node that finds nothing asked of it sleeps for three seconds

Window = tuple[int, int]  # start and length


class Partial:
    """What of one offer has come, and what to ask for next."""

    def __init__(self, folder: Path, parts: Sequence[Part], window_bytes: int | None = None) -> None:
        self.folder, self.parts = folder, parts
        self.total = wire.stream_bytes(parts)
        self.fixed_bytes = window_bytes
        self.asked: set[Window] = set()
        self.successes = 0
        if not _is_same_offer(folder, parts):
            _begin(folder, parts)
        self.received = _read_windows(folder / "windows", self.total)
        lengths = [length for _, length in self.received]
        self.window_bytes = max(lengths[-1] // 4, MIN_WINDOW_BYTES) if lengths else FIRST_WINDOW_BYTES
        self.successes_to_grow = SUCCESSES_TO_GROW if lengths else 1

    @property
    def received_bytes(self) -> int:
        return sum(length for _, length in self.received)

    @property
    def is_whole(self) -> bool:
        return self.received_bytes == self.total

    def next_windows(self, ahead: int = WINDOWS_AHEAD) -> list[Window]:
        """The windows to ask for now, so that so many are on their way."""
        windows: list[Window] = []
        while len(self.asked) < ahead and (window := self._first_gap()) is not None:
            self.asked.add(window)
            windows.append(window)
        return windows

    def _first_gap(self) -> Window | None:
        """The first bytes that were neither received nor asked for, at most one window of them."""
        position = 0
        for start, length in sorted([*self.received, *self.asked]):
            if start > position:
                return position, min(self._size, start - position)
            position = start + length
        return (position, min(self._size, self.total - position)) if position < self.total else None

    @property
    def _size(self) -> int:
        return self.fixed_bytes or self.window_bytes

    def store(self, window: Window, pieces: Sequence[tuple[Slice, bytes]]) -> None:
        """Put the bytes of a window where they belong, and then remember that they are there."""
        with disk_errors(self.folder):
            for piece, data in pieces:
                with (self.folder / "files" / piece.part.name).open("r+b") as stream:
                    stream.seek(piece.offset)
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
            with (self.folder / "windows").open("a") as lines:
                lines.write(f"{window[0]} {window[1]}\n")
                lines.flush()
                os.fsync(lines.fileno())
        self.asked.discard(window)
        self.received.append(window)
        self._grow()

    def lost(self, window: Window) -> None:
        """A window that did not come will be asked for again, in smaller ones."""
        self.asked.discard(window)
        self.successes = 0
        self.successes_to_grow = SUCCESSES_TO_GROW
        self.window_bytes = max(self.window_bytes // 4, MIN_WINDOW_BYTES)

    def _grow(self) -> None:
        self.successes += 1
        if self.successes % self.successes_to_grow == 0:
            self.window_bytes = min(self.window_bytes * 2, wire.WINDOW_BYTES)

    def finish(self, inbox: Path) -> None:
        """Compare every file with its digest, and make the whole the new folder `inbox`.

        Raises: RefusedError: `CONTRIBUTION_DIGEST`; then nothing of it is kept.
        """
        for part in self.parts:
            if sha256_file(self.folder / "files" / part.name) != part.sha256:
                shutil.rmtree(self.folder)
                raise RefusedError("CONTRIBUTION_DIGEST", f"{part.name} is not what the site announced")
        with disk_errors(inbox):
            inbox.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(inbox, ignore_errors=True)
            (self.folder / "files").replace(inbox)
        shutil.rmtree(self.folder)


def holds(inbox: Path, parts: Sequence[Part]) -> bool:
    """Whether this folder is exactly the contribution that was announced, so that nothing has to be sent."""
    present = {path.relative_to(inbox).as_posix() for path in inbox.rglob("*") if path.is_file()}
    return present == {part.name for part in parts} and all(
        (inbox / part.name).stat().st_size == part.size and sha256_file(inbox / part.name) == part.sha256
        for part in parts
    )


def _is_same_offer(folder: Path, parts: Sequence[Part]) -> bool:
    try:
        known = read_json(folder / "offer.json")
    except FedcomposeError:
        return False
    return (folder / "files").is_dir() and bool(known == [asdict(part) for part in parts])


def _begin(folder: Path, parts: Sequence[Part]) -> None:
    """Empty files of the announced sizes; the offer is written last, so that half a beginning is none."""
    shutil.rmtree(folder, ignore_errors=True)
    with disk_errors(folder):
        for part in parts:
            path = folder / "files" / part.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as stream:
                stream.truncate(part.size)
        (folder / "windows").touch()
    write_atomic(folder / "offer.json", dump_json([asdict(part) for part in parts]))


def _read_windows(path: Path, total: int) -> list[Window]:
    """The windows that came before; a line that a crash cut short is none."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    whole = [line.split() for line in lines if line.endswith("\n")]
    if len(whole) != len(lines):
        write_atomic(path, "".join(line for line in lines if line.endswith("\n")).encode())
    return [(int(start), int(length)) for start, length in whole]
