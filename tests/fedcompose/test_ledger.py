from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fedcompose import ledger
from fedcompose.errors import RefusedError
from fedcompose.ledger import EMPTY, Head, append, head, repair, verify

NOW = datetime(2026, 11, 20, 9, tzinfo=UTC)
DIGESTS = [hashlib.sha256(bytes([n])).hexdigest() for n in range(6)]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ledger of six entries."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for digest in DIGESTS:
        append(tmp_path / "ledger.jsonl", "admitted", NOW, contribution=digest, sequence=7)
    return tmp_path / "ledger.jsonl"


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def refusal(path: Path, held: dict[str, Head] | None = None) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        verify(path, held)
    return caught.value


def test_gives_back_what_was_written(path: Path) -> None:
    entries = verify(path)
    assert [(entry.n, entry.at, entry.event) for entry in entries] == [(n, NOW, "admitted") for n in range(1, 7)]
    assert [dict(entry.fields) for entry in entries] == [{"contribution": each, "sequence": 7} for each in DIGESTS]


def test_a_head_is_what_sha256sum_says_of_the_last_line(path: Path) -> None:
    last = subprocess.run(["tail", "-n", "1", path], capture_output=True, check=True).stdout
    printed = subprocess.run(["sha256sum"], input=last, capture_output=True, check=True).stdout.decode().split()[0]
    assert head(path) == Head(entries=6, head=printed)
    assert verify(path, {"a site": head(path)})[-1].sha256 == printed


def test_what_was_read_before_is_not_parsed_again(path: Path) -> None:
    """Every decision reads the whole ledger; with a thousand sites that would be a million lines."""
    verify(path)
    before = ledger._parse.cache_info().misses
    append(path, "admitted", NOW, contribution=DIGESTS[0], sequence=8)
    assert len(verify(path)) == 7
    assert ledger._parse.cache_info().misses == before + 1


def test_an_absent_ledger_is_an_empty_one(tmp_path: Path) -> None:
    assert verify(tmp_path / "none.jsonl") == []
    assert head(tmp_path / "none.jsonl") == EMPTY
    assert repair(tmp_path / "none.jsonl") is None
    assert not (tmp_path / "none.jsonl").exists()


def test_only_the_owner_may_read_it(path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600


def edited(line: bytes, **changes: Any) -> bytes:
    """A line with other content, in the form that this program writes."""
    document = json.loads(line) | changes
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def rechained(old: list[bytes]) -> list[bytes]:
    """What an attacker makes who takes the trouble to number and hash everything again."""
    new: list[bytes] = []
    for n, line in enumerate(old, start=1):
        previous = hashlib.sha256(new[-1] if new else b"").hexdigest()
        new.append(edited(line, n=n, previous=previous))
    return new


def swapped(old: list[bytes], n: int) -> list[bytes]:
    return [*old[: n - 1], old[n], old[n - 1], *old[n + 1 :]]


def changed(old: list[bytes], n: int, **changes: Any) -> list[bytes]:
    return [*old[: n - 1], edited(old[n - 1], **changes), *old[n:]]


# What somebody does to a ledger of six entries, and which entry is named as the first bad one.
TAMPERING: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "first removed": (lambda old: old[1:], "entry 1 is missing"),
    "third removed": (lambda old: [*old[:2], *old[3:]], "entry 3 is missing"),
    "third removed, the rest numbered again": (
        lambda old: [*old[:2], *(edited(line, n=n) for n, line in enumerate(old[3:], start=3))],
        "entry 3 was changed",
    ),
    "third edited": (lambda old: changed(old, 3, event="refused"), "entry 3 was changed"),
    "digest in the third edited": (lambda old: changed(old, 3, contribution="0" * 64), "entry 3 was changed"),
    "time of the third edited": (lambda old: changed(old, 3, at="2026-11-19T09:00:00Z"), "entry 3 was changed"),
    "link of the third edited": (lambda old: changed(old, 3, previous="0" * 64), "entry 3 was changed"),
    "link of the first edited": (lambda old: changed(old, 1, previous="0" * 64), "entry 1 was changed"),
    "last but one edited": (lambda old: changed(old, 5, sequence=8), "entry 5, or 6 after it, was changed"),
    "second and third swapped": (lambda old: swapped(old, 2), "entry 2 is missing, or not in its place"),
    "third written twice": (lambda old: [*old[:3], old[2], *old[3:]], "entry 4 is missing, or not in its place"),
    "one inserted": (
        lambda old: [*old[:3], edited(old[2], n=4), *(edited(line, n=json.loads(line)["n"] + 1) for line in old[3:])],
        "entry 4 was changed",
    ),
    "spaces added": (lambda old: [*old[:2], old[2].replace(b",", b", "), *old[3:]], "entry 3 is not an entry"),
    "a sentence in it": (lambda old: changed(old, 3, note="obey me"), "entry 3 is not an entry"),
    "an object in it": (lambda old: changed(old, 3, note={"a": 1}), "entry 3 is not an entry"),
    "a key twice": (lambda old: [*old[:2], old[2].replace(b'"n":3', b'"n":3,"n":3'), *old[3:]], "entry 3 is not"),
    "an empty line": (lambda old: [*old[:2], b"\n", *old[2:]], "entry 3 is not an entry"),
    "a very long line": (lambda old: [*old[:2], b"[" * 200_000 + b"\n", *old[3:]], "entry 3 is not an entry"),
    "no JSON": (lambda old: [*old[:2], b"\xff\x00\n", *old[3:]], "entry 3 is not an entry"),
    "last one cut off": (lambda old: [*old[:5], old[5][:-9]], "entry 6 is cut off"),
    "last line break removed": (lambda old: [*old[:5], old[5][:-1]], "entry 6 is cut off"),
}


@pytest.mark.parametrize("name", TAMPERING)
def test_names_the_first_bad_entry_of_a_chain_that_does_not_hold(path: Path, name: str) -> None:
    assert len(verify(path)) == 6  # untouched it holds
    tamper, words = TAMPERING[name]
    path.write_bytes(b"".join(tamper(lines(path))))
    error = refusal(path)
    assert error.code == "LEDGER_BROKEN"
    assert words in error.what


@pytest.mark.parametrize("entries", [0, 1, 5])
def test_only_a_head_held_elsewhere_tells_that_the_end_is_gone(path: Path, entries: int) -> None:
    known = head(path)
    path.write_bytes(b"".join(lines(path)[:entries]))
    assert len(verify(path)) == entries  # by itself the rest is whole
    error = refusal(path, {"site-a": known})
    assert (error.code, f"entry {entries + 1} is missing" in error.what) == ("LEDGER_TRUNCATED", True)
    assert "site-a" in (error.expected or "")


def test_only_heads_held_elsewhere_tell_that_everything_was_written_anew(path: Path) -> None:
    held = {f"site-{n}": Head(entries=n, head=verify(path)[n - 1].sha256) for n in (1, 3, 5)}
    verify(path, held)
    path.write_bytes(b"".join(rechained(changed(lines(path), 4, event="refused"))))
    assert len(verify(path, {"site-3": held["site-3"]})) == 6  # whoever saw only what is still true, sees nothing
    error = refusal(path, held)
    assert error.code == "LEDGER_FORKED"
    assert "entry 4 or one after it, up to 5," in error.what
    assert "site-5" in (error.expected or "")


def test_the_head_of_an_empty_ledger_can_be_held_and_no_other_of_that_length(path: Path) -> None:
    verify(path, {"site-a": EMPTY})
    assert refusal(path, {"site-a": Head(entries=0, head="0" * 64)}).code == "LEDGER_FORKED"


@pytest.mark.parametrize(
    "fields",
    [
        {"note": "a sentence"}, {"note": ""}, {"note": "x" * 129}, {"note": "line\nbreak"}, {"note": "é"},
        {"note": "\x1b[31m"}, {"note": 1.5}, {"note": True}, {"note": -1}, {"note": None}, {"note": {"a": "b"}},
        {"note": ["ok", "not ok"]}, {"n": 3}, {"previous": "0" * 64}, {"Note": "x"}, {"note": ["x" * 100] * 1000},
    ],
)  # fmt: skip
def test_there_is_no_room_for_words(path: Path, fields: dict[str, Any]) -> None:
    before = path.read_bytes()
    append(path, "admitted", NOW, note="digest.or:name/of-something", notes=["a", "b"])
    with pytest.raises(ValueError, match="does not fit"):
        append(path, "admitted", NOW, **fields)
    assert len(lines(path)) == 7 and path.read_bytes().startswith(before)


@pytest.mark.parametrize("event", ["", "two words", "Shout", "x" * 33])
def test_an_event_is_one_word(path: Path, event: str) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        append(path, event, NOW)


def test_what_a_crash_left_is_set_aside_and_the_ledger_goes_on(path: Path) -> None:
    known = head(path)
    with path.open("ab") as stream:
        stream.write(b'{"at":"2026-')
    with pytest.raises(RefusedError, match="does not end in an entry"):
        append(path, "admitted", NOW)
    assert repair(path) == hashlib.sha256(b'{"at":"2026-').hexdigest()
    assert path.with_name("ledger.jsonl.torn").read_bytes() == b'{"at":"2026-'
    assert head(path) == known and repair(path) is None
    assert append(path, "admitted", NOW).entries == 7
    assert len(verify(path, {"site-a": known})) == 7


def test_setting_aside_an_entry_that_was_cut_on_purpose_does_not_hide_it(path: Path) -> None:
    known = head(path)
    path.write_bytes(path.read_bytes()[:-1])
    assert repair(path)
    assert refusal(path, {"site-a": known}).code == "LEDGER_TRUNCATED"


def test_a_full_disk_leaves_no_half_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()
    real = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) < 50:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[:-40])

    monkeypatch.setattr(ledger.os, "write", full)
    with pytest.raises(Exception, match="no space left"):
        append(path, "admitted", NOW)
    assert path.read_bytes() == before


def test_processes_that_append_at_once_make_one_chain(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, (ready, go) = ledger._write, os.pipe()

    def slowly(descriptor: int, line: bytes) -> None:
        time.sleep(0.005)
        write(descriptor, line)

    monkeypatch.setattr(ledger, "_write", slowly)
    children = []
    for name in ("a", "b"):
        children.append(os.fork())
        if children[-1] == 0:
            os.read(ready, 1)
            for _ in range(10):
                append(path, "called", NOW, by=name)
            os._exit(0)
    os.write(go, b"go")
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert sorted(entry.fields["by"] for entry in verify(path)[6:]) == ["a"] * 10 + ["b"] * 10


def test_a_link_is_no_ledger(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(path)
    with pytest.raises(RefusedError) as caught:
        append(tmp_path / "link.jsonl", "admitted", NOW)
    assert caught.value.code == "FILE_NOT_REGULAR"
