"""The site's side of Flower: six actions, answered from the site's own folder.

A message chooses one of the actions and names one of the site's own domains; nothing in it becomes a path, a
command or a module. Only the files of a contribution that the site's people had signed for a call ever leave,
only to whoever holds the nonce of that call, and only while that call is collected and not refused. What a call may
set going is for the site to say: `[calls] decide` in site.toml, and `fedcompose client approve`.

Nothing is answered here: what an action returns, the egress broker (`egress.py`) checks, writes down and hands over.
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
from fedcompose.delivery import MAX_RECEIPT_BYTES, read_receipt
from fedcompose.errors import FedcomposeError, RefusedError
from fedcompose.federation import Federation
from fedcompose.files import MAX_JSON_BYTES, read_limited
from fedcompose.trust_state import trusted_federation
from fedcompose.wire import ClientApp, Context, Description, Message, RecordDict, Status
from fedcompose_client import egress
from fedcompose_client.config import SiteConfig, load_config
from fedcompose_client.egress import Announced, Code, Outgoing, Window
from fedcompose_client.egress_ledger import keep_receipt
from fedcompose_client.jobs import Decision, Job, call_path, decide, keep, read_job

log = logging.getLogger(__name__)

PROGRESS_TAIL_BYTES = 64 * 1024

DECISIONS: Mapping[str, Decision] = {"run": "approved", "refuse": "refused"}  # what site.toml may decide beforehand


class SiteApp(ClientApp):
    """A ClientApp with a closed list of actions, whose errors leave as codes."""

    def __init__(self, folder: Path, clock: Callable[[], datetime]) -> None:
        super().__init__()
        self._folder = folder
        self._clock = clock

    @property
    def site(self) -> str:
        """The name of the site whose folder this is."""
        return load_config(self._folder).id

    def __call__(self, message: Message, context: Context) -> Message:
        """The answer to one message, whatever happens; without a ledger to write it into there is none.

        Raises: SilenceError.
        """
        try:
            return Message(self._answer(message), reply_to=message)
        except Exception:  # the outermost frame of a site: what passes here, Flower sends to the other side as text
            log.exception("nothing can be answered")
        raise SilenceError

    def refuse(self, message: Message, code: str) -> Message:
        """An answer to a message that is not looked at.

        Raises: RefusedError, MissingError: when the ledger cannot be written.
        """
        return Message(egress.send(self._folder, Code(code), self._clock()), reply_to=message)

    def _answer(self, message: Message) -> RecordDict:
        folder, now = self._folder, self._clock()
        try:
            act = ANSWERS.get(message.metadata.message_type)
            if act is None:
                raise RefusedError("ACTION_UNKNOWN", "not one of the actions of a site")
            return egress.send(folder, act(folder, wire.read_request(message.content), now), now)
        except FedcomposeError as error:
            level = logging.INFO if error.code == wire.NOT_READY else logging.WARNING
            log.log(level, "refused an action", extra={"code": error.code})
            return egress.send(folder, Code(error.code), now)
        except Exception:
            log.exception("an action failed")
            return egress.send(folder, Code(egress.SITE_ERROR), now)


class SilenceError(Exception):
    """A message stays without an answer. It has no text, for Flower would send it."""


def make_app(site: Path, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> SiteApp:
    """The ClientApp of the site in this folder."""
    return SiteApp(site, clock)


# The six actions ----------------------------------------------------------------------------------


def describe(folder: Path, fields: Mapping[str, Any], now: datetime) -> Outgoing:
    """Which protocol, which version of fedcompose, and the site's name."""
    return Description(wire.PROTOCOL, fedcompose.__version__, load_config(folder).id)


def answer_call(folder: Path, fields: Mapping[str, Any], now: datetime) -> Outgoing:
    """Keep a call, and say what has become of it; the same call may come again."""
    job = accept_call(folder, wire.raw(fields, "call", MAX_CALL_BYTES), now)
    return job_status(folder, job, job.call.domain_of(load_config(folder).id))


def tell_status(folder: Path, fields: Mapping[str, Any], now: datetime) -> Outgoing:
    """How far the call is, in one word and three numbers."""
    return job_status(folder, *_open_job(folder, fields, now))


def make_offer(folder: Path, fields: Mapping[str, Any], now: datetime) -> Outgoing:
    """The list of the files that were signed for the call."""
    job, domain = _open_job(folder, fields, now)
    return Announced(job.call.id, domain)


def hand_over(folder: Path, fields: Mapping[str, Any], now: datetime) -> Outgoing:
    """One window of the bytes of an offer."""
    job, domain = _open_job(folder, fields, now)
    wanted = wire.text(fields, "offer", wire.SHA256)
    start = wire.integer(fields, "start", 0, wire.MAX_STREAM_BYTES)
    return Window(job.call.id, domain, wanted, start, wire.integer(fields, "length", 1, wire.WINDOW_BYTES))


def take_receipt(folder: Path, fields: Mapping[str, Any], now: datetime) -> Outgoing:
    """Keep the coordinator's receipt for what it has fetched.

    Raises: RefusedError: `DELIVERY_INVALID`, and what `keep_receipt` raises.
    """
    job, _ = _open_job(folder, fields, now)
    config = load_config(folder)
    envelope = wire.raw(fields, "receipt", MAX_RECEIPT_BYTES)
    receipt = read_receipt(envelope, _federation(folder, config, now))
    if (receipt.site, receipt.call) != (config.id, job.call.id):
        raise RefusedError("DELIVERY_INVALID", "the receipt is for another site or another call")
    keep_receipt(folder, envelope, receipt)
    return Code(wire.ACCEPTED)


ANSWERS: Mapping[str, Callable[[Path, Mapping[str, Any], datetime], Outgoing]] = {
    wire.message_type("describe"): describe,
    wire.message_type("call"): answer_call,
    wire.message_type("status"): tell_status,
    wire.message_type("offer"): make_offer,
    wire.message_type("fetch"): hand_over,
    wire.message_type("receipt"): take_receipt,
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
    except OSError:
        return []
    lines = [line for text in tail[1 if skipped else 0 : -1] if (line := _line(text))]  # no cut or half written line
    return [line for line in lines if line.get("stage") == lines[-1].get("stage")]


def _line(text: bytes) -> dict[str, Any]:
    """One line; an empty one for what a full disk or a power cut left of it."""
    try:
        line = json.loads(text)
    except ValueError:
        return {}
    return line if isinstance(line, dict) else {}


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
