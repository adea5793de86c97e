"""Safe reading, atomic writing and digests: every file of the project passes through here.

Limits are named constants. Writes appear whole or not at all. JSON is read strictly, because two readers that disagree
about a duplicate key would disagree about what was signed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError

from fedcompose.errors import ConfigError, MissingError, RefusedError

MAX_JSON_BYTES = 2 << 20  # every JSON document we read; the largest, a federation file of 1,000 sites, is 1.2 MB
MAX_JSON_DEPTH = 32
READ_CHUNK_BYTES = 1 << 20


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def dir_hash(digests: Mapping[str, str]) -> str:
    """in-toto `dirHash` of named SHA-256 digests: binds names as well as bytes.

    Equals `find . -type f | cut -c3- | LC_ALL=C sort | xargs -r sha256sum | sha256sum` over the same files.
    """
    return sha256_hex("".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode())


def folder_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every regular file below `folder`, by its relative name with forward slashes."""
    return {
        path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def read_limited(path: Path, max_bytes: int) -> bytes:
    """The bytes of a regular file that is not a link, or a refusal when it is larger than `max_bytes`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise RefusedError("FILE_NOT_REGULAR", f"{path.name!a} is a symbolic link") from error
        raise ConfigError("FILE_UNREADABLE", f"cannot read {path}", got=error.strerror) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # a FIFO would keep us waiting, and a folder has no bytes
        os.close(descriptor)
        raise RefusedError("FILE_NOT_REGULAR", f"{path.name!a} is not a regular file")
    with os.fdopen(descriptor, "rb") as stream:
        data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise RefusedError("FILE_TOO_LARGE", f"{path.name!a} is too large", expected=f"at most {max_bytes} bytes")
    return data


def parse_json(data: bytes, what: str, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Strict JSON: UTF-8 without BOM, no duplicate keys, no NaN, no half characters, bounded size and depth.

    Raises: RefusedError: `JSON_INVALID`.
    """

    def refuse(reason: str) -> NoReturn:
        raise RefusedError("JSON_INVALID", f"{what} is not acceptable JSON", got=reason)

    def finite(text: str) -> float:
        number = float(text)
        return number if math.isfinite(number) else refuse("a number beyond float64")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            refuse("a key appears twice")
        return keys

    if len(data) > max_bytes:
        refuse(f"more than {max_bytes} bytes")
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=unique,
            parse_float=finite,
            parse_constant=lambda name: refuse(f"the number {name}"),
        )
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, ValueError) as error:
        refuse(type(error).__name__)
    if _depth(value) > MAX_JSON_DEPTH:
        refuse(f"nested deeper than {MAX_JSON_DEPTH}")
    if "\\u" in text and not _is_text(value):
        refuse("half a character, which no encoding can write")
    return value


def read_json(path: Path) -> Any:
    return parse_json(read_limited(path, MAX_JSON_BYTES), path.name)


def dump_json(value: Any) -> bytes:
    """Readable, deterministic JSON."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n").encode()


def write_atomic(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write `data` so that `path` holds either the old bytes or all of the new ones, also after a crash."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            Path(temporary).chmod(mode)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, dump_json(value))


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` only when the block ends without an error; an older one is replaced.

    Use it for everything that several files make up together, so that a reader never meets half of it.
    """
    aside = target.parent / f".{target.name}.old"
    if aside.exists() and not target.exists():
        aside.replace(target)  # an earlier run ended between the two renames below
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        with disk_errors(target):
            yield temporary
            temporary.chmod(0o755)
            shutil.rmtree(aside, ignore_errors=True)
            if target.exists():
                target.replace(aside)
            temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an error that says so."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(path) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise MissingError("DISK_READ_ONLY", f"cannot write {path}", got=error.strerror) from error
        raise
    except SafetensorError as error:  # the library reports the system's error only as text
        if "os error 28" not in str(error).lower() and "No space left" not in str(error):
            raise
        raise _disk_full(path) from error


def _disk_full(path: Path) -> MissingError:
    return MissingError(
        "DISK_FULL",
        f"no space left while writing {path}",
        fix="free some space and run the command again; what was finished is kept",
    )


def _is_text(value: Any) -> bool:
    """Whether every string inside can be encoded; the escape for half of a pair of code units cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _depth(value: Any) -> int:
    """Nesting depth, iteratively, so that hostile nesting cannot exhaust the stack."""
    deepest, stack = 0, [(value, 1)]
    while stack:
        item, depth = stack.pop()
        deepest = max(deepest, depth)
        children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        stack.extend((child, depth + 1) for child in children)
    return deepest
