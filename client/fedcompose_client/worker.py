"""The site's worker: takes approved calls one after another and does what the owner would type.

    approved ── train ── distill, if the call wants traces and the domain has a generator ── contribute ── ready

Each step is a child process that goes on where an earlier one stopped, and each is written into the call's ledger when
it is done. So the worker, or a step, can be killed at any point: started again, it does the rest and nothing twice.
What the steps print goes into `calls/<id>.log`, which stays here. One worker works for a site at a time.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

from fedcompose.call import verify_call
from fedcompose.errors import ConfigError, FedcomposeError
from fedcompose.files import MAX_JSON_BYTES, parse_json, read_limited
from fedcompose.keys import PASSPHRASE_FILE_VARIABLE
from fedcompose.supervision import FIRST_PAUSE_S, LONGEST_PAUSE_S, Child, end, only_one, start
from fedcompose.trust_state import trusted_federation
from fedcompose_client.config import load_config
from fedcompose_client.jobs import Event, Job, jobs, read_job, record

log = logging.getLogger(__name__)

POLL_S = 0.5
WORKABLE = ("approved", "training", "trained")
NOTHING_TO_TRACE = "TRACES_NONE"  # the adapter is contributed without traces then
UNKNOWN = "UNEXPECTED"


def work(site: Path, stop: threading.Event, *, once: bool, passphrase_file: Path | None = None) -> None:
    """Do the work of approved calls, oldest first, until `stop` is set; with `once`, until there is none left.

    Raises: ConfigError: `ALREADY_RUNNING`.
    """
    with only_one(site / "calls" / "worker.pid"):
        while not stop.is_set():
            waiting = [job for job in jobs(site) if job.state in WORKABLE]
            if waiting:
                _do(site, waiting[0], stop, passphrase_file)
            elif once:
                return
            else:
                stop.wait(POLL_S)


def _do(site: Path, job: Job, stop: threading.Event, passphrase_file: Path | None) -> None:
    """The rest of one job, or its failure."""
    call_id = job.call.id
    try:
        domain, distills = _check(site, job)
        if "started" not in job.since_approval:
            _note(site, call_id, "started")
        if "trained" not in job.since_approval:
            _step(site, call_id, ["train", "--domain", domain], stop, passphrase_file)
            _note(site, call_id, "trained")
        if distills and "distilled" not in job.since_approval:
            _distill(site, call_id, domain, stop, passphrase_file)
        _step(site, call_id, ["contribute", "--domain", domain, "--call", call_id], stop, passphrase_file)
    except _EndedError:
        return
    except FedcomposeError as error:
        log.warning("a call failed", extra={"call": call_id, "code": error.code})
        record(site, call_id, "failed", datetime.now(UTC), code=error.code)


class _EndedError(Exception):
    """The worker was told to end, or the call was refused meanwhile."""


def _check(site: Path, job: Job) -> tuple[str, bool]:
    """The domain of a call that still counts, and whether traces are to be made for it.

    Raises: RefusedError: all that `verify_call` raises. ConfigError: `DOMAIN_UNKNOWN`.
    """
    config, now = load_config(site), datetime.now(UTC)
    federation = trusted_federation(read_limited(site / config.federation, MAX_JSON_BYTES), None, now)
    call = verify_call(job.envelope, federation, config.id, now)
    domain = call.domain_of(config.id)
    return domain, "traces" in call.want and config.domain(domain).traces is not None


def _distill(site: Path, call_id: str, domain: str, stop: threading.Event, passphrase_file: Path | None) -> None:
    try:
        _step(site, call_id, ["distill", "--domain", domain], stop, passphrase_file)
    except ConfigError as error:
        if error.code != NOTHING_TO_TRACE:
            raise
    _note(site, call_id, "distilled")


def _step(site: Path, call_id: str, arguments: list[str], stop: threading.Event, passphrase_file: Path | None) -> None:
    """Run one command of this site to its end; one that was killed is run again, after a while.

    Raises: ConfigError: under the command's own code, when it failed. _EndedError.
    """
    argv = [sys.executable, "-m", "fedcompose", "client", *arguments, "--site", str(site), "--json"]
    named = {PASSPHRASE_FILE_VARIABLE: str(passphrase_file)} if passphrase_file else {}
    pause_s = FIRST_PAUSE_S
    while (status := _run(Child(arguments[0], argv, named), site, call_id, stop)) is None:
        log.warning("a step was killed", extra={"call": call_id, "stage": arguments[0], "seconds": pause_s})
        if stop.wait(pause_s):
            raise _EndedError
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
    if status:
        raise ConfigError(status, f"the step {arguments[0]} failed", fix=f"what it said: calls/{call_id}.log")


def _run(child: Child, site: Path, call_id: str, stop: threading.Event) -> str | None:
    """Nothing if the command succeeded, its error's code if it failed; None when something killed it."""
    with (site / "calls" / f"{call_id}.log").open("ab") as said:
        process = start(child, subprocess.PIPE, said)
    output: list[bytes] = []
    reader = threading.Thread(target=lambda: output.append(process.stdout.read() if process.stdout else b""))
    reader.start()
    try:
        while process.poll() is None:
            if stop.wait(POLL_S) or read_job(site, call_id).state == "refused":
                raise _EndedError
    finally:
        end([process])
        reader.join()
    if process.returncode < 0:
        return None
    return "" if process.returncode == 0 else _code(output[0])


def _code(output: bytes) -> str:
    """The code in what a command with `--json` prints when it fails."""
    try:
        return str(parse_json(output, "the command's output")["error"]["code"])
    except (FedcomposeError, LookupError, TypeError):
        return UNKNOWN


def _note(site: Path, call_id: str, event: Event) -> None:
    """Write down that a step is done, unless the call was refused while it ran."""
    if read_job(site, call_id).state == "refused":
        raise _EndedError
    record(site, call_id, event, datetime.now(UTC))
