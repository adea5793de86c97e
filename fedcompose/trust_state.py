"""What this machine believes: the newest federation file and revocation list that it accepted, of each federation.

`trust-state.json` in `$FEDCOMPOSE_HOME` holds the pins: version, digest and roots of what was accepted. The signed
files themselves lie beside it, in `federations/` and `revocations/`, and are compared with the pins when they are read.
Everything else in this project that needs a federation asks here, so that a rollback, a fork, a freeze (an expired
file) and a clock that was set back are noticed wherever a file is used.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, ValidationError

from fedcompose.document import Digest, Document, Time, format_time
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.federation import Federation, FederationId
from fedcompose.federation_file import (
    AcceptedVersion,
    OpenedFile,
    Pin,
    check_current,
    check_given,
    check_holders,
    check_order,
    check_roots,
    check_threshold,
    claimed_federation,
    open_federation,
    pin_of,
)
from fedcompose.files import MAX_JSON_BYTES, read_json, read_limited, sha256_hex, write_atomic, write_json
from fedcompose.revocations import (
    REVOCATIONS_TYPE,
    Revocations,
    check_newer,
    no_revocations,
    parse_revocations,
    read_revocations_unverified,
    verify_revocations,
    with_revocations,
)
from fedcompose.signing import read_envelope_unverified

# Clocks of honest machines differ by minutes, or by hours where a time zone is set wrong; an old file is shown again
# after days.
CLOCK_SKEW = timedelta(days=1)
MAX_HISTORY = 500  # accepted versions that are remembered; one is made for every member and every quarter

Found = TypeVar("Found")


class RememberedFederation(Pin):
    """The pin of a federation, when this machine last used it, and the versions that it accepted before."""

    seen: Time  # to the day: this machine's clock was later than this
    history: Annotated[tuple[AcceptedVersion, ...], Field(strict=False)]


class RememberedList(Document):
    """The revocation list that was accepted last."""

    number: Annotated[int, Field(ge=1)]
    sha256: Digest


class TrustState(Document):
    """The whole of `trust-state.json`."""

    schema_: Literal["fedcompose/trust-state/v1"] = Field(alias="schema")
    federations: dict[FederationId, RememberedFederation]
    revocations: dict[FederationId, RememberedList] = Field(default_factory=dict)


# --- federation files -----------------------------------------------------------------------------


def trusted_federation(envelope: bytes, root_fingerprints: Collection[str] | None, now: datetime) -> Federation:
    """The federation file, checked against what this machine accepted before, and then accepted itself.

    The first time a person must give fingerprints, got from the roots in some other way than with the file. From then
    on the roots of the accepted version decide; fingerprints that are given nevertheless must hold as well. The keys
    that the accepted revocation list names are revoked in what is returned.

    Raises: RefusedError: `FEDERATION_ROLLBACK` (a newer version was seen before), `FEDERATION_FORK` (this
        version was seen with another content), `FEDERATION_KEY_MOVED`, `CLOCK_BEHIND`, and all that
        `verify_federation` raises. ConfigError: `TRUST_STATE_INVALID`.
    """
    return accept_federation([envelope], root_fingerprints, now)


def accept_federation(
    envelopes: Sequence[bytes], root_fingerprints: Collection[str] | None, now: datetime
) -> Federation:
    """The same for a chain of versions, oldest first, each believed because of the one before.

    For a machine that missed versions in which the roots changed. Only the last must not have expired.
    """
    with _trust_state() as state:
        federation_id = claimed_federation(envelopes[0])
        remembered = state.federations.get(federation_id)
        pin: Pin | None = remembered
        older = _kept_federation(federation_id)
        history = list(remembered.history) if remembered else []
        for number, envelope in enumerate(envelopes):
            opened = open_federation(envelope, older)
            check_threshold(opened)
            if number == 0 and pin is None and not root_fingerprints:
                raise _unknown(opened.federation)
            if number == 0 and root_fingerprints:
                check_given(opened, root_fingerprints)
            if pin is not None:
                _check_next(opened, federation_id, pin, older)
                history.append(AcceptedVersion(version=pin.version, sha256=pin.sha256))
            pin, older = pin_of(opened), opened.federation
        check_current(opened.federation, now)
        _check_clock(opened.federation, remembered, now)
        _keep(_place("federations", federation_id), envelopes[-1])
        state.federations[federation_id] = _remember(opened, remembered, history, now)
    return with_revocations(opened.federation, accepted_revocations(federation_id))


def accepted_federation(federation_id: str) -> Federation | None:
    """The newest version that this machine accepted, expired or not, with the accepted revocation list applied.

    Raises: ConfigError: `TRUST_STATE_INVALID`.
    """
    found = accepted_file(federation_id)
    return with_revocations(found[1].federation, accepted_revocations(federation_id)) if found else None


def accepted_file(federation_id: str) -> tuple[bytes, OpenedFile] | None:
    """The file of the newest version that this machine accepted, as it is kept, compared with the pin.

    Raises: ConfigError: `TRUST_STATE_INVALID`.
    """
    return _settled(_kept_file, federation_id)


def remembered_federation(envelope: bytes, at: datetime) -> Federation:
    """A file that may be old, such as the one in a release, as it counted `at` its own time. Nothing is accepted.

    It is a version that this machine accepted at some time, or the roots of the version accepted last signed it. The
    accepted revocation list is applied.

    Raises: RefusedError: `TRUST_ROOT_UNKNOWN`, `FEDERATION_FORK` (another content than the version of this number that
        was accepted), `FEDERATION_EXPIRED`, and all that `read_federation` raises. ConfigError: `TRUST_STATE_INVALID`.
    """
    opened = open_federation(envelope)
    check_threshold(opened)
    federation = opened.federation
    remembered = _read_trust_state(_trust_state_path()).federations.get(federation.id)
    if remembered is None:
        raise _unknown(federation)
    accepted = {each.version: each for each in (*remembered.history, remembered)}
    if federation.version in accepted:
        check_order(opened, accepted[federation.version])
    else:
        check_roots(opened, remembered)
    check_current(federation, at)
    return with_revocations(federation, accepted_revocations(federation.id))


def pinned(federation_id: str) -> Pin | None:
    """What this machine last believed of a federation, if anything.

    Raises: ConfigError: `TRUST_STATE_INVALID`.
    """
    return _read_trust_state(_trust_state_path()).federations.get(federation_id)


def _check_next(opened: OpenedFile, federation_id: str, pin: Pin, older: Federation | None) -> None:
    if opened.federation.id != federation_id:
        raise RefusedError(
            "FEDERATION_MISMATCH", "these files are of different federations", expected=federation_id,
            got=opened.federation.id,
        )  # fmt: skip
    check_order(opened, pin)
    check_roots(opened, pin)
    if older is not None:
        check_holders(opened.federation, older)


def _check_clock(federation: Federation, remembered: RememberedFederation | None, now: datetime) -> None:
    """A clock that was set back would let an expired file count again."""
    latest = max([federation.issued - CLOCK_SKEW, *([remembered.seen] if remembered else [])])
    if now < latest:
        raise RefusedError(
            "CLOCK_BEHIND",
            "this machine's clock is behind: it has been later before, or the federation file is from later",
            expected=f"a time after {format_time(latest)}",
            got=format_time(now),
            fix=f"set the clock; if it is right and ran ahead before, delete {_trust_state_path()} and accept the "
            "newest federation file once more: fedcompose federation accept FILE --root-fingerprint FINGERPRINT",
        )


def _remember(
    opened: OpenedFile, before: RememberedFederation | None, history: Sequence[AcceptedVersion], now: datetime
) -> RememberedFederation:
    seen = (now - CLOCK_SKEW).replace(hour=0, minute=0, second=0, microsecond=0)
    older = tuple(each for each in history if each.version < opened.federation.version)[-MAX_HISTORY:]
    return RememberedFederation(**dict(pin_of(opened)), seen=max(seen, before.seen) if before else seen, history=older)


def _kept_file(federation_id: str) -> tuple[bytes, OpenedFile] | None:
    pin = pinned(federation_id)
    if pin is None:
        return None
    path = _place("federations", federation_id)
    try:
        envelope = read_limited(path, MAX_JSON_BYTES)
        opened = open_federation(envelope)
        check_threshold(opened)
    except (RefusedError, ConfigError) as error:
        raise _damaged(path, "federation file") from error
    if opened.sha256 != pin.sha256:
        raise _damaged(path, "federation file")
    return envelope, opened


def _kept_federation(federation_id: str) -> Federation | None:
    """The accepted version, for the public keys of its roots; without it only roots that stay can vouch."""
    try:
        found = _kept_file(federation_id)
    except ConfigError:  # the pin decides, and the file is written anew
        return None
    return found[1].federation if found else None


def _unknown(federation: Federation) -> RefusedError:
    return RefusedError(
        "TRUST_ROOT_UNKNOWN",
        f"nothing on this machine says whether to trust federation {federation.name!a}",
        fix="ask its roots for their fingerprints, by phone or in person, and give them: --root-fingerprint "
        "FINGERPRINT; `fedcompose federation accept FILE` with them makes this machine remember",
    )


# --- revocation lists -----------------------------------------------------------------------------


def accept_revocations(envelope: bytes) -> Revocations:
    """A revocation list of a federation that this machine knows; from now on it is applied everywhere.

    Raises: RefusedError: `REVOCATIONS_ROLLBACK`, `REVOCATIONS_FORK`, `TRUST_ROOT_UNKNOWN`, and all that
        `verify_revocations` raises. ConfigError: `TRUST_STATE_INVALID`.
    """
    with _trust_state() as state:
        federation_id = read_revocations_unverified(envelope).federation
        found = _kept_file(federation_id)
        if found is None:
            raise RefusedError(
                "TRUST_ROOT_UNKNOWN",
                "this machine does not know the federation of this revocation list",
                got=federation_id,
                fix="accept its federation file first: fedcompose federation accept --help",
            )
        listed = verify_revocations(envelope, found[1].federation)
        payload = read_envelope_unverified(envelope, REVOCATIONS_TYPE)
        before = state.revocations.get(federation_id)
        if before is not None and before.sha256 != sha256_hex(payload):
            check_newer(listed, _kept_list(federation_id, before))
        _keep(_place("revocations", federation_id), envelope)
        state.revocations[federation_id] = RememberedList(number=listed.number, sha256=sha256_hex(payload))
    return listed


def accepted_revocations(federation_id: str) -> Revocations:
    """The revocation list that this machine accepted last; an empty one if there was none.

    Raises: ConfigError: `TRUST_STATE_INVALID`.
    """
    return _settled(_accepted_list, federation_id)


def _accepted_list(federation_id: str) -> Revocations:
    remembered = _read_trust_state(_trust_state_path()).revocations.get(federation_id)
    if remembered is None:
        return no_revocations(federation_id)
    path = _place("revocations", federation_id)
    try:
        payload = read_envelope_unverified(read_limited(path, MAX_JSON_BYTES), REVOCATIONS_TYPE)
        listed = parse_revocations(payload)
    except (RefusedError, ConfigError) as error:
        raise _damaged(path, "revocation list") from error
    if sha256_hex(payload) != remembered.sha256:
        raise _damaged(path, "revocation list")
    return listed


def _kept_list(federation_id: str, before: RememberedList) -> Revocations:
    """The accepted list; if its file is lost, one of which only the number is known."""
    try:
        return _accepted_list(federation_id)
    except ConfigError:
        return no_revocations(federation_id).model_copy(update={"number": before.number})


# --- the files ------------------------------------------------------------------------------------


@contextmanager
def _trust_state() -> Iterator[TrustState]:
    """The state; what the block changes is written if it ends well. One process at a time."""
    path = _trust_state_path()
    with _locked():
        state = _read_trust_state(path)
        before = state.model_dump(mode="json", by_alias=True)
        yield state
        after = state.model_dump(mode="json", by_alias=True)
        if after != before:
            write_json(path, after)


@contextmanager
def _locked() -> Iterator[None]:
    path = _trust_state_path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _settled(read: Callable[[str], Found], federation_id: str) -> Found:
    """What `read` finds; if pin and file disagree, because another process is writing them, once it has finished."""
    try:
        return read(federation_id)
    except ConfigError:
        with _locked():
            return read(federation_id)


def _keep(path: Path, envelope: bytes) -> None:
    if not path.is_file() or path.read_bytes() != envelope:
        write_atomic(path, envelope)


def _read_trust_state(path: Path) -> TrustState:
    if not path.exists():
        return TrustState(schema="fedcompose/trust-state/v1", federations={}, revocations={})
    try:
        return TrustState.model_validate(read_json(path))
    except (ValidationError, RefusedError) as error:
        raise ConfigError(
            "TRUST_STATE_INVALID",
            f"{path} is damaged, or another version of fedcompose wrote it",
            fix="restore it from a backup; or move it away, and accept the newest federation file and revocation list "
            "once more: fedcompose federation accept FILE... --root-fingerprint FINGERPRINT",
        ) from error


def _damaged(path: Path, what: str) -> ConfigError:
    return ConfigError(
        "TRUST_STATE_INVALID",
        f"{path} cannot be read, or is not the {what} that was accepted",
        fix=f"restore it from a backup; or: fedcompose federation accept FILE, with the current {what}",
    )


def _home() -> Path:
    return Path(os.environ.get("FEDCOMPOSE_HOME") or Path.home() / ".fedcompose")


def _trust_state_path() -> Path:
    return _home() / "trust-state.json"


def _place(kind: str, federation_id: str) -> Path:
    """Where the accepted file of a federation lies, under the number in its id."""
    return _home() / kind / f"{federation_id.removeprefix('urn:uuid:')}.json"
