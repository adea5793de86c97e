"""Reading a folder that somebody else made: expected names, regular files, bounded sizes, nothing else.

A folder is a hostile place: links point out of it, a FIFO blocks whoever opens it, a hard link changes a
file from elsewhere, and what was looked at a moment ago may be something else now. So a file is opened
relative to its folder without following links, checked after it was opened, and read only up to its limit.

`Limits` maps each allowed name to the largest size it may have; any other name does not belong there.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NoReturn

from fedcompose.errors import ConfigError, RefusedError
from fedcompose.files import READ_CHUNK_BYTES, disk_errors

MAX_ENTRIES = 8192  # a release of 500 sites has about 2,500 files and folders
MAX_DEPTH = 3  # ingredients/<site>/<file>

Limits = Mapping[str, int]


def list_files(folder: Path) -> dict[str, int]:
    """Sizes of all files below `folder` by relative name, without opening one.

    Raises: RefusedError: `FILE_NOT_REGULAR`, `FILE_LINKED`, `FOLDER_EMPTY`, `FOLDER_TOO_LARGE`.
        ConfigError: `FOLDER_MISSING`.
    """
    sizes: dict[str, int] = {}
    with _open_folder(folder) as descriptor:
        for count, (name, found) in enumerate(_walk(descriptor, "", 1)):
            if count >= MAX_ENTRIES:
                raise RefusedError("FOLDER_TOO_LARGE", "the folder holds too many files")
            _check_regular(name, found)
            sizes[name] = found.st_size
    return sizes


def check_names(found: Mapping[str, int], required: Limits, optional: Limits) -> None:
    """Exactly the required files and perhaps the optional ones, each within its limit.

    Raises: RefusedError: `FILE_UNEXPECTED`, `FILE_MISSING`, `FILE_TOO_LARGE`.
    """
    allowed = {**required, **optional}
    for name in found:
        if name not in allowed:
            raise RefusedError("FILE_UNEXPECTED", f"{name[:128]!a} does not belong in this folder")
    for name in required:
        if name not in found:
            raise RefusedError("FILE_MISSING", f"{name} is missing")
    for name, size in found.items():
        if size > allowed[name]:
            _too_large(name, allowed[name])


def read_file(folder: Path, name: str, max_bytes: int) -> bytes:
    """The bytes of one file.

    Raises: RefusedError: `FILE_MISSING`, `FILE_NOT_REGULAR`, `FILE_LINKED`, `FILE_TOO_LARGE`.
    """
    with _open_file(folder, name) as stream:
        data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        _too_large(name, max_bytes)
    return data


class HashedFile:
    """An open file that hashes every byte as it is read: what was hashed is what was used, in one pass."""

    def __init__(self, stream: BinaryIO, name: str, max_bytes: int) -> None:
        self.size = os.fstat(stream.fileno()).st_size
        self._stream, self._name, self._max_bytes = stream, name, max_bytes
        self._hash, self._seen = hashlib.sha256(), 0

    def read(self, size: int, /) -> bytes:
        """The next `size` bytes, fewer only at the end. Raises: RefusedError: `FILE_TOO_LARGE`."""
        data = self._stream.read(size)
        self._seen += len(data)
        if self._seen > self._max_bytes:
            _too_large(self._name, self._max_bytes)
        self._hash.update(data)
        return data

    def digest(self) -> str:
        """SHA-256 of the whole file; what was not read yet is read now. Raises: as `read`."""
        while self.read(READ_CHUNK_BYTES):
            pass
        return self._hash.hexdigest()


@contextmanager
def open_hashed(folder: Path, name: str, max_bytes: int) -> Iterator[HashedFile]:
    """Open one file that need not fit into memory. Raises: as `read_file`."""
    with _open_file(folder, name) as stream:
        yield HashedFile(stream, name, max_bytes)


def copy_file(folder: Path, name: str, max_bytes: int, target: Path, mode: int = 0o400) -> str:
    """Copy one file to the new path `target`; the SHA-256 is of what was copied.

    Raises: as `read_file`.
    """
    with disk_errors(target):
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as copy, open_hashed(folder, name, max_bytes) as file:
            while chunk := file.read(READ_CHUNK_BYTES):
                copy.write(chunk)
            copy.flush()
            os.fsync(descriptor)
            return file.digest()


def _walk(descriptor: int, prefix: str, depth: int) -> Iterator[tuple[str, os.stat_result]]:
    """Every file and link below an open folder, without following any."""
    with os.scandir(descriptor) as entries:
        names = sorted(entry.name for entry in islice(entries, MAX_ENTRIES + 1))
    if not names:
        raise RefusedError("FOLDER_EMPTY", f"the folder {prefix[:128] or '.'!a} is empty")
    for name in names:
        path = f"{prefix}{name}"
        found = _stat(name, path, descriptor)
        if not stat.S_ISDIR(found.st_mode):
            yield path, found
        elif depth >= MAX_DEPTH:
            raise RefusedError("FILE_UNEXPECTED", f"the folder {path[:128]!a} does not belong here")
        else:
            inner = _open_inside(name, path, descriptor)
            try:
                yield from _walk(inner, f"{path}/", depth + 1)
            finally:
                os.close(inner)


def _open_inside(name: str, path: str, descriptor: int) -> int:
    """A folder in an open folder; it may have become something else since it was looked at."""
    try:
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=descriptor)
    except OSError as error:
        raise RefusedError("FILE_CHANGED", f"the folder {path[:128]!a} cannot be opened", got=error.strerror) from error


def _stat(name: str, path: str, descriptor: int) -> os.stat_result:
    try:
        return os.stat(name, dir_fd=descriptor, follow_symlinks=False)
    except OSError as error:
        raise RefusedError("FILE_CHANGED", f"{path[:128]!a} went away while it was read") from error


@contextmanager
def _open_folder(folder: Path) -> Iterator[int]:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR) and folder.is_symlink():
            raise RefusedError("FILE_NOT_REGULAR", f"{folder.name!a} is a symbolic link, not a folder") from error
        raise ConfigError("FOLDER_MISSING", f"{folder} is not a readable folder", got=error.strerror) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _open_file(folder: Path, name: str) -> Iterator[BinaryIO]:
    """Open `name` part by part, following no link and waiting for no FIFO, and check what was opened."""
    *parents, last = name.split("/")
    with _open_folder(folder) as descriptor:
        opened: list[int] = [descriptor]
        try:
            for parent in parents:
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                opened.append(os.open(parent, flags, dir_fd=opened[-1]))
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            file = os.open(last, flags, dir_fd=opened[-1])
        except FileNotFoundError:
            raise RefusedError("FILE_MISSING", f"{name} is missing") from None
        except OSError as error:
            raise RefusedError("FILE_NOT_REGULAR", f"{name!a} cannot be opened", got=error.strerror) from error
        finally:
            for parent_descriptor in opened[1:]:
                os.close(parent_descriptor)
    with os.fdopen(file, "rb") as stream:
        _check_regular(name, os.fstat(file))
        yield stream


def _check_regular(name: str, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise RefusedError("FILE_NOT_REGULAR", f"{name[:128]!a} is not a regular file", expected="no links or devices")
    if found.st_nlink != 1:
        raise RefusedError(
            "FILE_LINKED",
            f"{name[:128]!a} has another name elsewhere (a hard link)",
            fix="copy the folder with `cp -r` and use the copy",
        )


def _too_large(name: str, max_bytes: int) -> NoReturn:
    raise RefusedError("FILE_TOO_LARGE", f"{name} is too large", expected=f"at most {max_bytes} bytes")
