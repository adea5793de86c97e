"""Somebody else's folder may change while it is read: what was hashed is what was used, and no link is followed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcompose.errors import FedcomposeError, RefusedError
from fedcompose.folder import check_names, copy_file, list_files, open_hashed, read_file

DATA = bytes(range(256)) * 4000


def test_the_digest_is_of_the_bytes_that_were_handed_out_even_if_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    with open_hashed(tmp_path, "file", len(DATA)) as file:
        seen = file.read(300_000)
        path.write_bytes(b"x" * len(DATA))
        seen += file.read(300_000) + file.read(len(DATA))
        assert file.digest() == hashlib.sha256(seen).hexdigest()
    assert len(seen) == file.size == len(DATA)
    assert seen != DATA and not seen.startswith(b"x")


def digest_of(folder: Path, limit: int) -> str:
    with open_hashed(folder, "file", limit) as file:
        return file.digest()


def test_all_ways_of_reading_give_one_digest_and_one_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)
    expected = hashlib.sha256(DATA).hexdigest()
    assert digest_of(tmp_path, len(DATA)) == expected
    assert copy_file(tmp_path, "file", len(DATA), tmp_path / "copy") == expected
    assert (tmp_path / "copy").read_bytes() == DATA
    assert read_file(tmp_path, "file", len(DATA)) == DATA
    check_names({"file": 9}, {"file": 9}, {})
    for action in (
        lambda: check_names({"file": 10}, {"file": 9}, {}),  # before anything is read
        lambda: read_file(tmp_path, "file", len(DATA) - 1),
        lambda: digest_of(tmp_path, len(DATA) - 1),
        lambda: copy_file(tmp_path, "file", len(DATA) - 1, tmp_path / "large"),
    ):
        with pytest.raises(RefusedError) as caught:
            action()
        assert caught.value.code == "FILE_TOO_LARGE"


def code_of(action: Callable[[], object]) -> str | None:
    try:
        action()
    except FedcomposeError as error:
        return error.code
    return None


def test_what_was_put_in_the_place_of_a_file_since_it_was_listed_is_not_read(tmp_path: Path) -> None:
    """Only the open file can tell, so reading does not rely on the list."""
    (tmp_path / "file").write_bytes(b"x")
    os.link(tmp_path / "file", tmp_path / "second")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("file")
    for name, code in (("file", "FILE_LINKED"), ("fifo", "FILE_NOT_REGULAR"), ("link", "FILE_NOT_REGULAR")):
        assert code_of(lambda name=name: read_file(tmp_path, name, 9)) == code  # type: ignore[misc]
    (tmp_path / "second").unlink()
    assert read_file(tmp_path, "file", 9) == b"x"


def test_folders_are_listed_to_a_depth_and_no_deeper(tmp_path: Path) -> None:
    deep = tmp_path / "1" / "2"
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"x")
    assert list_files(tmp_path) == {"1/2/file": 1}
    (deep / "3").mkdir()
    (deep / "3" / "file").write_bytes(b"x")
    assert code_of(lambda: list_files(tmp_path)) == "FILE_UNEXPECTED"


def test_a_link_to_a_folder_is_told_from_a_folder_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path)
    for name, code in (("file", "FOLDER_MISSING"), ("nothing", "FOLDER_MISSING"), ("link", "FILE_NOT_REGULAR")):
        assert code_of(lambda name=name: list_files(tmp_path / name)) == code  # type: ignore[misc]


def test_a_folder_that_becomes_a_link_while_it_is_listed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = tmp_path / "folder", os.stat
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "file").write_bytes(b"x")
    assert list_files(folder) == {"inner/file": 1}

    def swap(name: str, **options: Any) -> os.stat_result:
        found = real(name, **options)
        if name == "inner":
            (folder / "inner").rename(tmp_path / "moved")
            (folder / "inner").symlink_to(tmp_path / "moved")
        return found

    monkeypatch.setattr(os, "stat", swap)
    with pytest.raises(RefusedError) as caught:
        list_files(folder)
    assert caught.value.code == "FILE_CHANGED"
