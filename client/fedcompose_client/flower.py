"""The site's side of Flower: three actions, answered from the site's own folder.

A message chooses one of the actions and names one of the site's own domains; nothing in it becomes a path, a
command or a module. Only the files of a contribution that the site's people put into `outbox/` ever leave,
only to whoever holds the nonce of a call that the site accepted, and only while that call is collected.
Errors leave as codes, never as text, for a text could quote data; the reason is in the site's own log.

Deliberately absent: starting a training from afar (the site's people do that), and Flower's run config (the
other side writes it).
"""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedcompose import wire
from fedcompose.bases import resolve_base
from fedcompose.call import (
    COLLECTION_PERIOD,
    MAX_CALL_BYTES,
    Call,
    check_history,
    check_shape,
    read_own_call,
    verify_call,
)
from fedcompose.contribution import REQUIRED
from fedcompose.errors import FedcomposeError, RefusedError
from fedcompose.federation import Federation
from fedcompose.files import MAX_JSON_BYTES, read_limited, write_atomic
from fedcompose.trust_state import trusted_federation
from fedcompose.wire import ClientApp, Context, Message, Part, RecordDict, Slice, Status
from fedcompose_client.config import SiteConfig, load_config

log = logging.getLogger(__name__)

SITE_DIR = "site-dir"  # in the SuperNode's own `--node-config`, which the other side neither sees nor sets
PROGRESS_TAIL_BYTES = 64 * 1024

# Every code that may leave; any other error leaves as SITE_ERROR.
REFUSALS = frozenset(
    {
        "ACTION_UNKNOWN", "BASE_NOT_FOUND", "CALL_BASE", "CALL_COORDINATOR", "CALL_EXPIRED", "CALL_FEDERATION",
        "CALL_ID_TAKEN", "CALL_INVALID", "CALL_POLICY", "CALL_SHAPE", "CALL_SITE", "CALL_UNKNOWN", "DOMAIN_UNKNOWN",
        "ENVELOPE_INVALID", "ENVELOPE_KEY", "ENVELOPE_SHAPE", "ENVELOPE_TYPE", "FEDERATION_EXPIRED", "KEY_EXPIRED",
        "KEY_REVOKED", "LEDGER_FORKED", "LEDGER_SHRUNK", "MESSAGE_INVALID", wire.NOT_READY, "TRUST_ROOT_UNKNOWN",
    }
)  # fmt: skip
SITE_ERROR = "SITE_ERROR"


class SiteApp(ClientApp):
    """A ClientApp with a closed list of actions, whose errors leave as codes.

    Without a folder it takes the one in the SuperNode's own `--node-config`.
    """

    def __init__(self, folder: Path | None, clock: Callable[[], datetime]) -> None:
        super().__init__()
        self._folder = folder
        self._clock = clock

    @property
    def site(self) -> str:
        """The name of the site whose folder this is."""
        return load_config(self._folder or Path()).id

    def __call__(self, message: Message, context: Context) -> Message:
        return Message(self._answer(message, context), reply_to=message)

    def _answer(self, message: Message, context: Context) -> RecordDict:
        """The answer to one message, whatever happens."""
        try:
            act = ACTIONS.get(message.metadata.message_type)
            if act is None:
                raise RefusedError("ACTION_UNKNOWN", "not one of the actions of a site")
            folder = self._folder or Path(str(context.node_config[SITE_DIR]))
            return act(folder, wire.read_request(message.content), self._clock())
        except FedcomposeError as error:
            level = logging.INFO if error.code == wire.NOT_READY else logging.WARNING
            log.log(level, "refused an action: %s", error.diagnostics())
            return wire.answer(error.code if error.code in REFUSALS else SITE_ERROR)
        except Exception:  # the outermost frame of a site: what passes here, Flower sends to the other side as text
            log.exception("an action failed")
            return wire.answer(SITE_ERROR)


def make_app(site_dir: Path | None, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> SiteApp:
    """The ClientApp of the site in `site_dir`, or of the one that a SuperNode's `site-dir` names."""
    return SiteApp(site_dir, clock)


app = make_app(None)  # what a SuperNode runs


# The three actions --------------------------------------------------------------------------------


def accept_call(folder: Path, fields: Mapping[str, Any], now: datetime) -> RecordDict:
    """Check a call as far as this site can, and keep it in `calls/` for `fedcompose client contribute`.

    The same call may come again. Calls are kept for good: they hold the heads of the coordinator's ledger.

    Raises: RefusedError: `CALL_BASE` (this site builds on another base), `CALL_SHAPE` (it trains other LoRAs than the
        call asks for: better known before the training), `CALL_ID_TAKEN` (another call has this id),
        and all that `verify_call` and `check_history` raise. ConfigError: `DOMAIN_UNKNOWN`.
    """
    envelope = wire.raw(fields, "call", MAX_CALL_BYTES)
    config = load_config(folder)
    call = verify_call(envelope, _federation(folder, config, now), config.id, now)
    training = config.domain(call.domain_of(config.id)).training
    if "adapter" in call.want:
        check_shape(call, training.rank, training.targets)
    if resolve_base(config.base).digest != call.base.dir_hash:
        raise RefusedError("CALL_BASE", f"the call is for the base {call.base.name!a}, and this site builds on another")
    path = _call_path(folder, call.id)
    if path.exists() and read_limited(path, MAX_CALL_BYTES) != envelope:
        raise RefusedError("CALL_ID_TAKEN", f"another call {call.id} was accepted before")
    kept = (read_own_call(read_limited(each, MAX_CALL_BYTES)) for each in path.parent.glob("*.json"))
    check_history([call, *(each for each in kept if each.id != call.id)])
    write_atomic(path, envelope)
    return wire.answer(wire.ACCEPTED)


def tell_status(folder: Path, fields: Mapping[str, Any], now: datetime) -> RecordDict:
    """How far the called domain is, in one word and three numbers."""
    _, domain = _open_call(folder, fields, now)
    return wire.status_answer(read_status(folder, domain))


def hand_over(folder: Path, fields: Mapping[str, Any], now: datetime) -> RecordDict:
    """The list of the contribution's files, and one window of their bytes.

    Raises: RefusedError: `NOT_READY`, or what `_open_call` raises.
    """
    call, domain = _open_call(folder, fields, now)
    start = wire.integer(fields, "start", 0, wire.MAX_STREAM_BYTES)
    length = wire.integer(fields, "length", 1, wire.WINDOW_BYTES)
    outbox = folder / "outbox" / domain
    parts = _outbox_parts(outbox, call)
    slices = wire.plan(parts, start, length)
    return wire.contribution_answer(parts, {piece.part.name: _read_slice(outbox, piece) for piece in slices})


ACTIONS: Mapping[str, Callable[[Path, Mapping[str, Any], datetime], RecordDict]] = {
    wire.message_type("call"): accept_call,
    wire.message_type("status"): tell_status,
    wire.message_type("contribution"): hand_over,
}


def _open_call(folder: Path, fields: Mapping[str, Any], now: datetime) -> tuple[Call, str]:
    """The accepted call whose nonce the message knows, and the domain it asks for at this site.

    Raises: RefusedError: `CALL_UNKNOWN` (an id or a nonce that fits no accepted call), `DOMAIN_UNKNOWN`, and all
        that `verify_call` raises, say because the federation has changed or the time for collecting is over.
    """
    path = _call_path(folder, wire.text(fields, "call_id", wire.NAME))
    nonce, wanted = wire.text(fields, "nonce", wire.SHA256), fields.get("domain")
    if not path.is_file():
        raise RefusedError("CALL_UNKNOWN", "no such call was accepted")
    config = load_config(folder)
    federation = _federation(folder, config, now)
    call = verify_call(read_limited(path, MAX_CALL_BYTES), federation, config.id, now, grace=COLLECTION_PERIOD)
    if not hmac.compare_digest(call.nonce, nonce):
        raise RefusedError("CALL_UNKNOWN", "the nonce is not that of the call")
    domain = call.domain_of(config.id)
    if wanted != domain or domain not in config.domains:
        raise RefusedError("DOMAIN_UNKNOWN", "the call is not for this domain")
    return call, domain


def _call_path(folder: Path, call_id: str) -> Path:
    return folder / "calls" / f"{call_id}.json"


def _federation(folder: Path, config: SiteConfig, now: datetime) -> Federation:
    """The site's own federation file, against the roots that this machine has pinned."""
    return trusted_federation(read_limited(folder / config.federation, MAX_JSON_BYTES), None, now)


# Status -------------------------------------------------------------------------------------------


def read_status(folder: Path, domain: str) -> Status:
    """How far a domain of this site is, read from what its commands have written so far.

    `training` means that a training has begun; whether it still runs, only the site knows.
    """
    if (folder / "outbox" / domain / "adapter" / "model.sig").is_file():
        return Status("ready")
    run = folder / "runs" / domain
    if (run / "result.json").is_file():
        return Status("trained")
    lines = _stage_lines(run / "progress.jsonl")
    if not lines:
        return Status("idle")
    step, steps = (_count(lines[-1], name, wire.MAX_STEPS) for name in ("step", "steps"))
    return Status("training", step, steps, _eta_s(lines))


def _stage_lines(path: Path) -> list[dict[str, Any]]:
    """The newest lines of a progress file, all of its last stage; the file may be absent or still growing."""
    try:
        with path.open("rb") as stream:
            skipped = max(0, os.fstat(stream.fileno()).st_size - PROGRESS_TAIL_BYTES)
            stream.seek(skipped)
            tail = stream.read(PROGRESS_TAIL_BYTES).split(b"\n")
        lines = [json.loads(line) for line in tail[1 if skipped else 0 : -1]]  # no cut or half written line
    except (OSError, ValueError):
        return []
    lines = [line for line in lines if isinstance(line, dict)]
    return [line for line in lines if line.get("stage") == lines[-1].get("stage")]


def _eta_s(lines: Sequence[Mapping[str, Any]]) -> int:
    """Seconds to the end of the stage at the pace of these lines; -1 where they do not tell."""
    first, last = lines[0], lines[-1]
    try:
        pace_s = (last["time"] - first["time"]) / (last["step"] - first["step"])
        return _count({"eta_s": pace_s * (last["steps"] - last["step"])}, "eta_s", wire.MAX_ETA_S)
    except (KeyError, TypeError, ZeroDivisionError):
        return -1


def _count(fields: Mapping[str, Any], name: str, most: int) -> int:
    """A number that may leave, as a whole one; -1 where there is none."""
    value = fields.get(name)
    return int(value) if isinstance(value, int | float) and 0 <= value <= most else -1


# Contribution -------------------------------------------------------------------------------------


def _outbox_parts(outbox: Path, call: Call) -> list[Part]:
    """The files of every wanted kind that has a signature; names outside the closed list never leave.

    Raises: RefusedError: `NOT_READY`.
    """
    kinds = [kind for kind in call.want if (outbox / kind / "model.sig").is_file()]
    required = {f"{kind}/{name}" for kind in kinds for name in REQUIRED[kind]}
    present = [name for name in wire.part_limits(kinds) if os.path.lexists(outbox / name)]
    if not kinds or not required <= set(present):
        raise RefusedError(wire.NOT_READY, "there is no whole signed contribution in the outbox")
    return [_part(outbox, name) for name in present]


def _part(outbox: Path, name: str) -> Part:
    with _open_file(outbox / name) as stream:
        return Part(name, os.fstat(stream.fileno()).st_size, hashlib.file_digest(stream, "sha256").hexdigest())


def _read_slice(outbox: Path, piece: Slice) -> bytes:
    with _open_file(outbox / piece.part.name) as stream:
        stream.seek(piece.offset)
        return stream.read(piece.length)


def _open_file(path: Path) -> io.BufferedReader:
    """A file of the outbox; never what a link in it points to."""
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
