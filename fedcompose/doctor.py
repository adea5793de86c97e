"""What may be wrong with a site's or a coordinator's machine: each check is a function that finds something.

Nothing is changed and nothing is sent but one request without content to the coordinator's own listener. A finding
says what was found and, if that is not well, what to do; keys are looked at from outside (modes, fingerprints) and
never opened.
"""

from __future__ import annotations

import fcntl
import http.client
import shutil
import ssl
import stat
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from cryptography import x509
from pydantic import BaseModel, ConfigDict, ValidationError

from fedcompose.bases import cache_dir, resolve_base
from fedcompose.document import format_time
from fedcompose.errors import FedcomposeError
from fedcompose.federation import Federation
from fedcompose.federation_file import claimed_federation, read_federation
from fedcompose.files import MAX_JSON_BYTES, read_limited
from fedcompose.invitation import INVITATION_FILE, MAX_INVITATION_BYTES, read_invitation
from fedcompose.leftovers import leftovers, processes
from fedcompose.signers import outside_signer
from fedcompose.signing import keyid_of
from fedcompose.trust_state import accepted_federation

State = Literal["ok", "note", "bad"]
Role = Literal["site", "coordinator"]

DISTRIBUTIONS = ("fedcompose", "fedcompose-client", "fedcompose-coordinator")
FLOWER = "1.41."  # the internals that we use are those of this version
MIN_PYTHON = (3, 11)
DISK_BAD_BYTES = 1 << 30  # less does not hold one expert's checkpoints beside a contribution
DISK_NOTE_BYTES = 5 << 30
SOON = timedelta(days=14)  # time enough to have a file signed anew
SKEW_NOTE = timedelta(seconds=60)
SKEW_BAD = timedelta(minutes=5)  # Flower refuses requests that were signed too long ago by the other side's clock
PROBE_TIMEOUT_S = 10
MAX_KEY_BYTES = 16_384
SETTINGS: dict[Role, str] = {"site": "site.toml", "coordinator": "coordinator.toml"}
RENEW = "stop, fedcompose coordinator invite, start again, and send the invitation to the sites"
GATE_STATUS = 403  # what the coordinator's listener answers to everything but the fleet

LOCK = "start.pid"  # held by a coordinator that listens


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    state: State
    found: str
    fix: str | None = None


class Listen(BaseModel):
    """Where a coordinator listens."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    port: int = 9443
    names: tuple[str, ...] = ("127.0.0.1",)


class Shared(BaseModel):
    """What a site's and a coordinator's settings have in common; the roles themselves check the rest."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str
    base: str
    key: str
    node_key: Path | None = None
    federation: Path = Path("federation.json")
    listen: Listen = Listen()


@dataclass(frozen=True)
class Patient:
    """The folder under examination."""

    role: Role
    folder: Path
    settings: Shared
    federation: Federation | None
    now: datetime


Check = Callable[[Patient], Iterator[Finding]]


def examine(site: Path | None, home: Path | None, now: datetime) -> list[Finding]:
    """Everything that is found on this machine, in this site's and in this coordinator's folder."""
    found = list(check_versions())
    folders: tuple[tuple[Role, Path | None], ...] = (("site", site), ("coordinator", home))
    for role, folder in folders:
        if folder is not None:
            found += _examine_folder(role, folder, now)
    if site is None and home is None:
        found += check_disk(cache_dir())
    return found


def _examine_folder(role: Role, folder: Path, now: datetime) -> list[Finding]:
    try:
        settings = read_shared(folder / SETTINGS[role])
    except FedcomposeError as error:
        return [_bad("settings", error)]
    except (OSError, tomllib.TOMLDecodeError, ValidationError):
        fix = f"fedcompose {'client' if role == 'site' else role} init, or correct {SETTINGS[role]}"
        return [Finding("settings", "bad", f"no usable {SETTINGS[role]} in {folder}", fix)]
    federation, found = check_federation(folder / settings.federation, now)
    patient = Patient(role, folder, settings, federation, now)
    for check in CHECKS[role]:
        try:
            found += check(patient)
        except FedcomposeError as error:
            found.append(_bad(check.__name__.removeprefix("check_").replace("_", " "), error))
    return found


def read_shared(path: Path) -> Shared:
    return Shared.model_validate(tomllib.loads(read_limited(path, MAX_JSON_BYTES).decode()))


def _bad(check: str, error: FedcomposeError, otherwise: str | None = None) -> Finding:
    return Finding(check, "bad", f"{error.code}: {error.what}", error.fix or otherwise)


# The machine --------------------------------------------------------------------------------------


def check_versions() -> Iterator[Finding]:
    """Python, our distributions, which must be of one version, and Flower."""
    here = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", "ok" if sys.version_info >= MIN_PYTHON else "bad", here, None)
    own = {name: found for name in DISTRIBUTIONS if (found := _version(name))}
    listed = ", ".join(f"{name} {found}" for name, found in own.items())
    agree = len(set(own.values())) == 1
    fix = None if agree else "pip install " + " ".join(f"{name}=={own['fedcompose']}" for name in own)
    yield Finding("versions", "ok" if agree else "bad", listed, fix)
    flower = _version("flwr")
    if flower is not None:
        good = flower.startswith(FLOWER)
        yield Finding("flower", "ok" if good else "bad", flower, None if good else f"pip install 'flwr=={FLOWER}*'")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def check_disk(folder: Path) -> Iterator[Finding]:
    existing = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    free = shutil.disk_usage(existing).free
    state: State = "bad" if free < DISK_BAD_BYTES else "note" if free < DISK_NOTE_BYTES else "ok"
    fix = None if state == "ok" else "make room: an interrupted step goes on, but it must be able to write"
    yield Finding("disk", state, f"{free / 1e9:.1f} GB free at {existing}", fix)


def check_folder_disk(patient: Patient) -> Iterator[Finding]:
    yield from check_disk(patient.folder)


# What the folder trusts ---------------------------------------------------------------------------


def check_federation(path: Path, now: datetime) -> tuple[Federation | None, list[Finding]]:
    """The federation that counts on this machine, and what there is to say about the file in the folder."""
    try:
        envelope = read_limited(path, MAX_JSON_BYTES)
        newest = accepted_federation(claimed_federation(envelope))
        federation, _ = read_federation(envelope)
    except FedcomposeError as error:
        return None, [_bad("federation", error, "get the newest federation file, and put it there")]
    name = f"{federation.name!a} version {federation.version}"
    if newest is None:
        fix = "compare the roots' fingerprints by phone; the first command that needs one takes --root-fingerprint"
        return federation, [Finding("federation", "bad", f"{name} was never accepted on this machine", fix)]
    if federation.version < newest.version:
        found = f"{name} is in the folder, version {newest.version} was seen"
        return newest, [Finding("federation", "bad", found, "get the newest federation file")]
    state, left = _left(newest.expires, now)
    sign = None if state == "ok" else "have the roots sign the next version: fedcompose federation --help"
    return newest, [Finding("federation", state, f"{name}, {left}", sign)]


def _left(end: datetime, now: datetime) -> tuple[State, str]:
    if end <= now:
        return "bad", f"expired {format_time(end)}"
    return ("note" if end - now < SOON else "ok"), f"until {format_time(end)}"


def check_base(patient: Patient) -> Iterator[Finding]:
    base = resolve_base(patient.settings.base)
    known = {entry.dir_hash: entry.name for entry in patient.federation.base_models} if patient.federation else {}
    if base.digest in known or patient.federation is None:
        yield Finding("base", "ok", f"{patient.settings.base} {base.digest[:16]}")
        return
    fix = f"fedcompose base pull {patient.settings.base} with the federation's library versions, or name another base"
    expected = ", ".join(digest[:16] for digest in known)
    yield Finding("base", "bad", f"{patient.settings.base} is {base.digest[:16]}, the federation's {expected}", fix)


def check_key(patient: Patient) -> Iterator[Finding]:
    """The signing key: nobody else may read it, and it must count now."""
    settings, folder = patient.settings, patient.folder
    outside = outside_signer(settings.key, folder)
    path = folder / settings.key
    if outside is None:
        yield from check_private("key", path)
    public = path.with_suffix(".pub")
    if outside is None and not public.is_file():
        yield Finding("enrolment", "note", f"no {public.name} beside the key to compare", None)
        return
    keyid = outside.keyid if outside else keyid_of(read_limited(public, MAX_KEY_BYTES))
    if patient.federation is None:
        return
    holder = patient.federation.site_key if patient.role == "site" else patient.federation.coordinator_key
    member, key = holder(keyid, patient.now)
    if member.id != settings.id:
        yield Finding("enrolment", "bad", f"the key is {member.id}'s", f"correct `id` in {SETTINGS[patient.role]}")
        return
    state, left = _left(key.not_after, patient.now)
    fix = None if state == "ok" else "fedcompose keys rotate --help"
    yield Finding("enrolment", state, f"{member.id}, key {keyid[:16]}, {left}", fix)


def check_node_key(patient: Patient) -> Iterator[Finding]:
    """The key by which the coordinator's listener knows this site's node."""
    settings = patient.settings
    path = patient.folder / (settings.node_key or Path("keys") / f"{settings.id}.node.key")
    if not path.exists():
        fix = f"fedcompose keys new {settings.id} --role site ..., and have the roots enrol it"
        yield Finding("node key", "note", f"no {path.name}: this site can carry files by hand only", fix)
        return
    yield from check_private("node key", path)


def check_private(check: str, path: Path) -> Iterator[Finding]:
    """A file that is its owner's alone, in a folder that nobody else writes to."""
    if not path.is_file():
        yield Finding(check, "bad", f"{path} is not there", "fedcompose keys new --help, or correct `key`")
    elif path.stat().st_mode & 0o077:
        yield Finding(check, "bad", f"others may use {path}", f"chmod 600 {path}")
    elif path.parent.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        yield Finding(check, "bad", f"others may write into {path.parent}", f"chmod 700 {path.parent}")
    else:
        yield Finding(check, "ok", f"{path}, for its owner alone")


# The line to the coordinator ----------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a listener answered: its status, the time by its clock, and when its certificate ends."""

    status: int
    date: datetime | None
    certificate_ends: datetime


def probe(host: str, port: int, ca_pem: bytes) -> Answer:
    """Ask a listener for something that it must not answer, over TLS, believing `ca_pem` alone."""
    context = ssl.create_default_context(cadata=ca_pem.decode())
    connection = http.client.HTTPSConnection(host, port, timeout=PROBE_TIMEOUT_S, context=context)
    connection.connect()
    try:
        certificate = x509.load_der_x509_certificate(connection.sock.getpeercert(binary_form=True) or b"")
        connection.request("GET", "/health")
        response = connection.getresponse()
        date = response.getheader("Date")
        sent = parsedate_to_datetime(date) if date else None
        return Answer(response.status, sent, certificate.not_valid_after_utc)
    finally:
        connection.close()


def check_coordinator(patient: Patient) -> Iterator[Finding]:
    """Whether this site reaches the coordinator that invited it."""
    path = patient.folder / INVITATION_FILE
    if not path.exists():
        fix = "get the coordinator's invitation: fedcompose client join INVITATION"
        yield Finding("invitation", "note", "none: this site can carry files by hand only", fix)
    elif patient.federation is not None:
        invitation = read_invitation(read_limited(path, MAX_INVITATION_BYTES), patient.federation, patient.now)
        host, _, port = invitation.address.rpartition(":")
        yield from check_line(host.strip("[]"), int(port), invitation.ca_pem, "ask for a new invitation")


def check_listener(patient: Patient) -> Iterator[Finding]:
    """The coordinator's own certificate and, if it listens, what it answers under the name that it invites to."""
    tls, listen = patient.folder / "tls", patient.settings.listen
    if not (tls / "server.pem").is_file():
        fix = "fedcompose coordinator invite makes one"
        yield Finding("certificate", "note", "none: sites can carry files by hand only", fix)
        return
    yield from check_private("certificate's key", tls / "server.key")
    if is_running(patient.folder):
        yield from check_line(listen.names[0], listen.port, (tls / "ca.pem").read_bytes(), RENEW)
    else:
        ends = x509.load_pem_x509_certificate((tls / "server.pem").read_bytes()).not_valid_after_utc
        yield _certificate(ends, patient.now, RENEW)
        yield Finding("listener", "note", "not running", "fedcompose coordinator start")


def check_line(host: str, port: int, ca_pem: bytes, renew: str) -> Iterator[Finding]:
    """Whether a listener is there, is the right one, passes the fleet only, and has the same time."""
    where = f"{host} port {port}"
    try:
        answer = probe(host, port, ca_pem)
    except ssl.SSLCertVerificationError as error:
        yield Finding("certificate", "bad", f"{where}: {error.verify_message}", renew)
        return
    except (OSError, http.client.HTTPException) as error:
        fix = "check the address, the firewall, and whether `fedcompose coordinator start` runs there"
        yield Finding("reachability", "bad", f"{where}: {type(error).__name__}", fix)
        return
    now = datetime.now(UTC)
    yield Finding("reachability", "ok", where)
    yield _certificate(answer.certificate_ends, now, renew)
    if answer.status != GATE_STATUS:
        fix = "let others reach only what `fedcompose coordinator start` listens on; a proxy passes /v1/fleet/ alone"
        yield Finding("gate", "bad", f"{where} answers more than the fleet ({answer.status})", fix)
    if answer.date is not None:
        yield clock(now - answer.date)


def clock(ahead: timedelta) -> Finding:
    """What it means that this machine's clock is so much ahead of the other side's."""
    apart = abs(ahead)
    state: State = "bad" if apart > SKEW_BAD else "note" if apart > SKEW_NOTE else "ok"
    fix = None if state == "ok" else "set the clock of the machine that is wrong (timedatectl set-ntp true)"
    way = "ahead of" if ahead > timedelta() else "behind"
    return Finding("clock", state, f"{apart.total_seconds():.0f} s {way} the coordinator's", fix)


def _certificate(ends: datetime, now: datetime, renew: str) -> Finding:
    state, left = _left(ends, now)
    return Finding("certificate", state, left, None if state == "ok" else renew)


def is_running(home: Path) -> bool:
    """Whether somebody holds the lock of this coordinator's folder."""
    try:
        with (home / LOCK).open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True


def check_leftovers(patient: Patient) -> Iterator[Finding]:
    left = leftovers(patient.folder, processes())
    for process in left:
        yield Finding("processes", "bad", f"process {process.pid} is left over", f"kill {process.pid}")
    if not left:
        yield Finding("processes", "ok", "none is left over")


CHECKS: dict[Role, tuple[Check, ...]] = {
    "site": (check_base, check_key, check_node_key, check_coordinator, check_folder_disk, check_leftovers),
    "coordinator": (check_base, check_key, check_listener, check_folder_disk, check_leftovers),
}
