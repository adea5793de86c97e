"""`fedcompose federation`: look at a file, sign a draft, accept what roots signed, withdraw trust at once."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from fedcompose.amendments import keys_of
from fedcompose.commands.federation_show import (
    as_dict,
    print_differences,
    print_federation,
    print_state,
    proposal_as_dict,
    revocation_lines,
)
from fedcompose.commands.keys import PassphraseFile
from fedcompose.console import AsJson, next_steps, out, print_json
from fedcompose.document import format_time, parse_time
from fedcompose.drafts import check_draft, differences, missing_signatures, root_ids, sign_draft
from fedcompose.errors import ConfigError, FedcomposeError, RefusedError
from fedcompose.federation import Federation, Revocation
from fedcompose.federation_file import OpenedFile, claimed_federation, open_federation
from fedcompose.files import MAX_JSON_BYTES, dir_hash, read_limited, write_atomic
from fedcompose.folder import read_file
from fedcompose.keys import load_signer
from fedcompose.revocations import (
    REVOCATIONS_TYPE,
    RevokedKey,
    WithdrawnRelease,
    next_revocations,
    with_revocations,
)
from fedcompose.signing import SIGNATURE_FILE, read_envelope_unverified, read_hint, verify_files
from fedcompose.trust_state import (
    accept_federation,
    accept_revocations,
    accepted_federation,
    accepted_file,
    accepted_revocations,
    pinned,
)

DEFAULT_FILE = Path("federation.json")
DEFAULT_LIST = Path("revocations.json")
PROPOSE, READ = "A root proposes the next version", "Read, sign, accept, withdraw"  # panels of the help

RootKey = Annotated[
    str,
    typer.Option(metavar="KEY", help="A root's private key: a file, or one held elsewhere (fedcompose keys --help)."),
]
File = Annotated[Path, typer.Option("--federation", help="The federation file.")]
Reason = Annotated[
    Literal["rotated", "compromised"],
    typer.Option(help="compromised: somebody else may hold the key. rotated: it is merely no longer used."),
]
Time = Annotated[
    str | None,
    typer.Option(
        "--at", metavar="TIME", help="From when on, in UTC, as 2026-11-20 or 2026-11-20T09:00:00Z. Now by default."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    for command in (show, sign, accept, withdraw):
        app.command(rich_help_panel=READ)(command)


def show(
    file: Annotated[Path, typer.Argument(help="The federation file, or a draft of one.")] = DEFAULT_FILE,
    as_json: AsJson = False,
) -> None:
    """Show who belongs to a federation, with which keys, on which base.

    Of a draft, or of a version that this machine has not accepted yet, it also
    shows everything that changes from the accepted one: + new, - gone, ~ other.

    Example: fedcompose federation show federation.draft.json
    """
    envelope = read(file)
    older = _accepted(envelope)
    known = older.federation if older else None
    opened = open_federation(envelope, known)
    missing = missing_signatures(opened, _before(opened, known))
    if as_json:
        print_json(proposal_as_dict(file, opened, known, missing) | {"signed_by": sorted(opened.own_signed)})
        return
    trust, withdrawn = _trust(opened, older, missing), accepted_revocations(opened.federation.id)
    federation = with_revocations(opened.federation, withdrawn)
    print_federation(file, federation, opened.signed, trust, withdrawn, datetime.now(UTC))
    if known is not None and opened.federation.version > known.version:
        print_differences(differences(known, opened.federation), f"What changes from version {known.version}")
    if missing:
        next_steps(f"fedcompose federation sign {file} --root-key KEY   (a root, if it agrees)")


def sign(
    draft: Annotated[Path, typer.Argument(metavar="DRAFT", help="The draft that another root made.")],
    root_key: RootKey,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask; the changes were read before.")] = False,
    file: File = DEFAULT_FILE,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Sign a draft as one of the roots, after reading what changes in it.

    It prints everything in which the draft differs from the version that this
    machine accepted, and asks. Sign a new key or a new root only if you have
    compared its fingerprint with its owner, on the phone or in person. If that
    was the last signature needed, the file is complete (--federation); if not,
    send the draft on to the next root. Nothing here needs a network.

    Example: fedcompose federation sign federation.draft.json --root-key keys/bob.key
    """
    envelope = read(draft)
    accepted = _accepted(envelope)
    older = accepted.federation if accepted else None
    opened = open_federation(envelope, older)
    check_draft(opened, accepted)
    if not as_json:
        heading = f"What changes from version {older.version}" if older else "What the first version says"
        print_differences(differences(older, opened.federation), heading)
    _confirm(yes)
    now = datetime.now(UTC)
    signed = sign_draft(envelope, accepted, load_signer(root_key, passphrase_file), now)
    opened = open_federation(signed, older)
    missing = missing_signatures(opened, older)
    written = draft if missing else file
    if missing:
        write_atomic(draft, signed)
    else:
        keep_complete(file, signed, now)
        if draft.resolve() != file.resolve():
            draft.unlink()
    if as_json:
        print_json(proposal_as_dict(written, opened, older, missing))
        return
    print_state(written, opened.federation, missing)
    if not missing:
        next_steps(f"send {file} to every root and member", f"fedcompose federation accept {file}   (each of them)")


def accept(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Federation files, oldest first; a revocation list.")
    ],
    root_fingerprint: Annotated[
        list[str] | None,
        typer.Option(metavar="KEYID", help="A root's fingerprint, got from its owner; the first time. Repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Believe a federation file or a revocation list from now on, if the roots signed it.

    The first time, ask as many roots as must sign for their fingerprints, on the
    phone or in person, and give each. Later files are believed because enough of
    the roots accepted so far signed them. An older or an expired file is refused,
    a second file with the same version number too, and a list that takes
    something back. If you missed versions in which roots changed, give all of
    them, oldest first. Then put the file where your settings look for it.

    Example: fedcompose federation accept federation.json --root-fingerprint 9f1c... --root-fingerprint 41aa...
    """
    envelopes = [read(path) for path in files]
    lists = [envelope for envelope in envelopes if _is_list(envelope)]
    versions = [envelope for envelope in envelopes if not _is_list(envelope)]
    said = []
    if versions:
        before = _accepted(versions[0])
        federation = accept_federation(versions, root_fingerprint, datetime.now(UTC))
        said.append(as_dict(federation))
        if not as_json:
            _print_accepted(before.federation if before else None, federation)
    for envelope in lists:
        listed = accept_revocations(envelope)
        said.append(listed.model_dump(mode="json", by_alias=True))
        if not as_json:
            for line in revocation_lines(listed):
                out.print(line, markup=False)
    if as_json:
        print_json({"accepted": said})


def withdraw(
    target: Annotated[
        str, typer.Argument(metavar="WHAT", help="A key's fingerprint, a member's id, or the folder of a release.")
    ],
    root_key: RootKey,
    reason: Reason = "compromised",
    at: Time = None,
    file: File = DEFAULT_FILE,
    to: Annotated[Path, typer.Option("--out", help="The revocation list to write.")] = DEFAULT_LIST,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Withdraw a key, a member or a release at once: one root's signature is enough.

    It writes the next revocation list, with everything that earlier lists
    withdrew. Send it to every member; each runs `fedcompose federation accept`,
    and from then on `coordinator receive`, `compose`, `verify` and `serve` refuse
    what is on it. It cannot be taken back: a member needs a new key, a release
    has to be made again.

    A list reaches only those who accept it. So let the next version of the
    federation file say the same (`federation revoke`), which everybody gets.

    Example: fedcompose federation withdraw site-a --root-key keys/root.key
    """
    now = datetime.now(UTC)
    federation = _known(file)
    revocation = Revocation(at=parse_at(at, reason, now), reason=reason)
    keys, releases = _entries(target, federation, revocation, now)
    root = load_signer(root_key, passphrase_file)
    if root.keyid not in root_ids(federation):
        raise ConfigError("FEDERATION_SIGNERS", "that key is not a root's", got=f"key {root.keyid}")
    envelope = next_revocations(accepted_revocations(federation.id), keys, releases, root, now)
    listed = accept_revocations(envelope)
    write_atomic(to, envelope)
    if as_json:
        print_json(listed.model_dump(mode="json", by_alias=True) | {"file": str(to)})
        return
    for line in revocation_lines(listed):
        out.print(line, markup=False)
    out.print(f"\n{to} holds all of this.", markup=False)
    steps = [f"send {to} to every root and member", f"fedcompose federation accept {to}   (each of them)"]
    if keys:
        steps.append(f"fedcompose federation revoke {target} --reason {reason} ...   (for the next version)")
    next_steps(*steps)


# --- what both halves of the commands use ---------------------------------------------------------


def read(file: Path) -> bytes:
    return read_limited(file, MAX_JSON_BYTES)


def keep_complete(file: Path, envelope: bytes, now: datetime) -> None:
    """Write a complete version, and accept it on this machine: one of its roots signed it here."""
    before = file.read_bytes() if file.exists() else None
    opened = open_federation(envelope)
    write_atomic(file, envelope)
    try:
        accept_federation([envelope], None if pinned(opened.federation.id) else opened.own_signed, now)
    except FedcomposeError:  # say, another file of this version was signed before
        if before is None:
            file.unlink()
        else:
            write_atomic(file, before)
        raise


def parse_at(text: str | None, reason: str, now: datetime) -> datetime:
    """When a revocation begins to count.

    Raises: ConfigError: `TIME_INVALID`.
    """
    if text is None:
        return now.replace(microsecond=0)
    try:
        at = parse_time(f"{text}T00:00:00Z" if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text, re.ASCII) else text)
    except ValueError as error:
        raise ConfigError(
            "TIME_INVALID", f"{text!a} is not a time", expected="like 2026-11-20 or 2026-11-20T09:00:00Z, in UTC"
        ) from error
    if reason == "compromised" and at > now:
        raise ConfigError("TIME_INVALID", "a key is not compromised from some later time on", got=format_time(at))
    return at


# --- steps of the commands ------------------------------------------------------------------------


def _accepted(envelope: bytes) -> OpenedFile | None:
    """The version of the same federation that this machine accepted."""
    found = accepted_file(claimed_federation(envelope))
    return found[1] if found else None


def _before(opened: OpenedFile, accepted: Federation | None) -> Federation | None:
    """The accepted version, if the file comes after it: then its roots must sign too."""
    return accepted if accepted is not None and accepted.version < opened.federation.version else None


def _trust(opened: OpenedFile, accepted: OpenedFile | None, missing: Sequence[str]) -> str:
    version = opened.federation.version
    if missing:
        return f"a DRAFT, believed by nobody. It needs {'; '.join(missing)}"
    if accepted is None:
        return "not known on this machine: compare the root fingerprints with their owners"
    if version < accepted.federation.version:
        return f"OLD: this machine has accepted version {accepted.federation.version}"
    if version == accepted.federation.version:
        same = opened.sha256 == accepted.sha256
        return "accepted on this machine" if same else "REFUSED: another file of this version was accepted"
    return "signed by roots that this machine knows, and not accepted yet"


def _confirm(yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError(
            "SIGN_UNREAD",
            "nobody is here to say that these changes are right",
            fix="read them, and sign with --yes",
        )
    if not typer.confirm("\nSign this?", err=True):
        raise typer.Abort


def _print_accepted(before: Federation | None, federation: Federation) -> None:
    if before is not None and before.version != federation.version:
        print_differences(differences(before, federation), f"What changed since version {before.version}")
        out.print()
    out.print(
        f"Federation {federation.name}, version {federation.version}, is believed on this machine "
        f"until {format_time(federation.expires)}.",
        markup=False,
    )


def _is_list(envelope: bytes) -> bool:
    try:
        read_envelope_unverified(envelope, REVOCATIONS_TYPE)
    except RefusedError as error:
        if error.code != "ENVELOPE_TYPE":
            raise
        return False
    return True


def _known(file: Path) -> Federation:
    """The accepted version of the federation in `file`: a list is signed for what everybody may have accepted."""
    federation = accepted_federation(claimed_federation(read(file)))
    if federation is None:
        raise ConfigError(
            "TRUST_ROOT_UNKNOWN",
            "this machine has not accepted this federation",
            fix=f"fedcompose federation accept {file} --root-fingerprint FINGERPRINT",
        )
    return federation


def _entries(
    target: str, federation: Federation, revocation: Revocation, now: datetime
) -> tuple[list[RevokedKey], list[WithdrawnRelease]]:
    """What to list: keys if `target` is a key or a member of the federation, else a release in a folder."""
    try:
        keyids = keys_of(federation, target, revocation)
    except ConfigError:
        if not Path(target).is_dir():
            raise
        return [], [WithdrawnRelease(dirHash=_signed_by_coordinator(Path(target), federation), at=now)]
    return [RevokedKey(keyid=keyid, **dict(revocation)) for keyid in keyids], []


def _signed_by_coordinator(folder: Path, federation: Federation) -> str:
    """The dirHash that a coordinator of this federation signed, whatever has become of its key or of the files."""
    bundle = read_file(folder, SIGNATURE_FILE, MAX_JSON_BYTES)
    hint = read_hint(bundle)
    for key in (key for coordinator in federation.coordinators for key in coordinator.keys):
        if key.keyid == hint:
            return dir_hash(verify_files(bundle, key.public_key.encode()).digests)
    raise RefusedError("KEY_UNKNOWN", "no coordinator of this federation signed this folder", got=f"key {hint}")
