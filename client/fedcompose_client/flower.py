"""The site's side of Flower: five actions, answered from the site's own folder.

A message chooses one of the actions and names one of the site's own domains; nothing in it becomes a path, a
command or a module. Only the files of a contribution that the site's people had signed for a call ever leave,
only to whoever holds the nonce of that call, and only while that call is collected and not refused. What a call may
set going is for the site to say: `[calls] decide` in site.toml, and `fedcompose client approve`.

Errors leave as codes, never as text, for a text could quote data; the reason is in the site's own log. Flower's run
config, which the other side writes, is not read.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fedcompose
from fedcompose import wire
from fedcompose.bases import resolve_base
from fedcompose.call import COLLECTION_PERIOD, MAX_CALL_BYTES, check_shape, verify_call
from fedcompose.errors import FedcomposeError, RefusedError
from fedcompose.federation import Federation
from fedcompose.files import MAX_JSON_BYTES, read_limited
from fedcompose.trust_state import trusted_federation
from fedcompose.wire import ClientApp, Context, Description, Message, Part, RecordDict, Status
from fedcompose_client.config import SiteConfig, load_config
from fedcompose_client.jobs import Decision, Job, call_path, decide, keep, read_job
from fedcompose_client.offer import outbox_parts, read_slice

log = logging.getLogger(__name__)

SITE_DIR = "site-dir"  # in the SuperNode's own `--node-config`, which the other side neither sees nor sets
PROGRESS_TAIL_BYTES = 64 * 1024

# Every code that may leave; any other error leaves as SITE_ERROR.
REFUSALS = frozenset(
    {
        "ACTION_UNKNOWN", "BASE_NOT_FOUND", "CALL_BASE", "CALL_COORDINATOR", "CALL_EXPIRED", "CALL_FEDERATION",
        "CALL_ID_TAKEN", "CALL_INVALID", "CALL_POLICY", "CALL_SHAPE", "CALL_SITE", "CALL_UNKNOWN", "DOMAIN_UNKNOWN",
        "ENVELOPE_INVALID", "ENVELOPE_KEY", "ENVELOPE_SHAPE", "ENVELOPE_TYPE", "FEDERATION_EXPIRED", "KEY_EXPIRED",
        "KEY_REVOKED", "LEDGER_FORKED", "LEDGER_SHRUNK", "MESSAGE_INVALID", wire.NOT_READY, wire.OFFER_CHANGED,
        "TRUST_ROOT_UNKNOWN",
    }
)  # fmt: skip
SITE_ERROR = "SITE_ERROR"
DECISIONS: Mapping[str, Decision] = {"run": "approved", "refuse": "refused"}  # what site.toml may decide beforehand


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
            act = ANSWERS.get(message.metadata.message_type)
            if act is None:
                raise RefusedError("ACTION_UNKNOWN", "not one of the actions of a site")
            folder = self._folder or Path(str(context.node_config[SITE_DIR]))
            return act(folder, wire.read_request(message.content), self._clock())
        except FedcomposeError as error:
            level = logging.INFO if error.code == wire.NOT_READY else logging.WARNING
            log.log(level, "refused an action", extra={"code": error.code})
            return wire.answer(error.code if error.code in REFUSALS else SITE_ERROR)
        except Exception:  # the outermost frame of a site: what passes here, Flower sends to the other side as text
            log.exception("an action failed")
            return wire.answer(SITE_ERROR)


def make_app(site_dir: Path | None, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> SiteApp:
    """The ClientApp of the site in `site_dir`, or of the one that a SuperNode's `site-dir` names."""
    return SiteApp(site_dir, clock)


app = make_app(None)  # what a SuperNode runs


# The five actions ---------------------------------------------------------------------------------


def describe(folder: Path, fields: Mapping[str, Any], now: datetime) -> RecordDict:
    """Which protocol, which version of fedcompose, and the site's name."""
    return wire.description_answer(Description(wire.PROTOCOL, fedcompose.__version__, load_config(folder).id))


def answer_call(folder: Path, fields: Mapping[str, Any], now: datetime) -> RecordDict:
    """Keep a call, and say what has become of it; the same call may come again."""
    job = accept_call(folder, wire.raw(fields, "call", MAX_CALL_BYTES), now)
    return wire.status_answer(job_status(folder, job, job.call.domain_of(load_config(folder).id)))


def tell_status(folder: Path, fields: Mapping[str, Any], now: datetime) -> RecordDict:
    """How far the call is, in one word and three numbers."""
    job, domain = _open_job(folder, fields, now)
    return wire.status_answer(job_status(folder, job, domain))


def make_offer(folder: Path, fields: Mapping[str, Any], now: datetime) -> RecordDict:
    """The list of the files that were signed for the call.

    Raises: RefusedError: `NOT_READY`, or what `_open_job` raises.
    """
    return wire.offer_answer(_offered(folder, *_open_job(folder, fields, now)))


def hand_over(folder: Path, fields: Mapping[str, Any], now: datetime) -> RecordDict:
    """One window of the bytes of an offer.

    Raises: RefusedError: `NOT_READY`, `OFFER_CHANGED`, or what `_open_job` raises.
    """
    job, domain = _open_job(folder, fields, now)
    wanted = wire.text(fields, "offer", wire.SHA256)
    start = wire.integer(fields, "start", 0, wire.MAX_STREAM_BYTES)
    length = wire.integer(fields, "length", 1, wire.WINDOW_BYTES)
    parts = _offered(folder, job, domain)
    if wire.offer_digest(parts) != wanted:
        raise RefusedError("OFFER_CHANGED", "another contribution has been signed for this call since")
    outbox = folder / "outbox" / domain
    slices = wire.plan(parts, start, length)
    return wire.window_answer({piece.part.name: read_slice(outbox, piece) for piece in slices})


ANSWERS: Mapping[str, Callable[[Path, Mapping[str, Any], datetime], RecordDict]] = {
    wire.message_type("describe"): describe,
    wire.message_type("call"): answer_call,
    wire.message_type("status"): tell_status,
    wire.message_type("offer"): make_offer,
    wire.message_type("fetch"): hand_over,
}


def accept_call(folder: Path, envelope: bytes, now: datetime) -> Job:
    """Check a call as far as this site can, keep it, and decide about it if site.toml does.

    Raises: RefusedError: `CALL_BASE` (this site builds on another base), `CALL_SHAPE` (it trains other LoRAs than the
        call asks for: better known before the training), and all that `verify_call` and `keep` raise.
        ConfigError: `DOMAIN_UNKNOWN`.
    """
    config = load_config(folder)
    call = verify_call(envelope, _federation(folder, config, now), config.id, now)
    training = config.domain(call.domain_of(config.id)).training
    if "adapter" in call.want:
        check_shape(call, training.rank, training.targets)
    if resolve_base(config.base).digest != call.base.dir_hash:
        raise RefusedError("CALL_BASE", f"the call is for the base {call.base.name!a}, and this site builds on another")
    job = keep(folder, call, envelope, now)
    decision = DECISIONS.get(config.calls.decide)
    return decide(folder, call.id, decision, now) if decision and job.state == "asked" else job


def _open_job(folder: Path, fields: Mapping[str, Any], now: datetime) -> tuple[Job, str]:
    """The job of the accepted call whose nonce the message knows, and the domain that the call asks for here.

    Raises: RefusedError: `CALL_UNKNOWN` (an id or a nonce that fits no accepted call), `DOMAIN_UNKNOWN`, and all
        that `verify_call` raises, say because the federation has changed or the time for collecting is over.
    """
    call_id = wire.text(fields, "call_id", wire.NAME)
    nonce, wanted = wire.text(fields, "nonce", wire.SHA256), fields.get("domain")
    if not call_path(folder, call_id).is_file():
        raise RefusedError("CALL_UNKNOWN", "no such call was accepted")
    job, config = read_job(folder, call_id), load_config(folder)
    federation = _federation(folder, config, now)
    call = verify_call(job.envelope, federation, config.id, now, grace=COLLECTION_PERIOD)
    if not hmac.compare_digest(call.nonce, nonce):
        raise RefusedError("CALL_UNKNOWN", "the nonce is not that of the call")
    domain = call.domain_of(config.id)
    if wanted != domain or domain not in config.domains:
        raise RefusedError("DOMAIN_UNKNOWN", "the call is not for this domain")
    return job, domain


def _offered(folder: Path, job: Job, domain: str) -> list[Part]:
    """What was signed for this call, if it still lies in the outbox as it was signed.

    Raises: RefusedError: `NOT_READY`.
    """
    if job.offer is None:
        raise RefusedError(wire.NOT_READY, f"the call is {job.state}")
    parts = outbox_parts(folder / "outbox" / domain, job.call.want)
    if wire.offer_digest(parts) != job.offer:
        raise RefusedError(wire.NOT_READY, "what lies in the outbox is not what was signed for this call")
    return parts


def _federation(folder: Path, config: SiteConfig, now: datetime) -> Federation:
    """The site's own federation file, against the roots that this machine has pinned."""
    return trusted_federation(read_limited(folder / config.federation, MAX_JSON_BYTES), None, now)


# Status -------------------------------------------------------------------------------------------


def job_status(folder: Path, job: Job, domain: str) -> Status:
    """How far a call is; while it trains, also the step, read from what the training has written so far."""
    if job.state != "training":
        return Status(job.state)
    lines = _stage_lines(folder / "runs" / domain / "progress.jsonl")
    if not lines:
        return Status("training")
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
