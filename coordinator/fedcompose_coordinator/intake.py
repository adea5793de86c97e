"""Step 7: take what sites sent into quarantine, verify it there, and admit it to the store or refuse it.

Input: folders that anybody may have written. Output: `store/<dirHash>/`, read-only, and lines in the ledger; or
`quarantine/<time>-<digest>/` with `reason.json`. A folder is copied first, each file read once and within its
limit; only the copy is verified, and only the store is ever loaded from, so that changing the original in
between changes nothing. What lies in the store was verified; whether it is admitted, the ledger says.

A site numbers what it signs. A number that is not above the last one is a replay, unless the folder is one
that was received before: receiving twice is no error. A call is answered once by each site with each kind. Of
one site and kind the newest contribution counts.
"""

from __future__ import annotations

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

from fedcompose.bases import Base, base_shapes, control_tokens
from fedcompose.call import check_answer
from fedcompose.contribution import (
    KINDS,
    OPTIONAL,
    REQUIRED,
    ReceivedContribution,
    VerifiedContribution,
    kind_of,
    verify_contribution,
)
from fedcompose.errors import ConfigError, MissingError, RefusedError
from fedcompose.federation import Federation
from fedcompose.files import dir_hash, disk_errors, sha256_hex, write_json
from fedcompose.folder import check_names, copy_file, list_files
from fedcompose.rederive import rederive
from fedcompose.signing import Signer
from fedcompose.traces import Trace, check_tokens
from fedcompose_coordinator import approvals
from fedcompose_coordinator.approvals import Rule
from fedcompose_coordinator.decisions import Decisions, Known, decided, deciding, own_calls

log = logging.getLogger(__name__)

STORE = "store"
QUARANTINE = "quarantine"
REASON_FILE = "reason.json"
MAX_SITE_BYTES = 64 << 30  # of one site in the store; some thirty of the largest adapters
MAX_QUARANTINE_BYTES = 64 << 30  # beyond it, only the reason of a refusal is kept
MIN_DIGEST_CHARS = 8  # by which a person may name a contribution that waits
NO_APPROVALS = Rule()
# The federation no longer stands behind the signer: its contribution is left out, and nothing else is wrong.
LEFT_OUT = frozenset({"KEY_UNKNOWN", "KEY_REVOKED", "SITE_SUSPENDED"})


@dataclass(frozen=True)
class Receipt:
    """What became of one folder: `contribution` if it is in the store, else `refusal` and where the rest lies."""

    source: Path
    outcome: Literal["admitted", "already admitted", "waiting", "refused"]
    contribution: VerifiedContribution | None = None
    refusal: RefusedError | None = None
    kept: Path | None = None


def receive(
    dirs: Sequence[Path],
    home: Path,
    federation: Federation,
    base: Base,
    now: datetime,
    rule: Rule = NO_APPROVALS,
) -> list[Receipt]:
    """Judge each folder on its own: an `adapter/` or `traces/` folder, or one that holds such folders.

    One refusal does not stop the others. What `rule` asks approvals for waits until it has them.

    Raises: ConfigError: `FOLDER_MISSING`, `STATE_INVALID`. RefusedError: what is wrong with this coordinator's own
        clock or ledger, as `deciding`.
    """
    sources = [source for given in dirs for source in contribution_folders(given)]
    with deciding(home, now) as decisions:
        _clear(home)
        return [_receive_one(source, decisions, federation, base, rule) for source in sources]


def contribution_folders(given: Path) -> list[Path]:
    """The contributions in a folder: itself, or what lies in its `adapter/` and `traces/` at any depth up to 2."""
    found = [path for depth in ("", "*/", "*/*/") for kind in KINDS for path in sorted(given.glob(f"{depth}{kind}"))]
    return found or [given]


def approve(
    home: Path, federation: Federation, contribution: str, name: str, signer: Signer, rule: Rule, now: datetime
) -> Receipt:
    """Approve a waiting contribution, named by the first characters of its digest; admit it if that suffices.

    It is verified once more, under the federation file of today. Approving twice is no error.

    Raises: ConfigError: `APPROVAL_NOT_WAITING`, `APPROVER_UNKNOWN`. RefusedError: `APPROVER_KEY`, and whatever has
        become wrong with the contribution.
    """
    with deciding(home, now) as decisions:
        digest = _waiting(decisions, contribution)
        found = _from_store(home, digest, decisions.contributions[digest], federation)
        if name not in _approvers(decisions, rule, federation, digest):
            signed = approvals.approve(home, rule, federation.id, digest, name, signer, decisions.now)
            decisions.record("approved", contribution=digest, by=name, key=signer.keyid, approval=signed)
        return _admit(decisions, rule, federation, found, found.path)


def admitted(home: Path, federation: Federation) -> list[VerifiedContribution]:
    """The newest admitted contribution of each site and kind, verified again from the store, by site name.

    Each is judged as of the time it was received. A site that the federation has suspended since is left out; of what
    was signed before its key was compromised, a warning tells.

    Raises: RefusedError: if a folder of the store was altered, or the ledger. ConfigError: `STATE_INVALID`.
    """
    newest: dict[tuple[str, str], tuple[str, Known]] = {}
    for digest, entry in decided(home).items():
        known = newest.get((entry.site, entry.kind))
        if not entry.admitted:
            log.warning("%s of site %s was received and waits to be admitted: %s", entry.kind, entry.site, digest)
        elif known is None or known[1].sequence < entry.sequence:
            newest[entry.site, entry.kind] = (digest, entry)
    contributions = _still_known(home, federation, [newest[key] for key in sorted(newest)])
    for doubt in {federation.doubts(each.keyid) for each in contributions} - {None}:
        log.warning("%s", doubt)
    return contributions


def replaced(home: Path, federation: Federation, by: Sequence[VerifiedContribution]) -> list[VerifiedContribution]:
    """What was admitted of the same sites and kinds before these.

    Raises: as `admitted`.
    """
    present, kinds = {each.dir_hash for each in by}, {(each.site, each.kind) for each in by}
    known = decided(home).items()
    older = [each for each in known if each[1].admitted and each[0] not in present]
    return _still_known(home, federation, [each for each in older if (each[1].site, each[1].kind) in kinds])


def _still_known(
    home: Path, federation: Federation, entries: Sequence[tuple[str, Known]]
) -> list[VerifiedContribution]:
    """These, from the store, without those of a site or key that the federation knows no more."""
    found = []
    for digest, entry in entries:
        try:
            found.append(_from_store(home, digest, entry, federation))
        except RefusedError as error:
            if error.code not in LEFT_OUT:
                raise
            log.warning("site %s is left out: %s", entry.site, error.code)
    return found


def _receive_one(source: Path, decisions: Decisions, federation: Federation, base: Base, rule: Rule) -> Receipt:
    home = decisions.home
    with _quarantined(home) as copy:
        digests: dict[str, str] = {}
        try:
            _copy(source, copy, digests)
            found = verify_contribution(
                ReceivedContribution(copy), federation, now=decisions.now, base_shapes=base_shapes(base)
            )
            known = decisions.contributions.get(found.dir_hash)
            if known is not None:
                found = _from_store(home, found.dir_hash, known, federation)
            else:
                _check_new(found, decisions, base)
                found = _store(decisions, copy, found)
        except RefusedError as error:
            return Receipt(source, "refused", refusal=error, kept=_refuse(decisions, copy, digests, error))
        if known is not None and known.admitted:
            return Receipt(source, "already admitted", contribution=found)
        return _admit(decisions, rule, federation, found, source)


def _copy(source: Path, copy: Path, digests: dict[str, str]) -> None:
    """Copy the files of a contribution while hashing them; `digests` tells how far it came."""
    names = list_files(source)
    kind = kind_of(names)
    check_names(names, REQUIRED[kind], OPTIONAL[kind])
    limits = {**REQUIRED[kind], **OPTIONAL[kind]}
    for name in names:
        digests[name] = copy_file(source, name, limits[name], copy / name)


# --- what only the coordinator can check ----------------------------------------------------------


def _check_new(found: VerifiedContribution, decisions: Decisions, base: Base) -> None:
    """What a contribution must be besides well made: new, asked for, for this base, not too much."""
    ours = [known for known in decisions.contributions.values() if known.site == found.site]
    same = [known for known in ours if known.kind == found.kind]
    _check_sequence(found, same)
    _check_call(found, decisions.home, same)
    _check_quota(found, ours)
    if found.provenance.base.dir_hash != base.digest:
        raise RefusedError(
            "BASE_MISMATCH",
            "the contribution is for another base than this coordinator composes on",
            expected=base.digest,
            got=found.provenance.base.dir_hash,
        )
    if found.kind == "traces":
        traces = found.traces()
        check_tokens(traces, control_tokens(base))
        _check_rederived(traces)


def _check_rederived(traces: Sequence[Trace]) -> None:
    """Every trace answers its problem, which is made again here; only class E states none that could be checked.

    Raises: RefusedError: `TRACES_UNVERIFIED`.
    """
    for number, trace in enumerate(traces, start=1):
        try:
            right = trace.provenance_class == "E" or rederive(trace) is not None
        except MissingError as error:  # a site decides what it names; it must not decide what is installed here
            raise _unverified(number, error.what, error.fix) from error
        if not right:
            raise _unverified(number, "a wrong answer, or a problem that does not exist here", None)


def _unverified(number: int, got: str, fix: str | None) -> RefusedError:
    return RefusedError(
        "TRACES_UNVERIFIED", f"line {number} of the traces does not answer the problem that it names", got=got,
        fix=fix or "the same version of fedcompose at both places; at the site: fedcompose client distill",
    )  # fmt: skip


def _check_sequence(found: VerifiedContribution, same: Sequence[Known]) -> None:
    """A site's numbers rise, for each kind.

    Raises: RefusedError: `REPLAYED`.
    """
    last = max((known.sequence for known in same), default=0)
    if found.provenance.sequence <= last:
        raise RefusedError(
            "REPLAYED",
            f"site {found.site} sent a contribution that is older than one received before",
            expected=f"a sequence number above {last}",
            got=f"{found.provenance.sequence}",
            fix="ask the site to contribute again",
        )


def _check_call(found: VerifiedContribution, home: Path, same: Sequence[Known]) -> None:
    """A contribution that names a call answers one of ours, as it asks and once; one carried by hand may name none.

    Raises: RefusedError: `CALL_UNKNOWN`, `CALL_ANSWERED`, and all that `check_answer` raises.
    """
    claimed = found.provenance.call
    if claimed is None:
        return
    calls = [call for call in own_calls(home) if call.id == claimed.id]
    if not calls:
        raise RefusedError("CALL_UNKNOWN", "the contribution answers a call that was not made here", got=claimed.id)
    check_answer(calls[0], found)
    if any(known.call == claimed.id for known in same):
        raise RefusedError(
            "CALL_ANSWERED",
            f"site {found.site} has answered the call {claimed.id} with other {found.kind} before",
            fix="make a new call: fedcompose coordinator call",
        )


def _check_quota(found: VerifiedContribution, ours: Sequence[Known]) -> None:
    total = sum(known.bytes for known in ours) + _size(found.path)
    if total > MAX_SITE_BYTES:
        raise RefusedError(
            "SITE_QUOTA",
            f"site {found.site} has too much in the store",
            expected=f"at most {MAX_SITE_BYTES} bytes",
            got=f"{total} with this one",
        )


# --- store and quarantine -------------------------------------------------------------------------


def _store(decisions: Decisions, copy: Path, found: VerifiedContribution) -> VerifiedContribution:
    """Move the verified copy into the store, then write it down; a crash in between leaves it unlisted."""
    target = decisions.home / STORE / found.dir_hash
    size = _size(copy)
    with disk_errors(target):
        target.parent.mkdir(mode=0o700, exist_ok=True)
        target.parent.chmod(0o700)
        if target.exists():  # left by such a crash
            shutil.rmtree(target)
        copy.replace(target)
        for folder in (target, target.parent):
            _sync(folder)
    answered = {} if found.provenance.call is None else {"call": found.provenance.call.id}
    decisions.record(
        "received", contribution=found.dir_hash, site=found.site, domain=found.domain, kind=found.kind,
        sequence=found.provenance.sequence, key=found.keyid, bytes=size, **answered,
    )  # fmt: skip
    return replace(found, path=target)


def _admit(
    decisions: Decisions, rule: Rule, federation: Federation, found: VerifiedContribution, source: Path
) -> Receipt:
    """Admit what is in the store, unless it still waits for approvals."""
    if len(_approvers(decisions, rule, federation, found.dir_hash)) < rule.needed:
        return Receipt(source, "waiting", contribution=found)
    decisions.record("admitted", contribution=found.dir_hash)
    return Receipt(source, "admitted", contribution=found)


def _approvers(decisions: Decisions, rule: Rule, federation: Federation, digest: str) -> set[str]:
    recorded = decisions.contributions[digest].approvals
    return approvals.approved_by(decisions.home, rule, federation.id, digest, recorded)


def _waiting(decisions: Decisions, beginning: str) -> str:
    """The one waiting contribution whose digest begins so."""
    waiting = [digest for digest, known in decisions.contributions.items() if not known.admitted]
    named = [digest for digest in waiting if len(beginning) >= MIN_DIGEST_CHARS and digest.startswith(beginning)]
    if len(named) != 1:
        raise ConfigError(
            "APPROVAL_NOT_WAITING",
            f"no contribution, or more than one, waits under {beginning[:64]!a}",
            expected=f"at least {MIN_DIGEST_CHARS} characters of: " + (", ".join(waiting) or "nothing waits"),
        )
    return named[0]


def _refuse(decisions: Decisions, copy: Path, digests: Mapping[str, str], error: RefusedError) -> Path:
    """Write the refusal down, and keep what was copied, and why it was refused, for a person to look at."""
    digest = dir_hash(digests) if digests else sha256_hex(error.diagnostics().encode())
    decisions.record("refused", contribution=digest, code=error.code)
    quarantine = decisions.home / QUARANTINE
    if _size(quarantine) > MAX_QUARANTINE_BYTES:
        for path in copy.iterdir():
            path.unlink()
    kept = quarantine / f"{decisions.now:%Y%m%dT%H%M%SZ}-{digest[:16]}"
    write_json(copy / REASON_FILE, error.as_dict())
    if kept.exists():
        shutil.rmtree(kept)
    copy.replace(kept)
    return kept


def _from_store(home: Path, digest: str, entry: Known, federation: Federation) -> VerifiedContribution:
    folder = home / STORE / digest
    found = verify_contribution(ReceivedContribution(folder), federation, now=entry.received_on)
    if found.dir_hash != digest:
        raise RefusedError("FILE_CHANGED", f"{folder} does not hold what was received", got=found.dir_hash)
    return found


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


def _clear(home: Path) -> None:
    """Remove copies that an intake left when it was killed; nobody else is receiving now."""
    for left in (home / QUARANTINE).glob(".receiving-*"):
        shutil.rmtree(left, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _sync(folder: Path) -> None:
    """Make the names in a folder last, so that no line of the ledger outlives what it speaks of."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
