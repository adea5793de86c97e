"""Writes appear whole or not at all; JSON is read strictly; a full disk is an error that says so."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
from safetensors import SafetensorError

from fedcompose import cli
from fedcompose.errors import FedcomposeError, MissingError, RefusedError
from fedcompose.files import (
    MAX_JSON_DEPTH,
    dir_hash,
    disk_errors,
    folder_digests,
    new_folder,
    parse_json,
    read_limited,
    write_atomic,
)


def test_a_new_folder_replaces_the_old_one_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with new_folder(target) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(RuntimeError), new_folder(target) as folder:
        (folder / "a").write_text("half")
        raise RuntimeError
    assert (target / "a").read_text() == "old"
    with new_folder(target) as folder:
        (folder / "a").write_text("new")
    assert (target / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_folder_survives_an_end_between_the_two_renames(tmp_path: Path) -> None:
    (tmp_path / ".made.old").mkdir()
    (tmp_path / ".made.old" / "a").write_text("kept")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "made"):
        raise RuntimeError
    assert (tmp_path / "made" / "a").read_text() == "kept"


def test_a_failed_write_leaves_the_old_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(MissingError) as caught:
        write_atomic(path, b"new")
    assert caught.value.code == "DISK_FULL"
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "DISK_FULL"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "DISK_FULL"),
        (SafetensorError("I/O error: No space left on device"), "DISK_FULL"),
        (SafetensorError("Error while serializing: I/O error (OS error 28)"), "DISK_FULL"),
        (OSError(errno.EACCES, "Permission denied"), "DISK_READ_ONLY"),
        (OSError(errno.EROFS, "Read-only file system"), "DISK_READ_ONLY"),
        (OSError(errno.EIO, "Input/output error"), None),
        (SafetensorError("Error while deserializing header"), None),
    ],
    ids=lambda value: None if isinstance(value, str | None) else repr(value),
)
def test_a_disk_that_cannot_be_written_is_said_and_nothing_else_is_taken_for_one(
    tmp_path: Path, error: Exception, code: str | None
) -> None:
    with pytest.raises(MissingError if code else type(error)) as caught, disk_errors(tmp_path):
        raise error
    assert getattr(caught.value, "code", None) == code


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":1,"a":2}',
        b"[NaN]",
        b"[Infinity]",
        b"[1e999]",
        b"\xef\xbb\xbf{}",
        b"{",
        b"\xff",
        b"[" * 40 + b"]" * 40,
        b'["\\ud83d"]',
        b'{"\\ude00":1}',
    ],
)
def test_refuses_json_that_two_readers_could_read_differently(text: bytes) -> None:
    with pytest.raises(RefusedError) as caught:
        parse_json(text, "it")
    assert caught.value.code == "JSON_INVALID"


def test_reads_json_up_to_its_limits() -> None:
    assert parse_json(b'"\\u00e9\\ud83d\\ude00"', "it") == "é😀"
    assert parse_json(b"[12345]", "it", max_bytes=7) == [12345]
    deepest = b"[" * MAX_JSON_DEPTH + b"]" * MAX_JSON_DEPTH
    assert parse_json(deepest, "it")
    for text, limit in ((b"[123456]", 7), (b"[" + deepest + b"]", 1000)):
        with pytest.raises(RefusedError) as caught:
            parse_json(text, "it", max_bytes=limit)
        assert caught.value.code == "JSON_INVALID"


def test_large_files_and_what_is_no_file_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")  # nobody writes into it: whoever opens it the usual way waits for ever
    assert read_limited(tmp_path / "file", 5) == b"12345"
    codes = {"file": "FILE_TOO_LARGE"} | dict.fromkeys(("link", "folder", "fifo"), "FILE_NOT_REGULAR")
    for name, code in codes.items():
        with pytest.raises(FedcomposeError) as caught:
            read_limited(tmp_path / name, 4)
        assert caught.value.code == code


def test_dir_hash_equals_the_shell_line_that_documents_it(tmp_path: Path) -> None:
    for name in ("b", "a.x", "a/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    line = "find . -type f | cut -c3- | LC_ALL=C sort | xargs -r sha256sum | sha256sum"
    shell = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert dir_hash(folder_digests(tmp_path)) == shell.split()[0]


def test_an_unexpected_error_never_quotes_its_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**options: object) -> None:
        raise ValueError("patient 4711")

    monkeypatch.delenv(cli.DEBUG, raising=False)
    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 3
    said = capsys.readouterr().err
    assert "UNEXPECTED" in said and "ValueError" in said and "4711" not in said
