"""`fedcompose verify` and `fedcompose inspect`: check what somebody signed, and say what it is.

Neither loads a tensor library, so that a machine with nothing but this distribution can check a release. The chain that
`verify` prints, from the roots down to each expert, is put into words in `chain.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from fedcompose.bases import Base, base_shapes, resolve_base
from fedcompose.call import CALL_TYPE
from fedcompose.commands.chain import Chain, contribution_chain, file_chain, release_chain
from fedcompose.commands.inspect import Facts, aligned, contribution_facts, release_facts, show, unverified_facts
from fedcompose.composition import COMPOSITION_FILE
from fedcompose.console import AsJson, err, out, print_json
from fedcompose.contribution import (
    KINDS,
    ReceivedContribution,
    VerifiedContribution,
    check_federation,
    kind_of,
    verify_contribution,
)
from fedcompose.errors import ConfigError, MissingError, RefusedError
from fedcompose.federation import Federation
from fedcompose.federation_file import (
    OpenedFile,
    check_current,
    check_given,
    check_holders,
    check_order,
    check_roots,
    check_threshold,
    claimed_federation,
    open_federation,
)
from fedcompose.files import MAX_JSON_BYTES, read_limited
from fedcompose.folder import list_files, read_file
from fedcompose.keys import ENROLMENT_TYPE
from fedcompose.provenance import PROVENANCE_FILE
from fedcompose.release import ReceivedRelease, VerifiedRelease, verify_release
from fedcompose.revocations import REVOCATIONS_TYPE
from fedcompose.standing import cautions, check_terms, judge_today, newest_known
from fedcompose.statement import parse_provenance, parse_release_provenance
from fedcompose.trust_state import (
    accepted_federation,
    accepted_file,
    pinned,
    remembered_federation,
    trusted_federation,
)

DEFAULT_FEDERATION = Path("federation.json")

# What to do with a signed file of another kind.
INSTEAD = {
    REVOCATIONS_TYPE: "a revocation list is checked, and from then on applied, by: fedcompose federation accept FILE",
    ENROLMENT_TYPE: "a request to be enrolled is checked by a root: fedcompose federation enroll FILE --root-key KEY",
    CALL_TYPE: "a call is checked where it is answered: fedcompose client contribute",
}
NAME_THE_FOLDER = "if it belongs to a release or a contribution, name its folder: one signature covers all files"

Signed = Annotated[
    Path, typer.Argument(metavar="PATH", help="A release, a contribution, an outbox, or a federation file.")
]
Roots = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEYID",
        help="A root's fingerprint, got from its owner, where this machine does not know the federation. Repeatable. "
        "It is used for this check and not remembered.",
    ),
]
File = Annotated[
    Path | None,
    typer.Option(
        "--federation",
        help="A federation file. It is accepted on this machine, as by `fedcompose federation accept`, by the roots "
        "that are named or known, and then used. For a contribution the default is ./federation.json, or else the "
        "version that this machine has accepted.",
    ),
]
Now = Annotated[
    bool,
    typer.Option(
        "--now/--at-composition",
        help="Judge a release by the newest federation file known here, which must be current; or as of the day it was "
        "made, so that archives stay verifiable. What is known to be withdrawn since is refused either way.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    app.command()(verify)
    app.command()(inspect)


def verify(
    path: Signed, root_fingerprint: Roots = None, federation: File = None, now: Now = False, as_json: AsJson = False
) -> None:
    """Check everything about something signed, and print who vouches for what: exit 0, or 1 with the reason.

    A contribution and a federation file are always judged as of now.

    Example: fedcompose verify release --root-fingerprint 9f1c...
    """
    at = datetime.now(UTC)
    if path.is_file():
        chains = [file_chain(_verified_file(path, root_fingerprint, at), path)]
        facts = [{"kind": "federation file", "path": str(path)}]
    else:
        found = _verified(path, root_fingerprint, federation, at, now)
        chains, facts = [_chain(each, at, now) for each in found], [_facts(each).as_dict() for each in found]
    if as_json:
        folders = [fact | chain.as_dict() for fact, chain in zip(facts, chains, strict=True)]
        print_json({"verified": True, "folders": folders})
        return
    for chain in chains:
        _print(chain)


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A release, a contribution, or an outbox.")],
    root_fingerprint: Roots = None,
    federation: File = None,
    as_json: AsJson = False,
) -> None:
    """Say who made a signed folder, from what, its sizes, licences and numbers.

    Without a reason to trust its roots the content is shown as UNVERIFIED.

    Example: fedcompose inspect release
    """
    try:
        found = _verified(folder, root_fingerprint, federation, datetime.now(UTC), today=False)
        facts = [_facts(each) for each in found]
    except (RefusedError, ConfigError) as error:
        if error.code not in ("TRUST_ROOT_UNKNOWN", "FEDERATION_MISSING") or root_fingerprint:
            raise
        facts = [unverified_facts(path) for path in _folders(folder)]
        err.print(error.diagnostics(), markup=False, style="yellow")
    if as_json:
        print_json({"folders": [each.as_dict() for each in facts]})
        return
    for each in facts:
        show(each)


def _verified(
    folder: Path, fingerprints: Collection[str] | None, file: Path | None, at: datetime, today: bool
) -> list[VerifiedRelease] | list[VerifiedContribution]:
    folders = _folders(folder)
    if is_release(folders[0]):
        return [_verified_release(folders[0], fingerprints, file, at, today)]
    for each in folders:
        kind_of(list_files(each))  # before anything is said about federation files
    federation = _federation_for(folders[0], fingerprints, file, at)
    base = _base_here(federation)
    shapes = base_shapes(base) if base else None
    return [verify_contribution(ReceivedContribution(path), federation, now=at, base_shapes=shapes) for path in folders]


def _verified_release(
    folder: Path, fingerprints: Collection[str] | None, file: Path | None, at: datetime, today: bool
) -> VerifiedRelease:
    if file is not None:
        given = trusted_federation(read_limited(file, MAX_JSON_BYTES), fingerprints, at)
        claims = parse_release_provenance(read_file(folder, PROVENANCE_FILE, MAX_JSON_BYTES))
        check_federation(claims.federation, given.version, given)
    release = verify_release(ReceivedRelease(folder), fingerprints, at)
    if today:
        newest = newest_known(release)
        check_current(newest, at)
        judge_today(release, newest)
        check_terms(release, at)
    return release


def _verified_file(path: Path, fingerprints: Collection[str] | None, at: datetime) -> OpenedFile:
    """A federation file that `federation accept` would accept; nothing is remembered."""
    envelope = read_limited(path, MAX_JSON_BYTES)
    federation_id = _claimed_federation(envelope, path)
    accepted, pin = accepted_file(federation_id), pinned(federation_id)
    opened = open_federation(envelope, accepted[1].federation if accepted else None)
    check_threshold(opened)
    if fingerprints:
        check_given(opened, fingerprints)
    if accepted is not None and pin is not None:
        check_order(opened, pin)
        check_roots(opened, pin)
        check_holders(opened.federation, accepted[1].federation)
    elif not fingerprints:
        remembered_federation(envelope, at)  # says that nothing is known here
    check_current(opened.federation, at)
    return opened


def _claimed_federation(envelope: bytes, path: Path) -> str:
    """As `claimed_federation`; for a file of another kind, the text says what to use instead."""
    try:
        return claimed_federation(envelope)
    except RefusedError as error:
        if error.code not in ("ENVELOPE_SHAPE", "ENVELOPE_TYPE"):
            raise
        fix = next((fix for kind, fix in INSTEAD.items() if kind in (error.got or "")), NAME_THE_FOLDER)
        what = f"{path} is no federation file: {error.what}"
        raise RefusedError(error.code, what, expected=error.expected, got=error.got, fix=fix) from error


def _folders(folder: Path) -> list[Path]:
    """The signed folders that a person means by `folder`: itself, or each `adapter/` and `traces/` of an outbox.

    Raises: ConfigError: `FOLDER_MISSING`.
    """
    if folder.is_file():
        raise ConfigError(
            "FOLDER_MISSING", f"{folder} is a file, and what is signed as a whole is a folder",
            fix="name the folder that it lies in; for a federation file: fedcompose federation show FILE",
        )  # fmt: skip
    folder = folder.resolve()
    inner = [folder / kind for kind in KINDS if (folder / kind).is_dir()]
    return inner or sorted(path for kind in KINDS for path in folder.glob(f"*/{kind}") if path.is_dir()) or [folder]


def is_release(folder: Path) -> bool:
    return (folder / COMPOSITION_FILE).exists()


def _federation_for(folder: Path, fingerprints: Collection[str] | None, file: Path | None, at: datetime) -> Federation:
    """The federation file to judge a contribution by: the one given, the one in this folder, or the one accepted."""
    path = file or DEFAULT_FEDERATION
    if path.is_file():
        return trusted_federation(read_limited(path, MAX_JSON_BYTES), fingerprints, at)
    claimed = parse_provenance(read_file(folder, PROVENANCE_FILE, MAX_JSON_BYTES)).federation
    accepted = accepted_federation(claimed) if file is None else None
    if accepted is None:
        raise ConfigError(
            "FEDERATION_MISSING",
            "a contribution is checked against its federation file, which is not here",
            got=str(path),
            fix="--federation FILE",
        )
    check_current(accepted, at)
    return accepted


def _base_here(federation: Federation) -> Base | None:
    """The federation's base, if this machine has it: then an adapter's tensors are checked against it too."""
    for entry in federation.base_models:
        try:
            base = resolve_base(entry.name)
        except (MissingError, ConfigError):
            continue
        if base.digest == entry.dir_hash:
            return base
    return None


def _facts(found: VerifiedRelease | VerifiedContribution) -> Facts:
    return release_facts(found) if isinstance(found, VerifiedRelease) else contribution_facts(found)


def _chain(found: VerifiedRelease | VerifiedContribution, at: datetime, today: bool) -> Chain:
    if isinstance(found, VerifiedRelease):
        return release_chain(found, cautions(found, at), "now" if today else "at composition")
    return contribution_chain(found)


def _print(chain: Chain) -> None:
    out.print(chain.title, markup=False)
    for line in aligned([(f"✓ {link.check}", link.who, link.details) for link in chain.links]):
        out.print(line, markup=False, style="green")
    for warning in chain.warnings:
        out.print(f"! {warning}", markup=False, style="yellow")
    out.print(f"{chain.verdict}\nNo signature shows:", markup=False)
    for unshown in chain.not_shown:
        out.print(f"  - {unshown}", markup=False)
    out.print()
