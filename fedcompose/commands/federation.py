"""`fedcompose federation`: begin a federation, and propose what is to change in its file.

The other half, looking at a file, signing, accepting and withdrawing, is in `federation_trust.py`.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fedcompose.amendments import (
    KEY_VALIDITY,
    OVERLAP,
    add_member,
    change_bases,
    change_roots,
    keys_of,
    leave,
    replace_key,
    revoke_keys,
    set_policy,
    set_status,
)
from fedcompose.commands import federation_trust
from fedcompose.commands.federation_show import print_differences, print_state, proposal_as_dict
from fedcompose.commands.federation_trust import (
    DEFAULT_FILE,
    PROPOSE,
    File,
    Reason,
    RootKey,
    Time,
    keep_complete,
    parse_at,
    read,
)
from fedcompose.commands.keys import PassphraseFile
from fedcompose.console import AsJson, next_steps, out, print_json
from fedcompose.drafts import Change, amend, create_federation, differences, missing_signatures
from fedcompose.errors import ConfigError
from fedcompose.federation import Federation, Revocation
from fedcompose.federation_file import check_order, open_federation, pin_of
from fedcompose.files import MAX_JSON_BYTES, read_limited, sha256_file, write_atomic
from fedcompose.keys import Enrolment, load_signer, read_enrolment
from fedcompose.trust_state import accepted_file

HELP = """The federation file: who belongs, with which keys, on which base.

Everybody's trust starts with this file, so roots sign it: people whom all
members know. How many of them must sign is up to you; with several, no single
person and no single lost key can change who belongs.

To begin:

  1. Each root makes a key:        fedcompose keys new NAME --role root
  2. One root writes a draft:      fedcompose federation init
  3. The others read and sign it:  fedcompose federation sign
     until enough have signed. Files go from hand to hand, no network needed.
  4. A root enrols each site and the coordinator, by the request that their
     `keys new` made, after comparing fingerprints on the phone:
                                   fedcompose federation enroll
  5. Every member accepts the file, the first time with fingerprints that the
     roots read out on the phone:  fedcompose federation accept

Later, every change goes the same way: one root proposes it (enroll, rotate,
revoke, suspend, roots, bases, policy, renew), the others sign, every member
accepts. A file is good for 90 days, so renew it in time.

In an emergency one root alone, at once, withdraws a key, a site or a release:
fedcompose federation withdraw. Trust is granted by many and withdrawn by one.
"""

app = typer.Typer(
    no_args_is_help=True, help=HELP, short_help="The federation file: who belongs, with which keys, on which base."
)


def register(app_: typer.Typer) -> None:
    """Add the commands of this module, and those of `federation_trust`, to `app_`."""
    federation_trust.register(app)
    app_.add_typer(app, name="federation")


@app.command(rich_help_panel=PROPOSE)
def init(
    name: Annotated[str, typer.Option(help="What people call the federation.")],
    root_key: RootKey,
    base: Annotated[
        list[str],
        typer.Option(help="A base to build on: an alias, folder or hub id that is here, or NAME=DIRHASH. Repeatable."),
    ],
    root: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Another root's .enroll.json. Repeatable.")
    ] = None,
    threshold: Annotated[
        int | None, typer.Option(min=1, help="How many roots must sign every version; 1 for a single root.")
    ] = None,
    file: Annotated[Path, typer.Option("--out", help="The federation file to write.")] = DEFAULT_FILE,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Begin a federation: its first file, signed by one of its roots.

    With --threshold 2 or more this writes a draft, federation.draft.json, which
    the other roots sign: fedcompose federation sign. A root whose key is not a
    file (exec:...) gives its own .enroll.json as well, for its name.

    Example: fedcompose federation init --name "Three hospitals" --root-key keys/ann.key --root bob.enroll.json
    --root eve.enroll.json --threshold 2 --base smollm2-135m
    """
    for path in (file, draft_of(file)):
        if path.exists():
            raise ConfigError("FEDERATION_EXISTS", f"{path} exists already", fix="choose another --out")
    bases = dict(_base(ref) for ref in base)
    requests = [_enrolment(path) for path in root or []]
    signer = load_signer(root_key, passphrase_file)
    others = [request for request in requests if request.public_key.encode() != signer.public_pem]
    own = [request.id for request in requests if request.public_key.encode() == signer.public_pem]
    if others and threshold is None:
        raise ConfigError("THRESHOLD_MISSING", "say how many of the roots must sign: --threshold")
    now = datetime.now(UTC)
    identity = f"urn:uuid:{uuid.uuid4()}"
    envelope = create_federation(
        name, signer, own[0] if own else _stem(root_key), bases, identity, now, others=others, threshold=threshold or 1
    )
    if not as_json:
        out.print(f"Root fingerprint {signer.keyid}", markup=False)
        out.print(
            "Read it out to the other roots and to every member, on the phone or in person. Do not send it along."
        )
    missing = _hand_over(file, envelope, None, now, as_json)
    if not as_json and not missing:
        next_steps(f"fedcompose federation enroll SITE.enroll.json --root-key {root_key} --federation {file}")


@app.command(rich_help_panel=PROPOSE)
def enroll(
    enrolment: Annotated[Path, typer.Argument(metavar="FILE", help="A member's .enroll.json.")],
    root_key: RootKey,
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long the key counts.")] = KEY_VALIDITY.days,
    file: File = DEFAULT_FILE,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Take a site or coordinator into the federation: a new version of its file.

    First compare the fingerprint (`fedcompose keys show FILE`) with its owner, on
    the phone or in person. A member whose old keys are all revoked or past their
    time is enrolled again in the same way, with a new key.

    Example: fedcompose federation enroll site-a.enroll.json --root-key keys/root.key
    """
    request = _enrolment(enrolment)
    now = datetime.now(UTC)
    change = partial(add_member, enrolment=request, now=now, validity=timedelta(days=days))
    _propose(file, change, root_key, passphrase_file, now, as_json)


@app.command(rich_help_panel=PROPOSE)
def rotate(
    enrolment: Annotated[Path, typer.Argument(metavar="FILE", help="The .enroll.json that `keys rotate` wrote.")],
    root_key: RootKey,
    overlap_days: Annotated[
        int, typer.Option(min=0, max=90, help="How long a member's old key counts beside the new one.")
    ] = OVERLAP.days,
    file: File = DEFAULT_FILE,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Take a member's or a root's new key in the place of its old one.

    First compare the new fingerprint with its owner, on the phone or in person:
    a thief of the old key could ask for this too. The request is signed by both
    keys (`fedcompose keys rotate`). What a member's old key signed before stays
    good. A root's key is replaced at once: enough of the roots until now sign, and
    enough of the new ones.

    Example: fedcompose federation rotate site-a-2.enroll.json --root-key keys/root.key
    """
    request = read_limited(enrolment, MAX_JSON_BYTES)
    now = datetime.now(UTC)
    change = partial(replace_key, envelope=request, now=now, overlap=timedelta(days=overlap_days))
    _propose(file, change, root_key, passphrase_file, now, as_json)


@app.command(rich_help_panel=PROPOSE)
def revoke(
    target: Annotated[str, typer.Argument(metavar="KEY", help="A fingerprint, or a member's id for all its keys.")],
    reason: Reason,
    root_key: RootKey,
    at: Time = None,
    file: File = DEFAULT_FILE,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Stop believing a key, from a time on, in the next version of the file.

    compromised: somebody else may hold the key. What was received since --at is
    refused; what was received before counts, with a warning. rotated: another
    key took its place, or it is no longer needed; what was received before --at
    stays good. It cannot be taken back; the owner needs a new key.

    If several roots must sign and it is urgent: fedcompose federation withdraw.

    Example: fedcompose federation revoke site-a --reason compromised --at 2026-11-20 --root-key keys/root.key
    """
    now = datetime.now(UTC)
    revocation = Revocation(at=parse_at(at, reason, now), reason=reason)
    keyids = keys_of(open_federation(read(file)).federation, target, revocation)
    change = partial(revoke_keys, keyids=keyids, revocation=revocation)
    _propose(file, change, root_key, passphrase_file, now, as_json)


@app.command(rich_help_panel=PROPOSE)
def suspend(
    site: Annotated[str, typer.Argument(help="The site's id.")],
    root_key: RootKey,
    file: File = DEFAULT_FILE,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Let nothing more of a site in, for now, without touching its keys.

    Example: fedcompose federation suspend site-a --root-key keys/root.key
    """
    change = partial(set_status, site_id=site, status="suspended")
    _propose(file, change, root_key, passphrase_file, datetime.now(UTC), as_json)


@app.command(rich_help_panel=PROPOSE)
def reinstate(
    site: Annotated[str, typer.Argument(help="The site's id.")],
    root_key: RootKey,
    file: File = DEFAULT_FILE,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Let a suspended site contribute again.

    Example: fedcompose federation reinstate site-a --root-key keys/root.key
    """
    change = partial(set_status, site_id=site, status="active")
    _propose(file, change, root_key, passphrase_file, datetime.now(UTC), as_json)


@app.command(rich_help_panel=PROPOSE)
def roots(
    root_key: RootKey,
    add: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A new root's .enroll.json. Repeatable.")
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(metavar="ROOT", help="A root's name or fingerprint. Repeatable.")
    ] = None,
    threshold: Annotated[int | None, typer.Option(min=1, help="How many roots must sign from now on.")] = None,
    file: File = DEFAULT_FILE,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Change who the roots are, and how many of them must sign.

    It needs as many of the roots until now as had to sign until now, and as many
    of the new roots as have to sign from now on. A machine that missed such a
    version accepts the versions one after the other.

    Example: fedcompose federation roots --add eve.enroll.json --remove bob --threshold 2 --root-key keys/ann.key
    """
    if not add and not remove and threshold is None:
        raise ConfigError("FEDERATION_INPUT", "nothing is to change", expected="--add, --remove or --threshold")
    requests = [_enrolment(path) for path in add or []]
    change = partial(change_roots, add=requests, remove=remove or [], threshold=threshold)
    _propose(file, change, root_key, passphrase_file, datetime.now(UTC), as_json)


@app.command(rich_help_panel=PROPOSE)
def bases(
    root_key: RootKey,
    add: Annotated[
        list[str] | None,
        typer.Option(metavar="BASE", help="An alias, folder or hub id that is here, or NAME=DIRHASH. Repeatable."),
    ] = None,
    remove: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A base's name. Repeatable.")] = None,
    file: File = DEFAULT_FILE,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Change which base models the federation builds on.

    Example: fedcompose federation bases --add smollm2-135m --root-key keys/root.key
    """
    if not add and not remove:
        raise ConfigError("FEDERATION_INPUT", "nothing is to change", expected="--add or --remove")
    added = dict(_base(ref) for ref in add or [])
    change = partial(change_bases, add=added, remove=remove or [])
    _propose(file, change, root_key, passphrase_file, datetime.now(UTC), as_json)


@app.command(rich_help_panel=PROPOSE)
def policy(
    document: Annotated[Path, typer.Argument(metavar="FILE", help="The data-use policy: any kind of file.")],
    root_key: RootKey,
    file: File = DEFAULT_FILE,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Bind the federation to a data-use policy, by the SHA-256 of its document.

    Send the document along with the federation file, unchanged: `sha256sum` and
    `fedcompose federation show` must print the same digest.

    Example: fedcompose federation policy data-use.pdf --root-key keys/root.key
    """
    if not document.is_file():
        raise ConfigError("FILE_UNREADABLE", f"there is no file {document}")
    change = partial(set_policy, sha256=sha256_file(document))
    _propose(file, change, root_key, passphrase_file, datetime.now(UTC), as_json)


@app.command(rich_help_panel=PROPOSE)
def renew(
    root_key: RootKey, file: File = DEFAULT_FILE, passphrase_file: PassphraseFile = None, as_json: AsJson = False
) -> None:
    """Make the file good for another 90 days, with nothing else changed.

    A file expires so that nobody can go on showing an old one, in which a key
    still counts that has been revoked since.

    Example: fedcompose federation renew --root-key keys/root.key
    """
    _propose(file, leave, root_key, passphrase_file, datetime.now(UTC), as_json)


def _propose(
    file: Path, change: Change, root_key: str, passphrase_file: Path | None, now: datetime, as_json: bool
) -> None:
    """Make the next version of `file` with `change` in it, or add it to the draft that waits, and hand it over."""
    envelope = read(file)
    current = open_federation(envelope)
    accepted = accepted_file(current.federation.id)
    if accepted is not None:
        check_order(current, pin_of(accepted[1]))
    root = load_signer(root_key, passphrase_file)
    begun = draft_of(file)
    proposed = amend(
        envelope,
        change,
        root,
        now,
        accepted=accepted[1].sha256 if accepted else None,
        draft=read(begun) if begun.exists() else None,
    )
    missing = _hand_over(file, proposed, current.federation, now, as_json)
    if not as_json and not missing:
        next_steps(f"fedcompose federation show {file}", f"send {file} to every member")


def _hand_over(file: Path, envelope: bytes, older: Federation | None, now: datetime, as_json: bool) -> Sequence[str]:
    """Write what one root signed: as the federation file if that is enough, else as a draft for the other roots."""
    opened = open_federation(envelope, older)
    missing = missing_signatures(opened, older)
    written = draft_of(file) if missing else file
    if missing:
        write_atomic(written, envelope)
    else:
        keep_complete(file, envelope, now)
    if as_json:
        print_json(proposal_as_dict(written, opened, older, missing))
        return missing
    if older is not None:
        print_differences(differences(older, opened.federation), f"What changes from version {older.version}")
    print_state(written, opened.federation, missing)
    return missing


def draft_of(file: Path) -> Path:
    return file.with_name(f"{file.stem}.draft.json")


def _enrolment(path: Path) -> Enrolment:
    return read_enrolment(read_limited(path, MAX_JSON_BYTES))


def _stem(root_key: str) -> str:
    """A root's name from its key file's."""
    if re.match(r"[a-z][a-z0-9_-]+:", root_key):
        raise ConfigError(
            "ROOT_NAME", "this root's name is not known", fix="give its own enrolment too: --root NAME.enroll.json"
        )
    return Path(root_key).stem


def _base(ref: str) -> tuple[str, str]:
    """Name and dirHash of a base, given as NAME=DIRHASH or as something that lies on this machine."""
    given = re.fullmatch(r"(.+)=([0-9a-f]{64})", ref)
    if given:
        return given[1], given[2]
    from fedcompose.bases import resolve_base

    base = resolve_base(ref)
    return base.name, base.digest
