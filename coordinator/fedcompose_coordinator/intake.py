"""Step 7: take what sites sent into quarantine, verify it there, and admit it to the store or refuse it.

Input: folders that anybody may have written. Output: `store/<dirHash>/`, read-only, and a line in `state.json`;
or `quarantine/<time>-<digest>/` with `reason.json`. A folder is copied first, each file read once and within
its limit; only the copy is verified, and only the store is ever loaded from, so that changing the original
in between changes nothing.

A site numbers what it signs. A number that is not above the last one is a replay, unless the folder is one
that was admitted before: receiving twice is no error. Of one site and kind the newest contribution counts.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedcompose.call import MAX_CALL_BYTES, read_own_call
from fedcompose.contribution import (
    KINDS,
    OPTIONAL,
    REQUIRED,
    Kind,
    ReceivedContribution,
    VerifiedContribution,
    kind_of,
    verify_contribution,
)
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.federation import Digest, Federation, Time
from fedcompose.files import dir_hash, disk_errors, read_json, read_limited, sha256_hex, write_json
from fedcompose.folder import check_names, copy_file, list_files
from fedcompose.keys import Identifier

log = logging.getLogger(__name__)

STATE_FILE = "state.json"
STORE = "store"
QUARANTINE = "quarantine"
REASON_FILE = "reason.json"
# The federation no longer stands behind the signer: its contribution is left out, and nothing else is wrong.
LEFT_OUT = frozenset({"KEY_UNKNOWN", "KEY_REVOKED", "SITE_SUSPENDED"})


class Admission(BaseModel):
    """One admitted contribution, as `state.json` remembers it by its dirHash."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    site: Identifier
    domain: Identifier
    kind: Kind
    sequence: int
    received_on: Time = Field(alias="receivedOn")


class _State(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_: Literal["fedcompose/intake/v1"] = Field(alias="schema")
    admitted: dict[Digest, Admission]


@dataclass(frozen=True)
class Receipt:
    """What became of one folder: `contribution` if it is in the store, else `refusal` and where the rest lies."""

    source: Path
    outcome: Literal["admitted", "already admitted", "refused"]
    contribution: VerifiedContribution | None = None
    refusal: RefusedError | None = None
    kept: Path | None = None


def receive(
    dirs: Sequence[Path],
    home: Path,
    federation: Federation,
    base_shapes: Mapping[str, tuple[int, int]],
    now: datetime,
) -> list[Receipt]:
    """Judge each folder on its own: an `adapter/` or `traces/` folder, or one that holds such folders.

    `base_shapes` are the linear layers of the federation's base. One refusal does not stop the others.

    Raises: ConfigError: `FOLDER_MISSING`, `INTAKE_STATE_INVALID`.
    """
    sources = [source for given in dirs for source in contribution_folders(given)]
    return [_receive_one(source, home, federation, base_shapes, now) for source in sources]


def contribution_folders(given: Path) -> list[Path]:
    """The contributions in a folder: itself, or what lies in its `adapter/` and `traces/` at any depth up to 2."""
    found = [path for depth in ("", "*/", "*/*/") for kind in KINDS for path in sorted(given.glob(f"{depth}{kind}"))]
    return found or [given]


def admitted(home: Path, federation: Federation) -> list[VerifiedContribution]:
    """The newest admitted contribution of each site and kind, verified again from the store, by site name.

    Each is judged as of the time it was received. A site that the federation has suspended since is left out.

    Raises: RefusedError: if a folder of the store was altered. ConfigError: `INTAKE_STATE_INVALID`.
    """
    newest: dict[tuple[str, str], tuple[str, Admission]] = {}
    for digest, entry in _read_state(home / STATE_FILE).items():
        known = newest.get((entry.site, entry.kind))
        if known is None or known[1].sequence < entry.sequence:
            newest[entry.site, entry.kind] = (digest, entry)
    contributions = []
    for digest, entry in (newest[key] for key in sorted(newest)):
        try:
            contributions.append(_from_store(home, digest, entry, federation))
        except RefusedError as error:
            if error.code not in LEFT_OUT:
                raise
            log.warning("site %s is left out: %s", entry.site, error.code)
    return contributions


def _receive_one(
    source: Path,
    home: Path,
    federation: Federation,
    base_shapes: Mapping[str, tuple[int, int]],
    now: datetime,
) -> Receipt:
    with _locked(home), _quarantined(home) as copy:
        digests: dict[str, str] = {}
        try:
            _copy(source, copy, digests)
            found = verify_contribution(ReceivedContribution(copy), federation, now=now, base_shapes=base_shapes)
            state = _read_state(home / STATE_FILE)
            if found.dir_hash in state:
                entry = state[found.dir_hash]
                kept = _from_store(home, found.dir_hash, entry, federation)
                return Receipt(source, "already admitted", contribution=kept)
            _check_fresh(found, state)
            _check_call(found, home)
        except RefusedError as error:
            return Receipt(source, "refused", refusal=error, kept=_keep(home, copy, digests, error, now))
        return Receipt(source, "admitted", contribution=_admit(home, copy, found, state))


def _copy(source: Path, copy: Path, digests: dict[str, str]) -> None:
    """Copy the files of a contribution while hashing them; `digests` tells how far it came."""
    names = list_files(source)
    kind = kind_of(names)
    check_names(names, REQUIRED[kind], OPTIONAL[kind])
    limits = {**REQUIRED[kind], **OPTIONAL[kind]}
    for name in names:
        digests[name] = copy_file(source, name, limits[name], copy / name)


def _check_fresh(found: VerifiedContribution, state: Mapping[str, Admission]) -> None:
    """A site's numbers rise, for each kind.

    Raises: RefusedError: `REPLAYED`.
    """
    same = (entry for entry in state.values() if (entry.site, entry.kind) == (found.site, found.kind))
    last = max((entry.sequence for entry in same), default=0)
    if found.provenance.sequence <= last:
        raise RefusedError(
            "REPLAYED",
            f"site {found.site} sent a contribution that is older than one admitted before",
            expected=f"a sequence number above {last}",
            got=f"{found.provenance.sequence}",
            fix="ask the site to contribute again",
        )


def _check_call(found: VerifiedContribution, home: Path) -> None:
    """A contribution that names a call answers one of ours; one carried by hand may name none.

    Raises: RefusedError: `CALL_UNKNOWN`.
    """
    claimed = found.provenance.call
    if claimed is None:
        return
    calls = [read_own_call(read_limited(path, MAX_CALL_BYTES)) for path in (home / "calls").glob("*.json")]
    if (claimed.id, claimed.nonce) not in {(call.id, call.nonce) for call in calls}:
        raise RefusedError("CALL_UNKNOWN", "the contribution answers a call that was not made here", got=claimed.id)


def _admit(home: Path, copy: Path, found: VerifiedContribution, state: Mapping[str, Admission]) -> VerifiedContribution:
    """Move the verified copy into the store, then write it down; a crash in between leaves it unlisted."""
    target = home / STORE / found.dir_hash
    with disk_errors(target):
        target.parent.mkdir(mode=0o700, exist_ok=True)
        if target.exists():  # left by such a crash
            shutil.rmtree(target)
        copy.replace(target)
    entry = Admission(
        site=found.site,
        domain=found.domain,
        kind=found.kind,
        sequence=found.provenance.sequence,
        receivedOn=found.received_on,
    )
    changed = _State(schema="fedcompose/intake/v1", admitted={**state, found.dir_hash: entry})
    write_json(home / STATE_FILE, changed.model_dump(mode="json", by_alias=True))
    return replace(found, path=target)


def _keep(home: Path, copy: Path, digests: Mapping[str, str], error: RefusedError, now: datetime) -> Path:
    """Keep what was copied, and why it was refused, for a person to look at."""
    digest = dir_hash(digests) if digests else sha256_hex(error.diagnostics().encode())
    kept = home / QUARANTINE / f"{now:%Y%m%dT%H%M%SZ}-{digest[:16]}"
    write_json(copy / REASON_FILE, error.as_dict())
    if kept.exists():
        shutil.rmtree(kept)
    copy.replace(kept)
    return kept


def _from_store(home: Path, digest: str, entry: Admission, federation: Federation) -> VerifiedContribution:
    folder = home / STORE / digest
    found = verify_contribution(ReceivedContribution(folder), federation, now=entry.received_on)
    if found.dir_hash != digest:
        raise RefusedError("FILE_CHANGED", f"{folder} does not hold what was admitted", got=found.dir_hash)
    return found


def _read_state(path: Path) -> Mapping[str, Admission]:
    if not path.exists():
        return {}
    try:
        return _State.model_validate(read_json(path)).admitted
    except (ValidationError, RefusedError) as error:
        raise ConfigError("INTAKE_STATE_INVALID", f"{path} cannot be read", fix="restore it from a backup") from error


@contextmanager
def _quarantined(home: Path) -> Iterator[Path]:
    """A private folder for one copy, gone afterwards unless it was moved away."""
    quarantine = home / QUARANTINE
    with disk_errors(quarantine):
        quarantine.mkdir(mode=0o700, parents=True, exist_ok=True)
        copy = Path(tempfile.mkdtemp(dir=quarantine, prefix=".receiving-"))
    try:
        yield copy
    finally:
        shutil.rmtree(copy, ignore_errors=True)


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One intake at a time for a coordinator's folder."""
    home.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(home / ".intake.lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
