"""What an operator does to a running server: ask whether it is ready, let it finish and stop, have it judge anew.

A release is judged before it is loaded. What is withdrawn later reaches a running server by `SIGHUP`, and by the clock
where the time of a site's terms is over: it verifies the release's folder again, by all that this machine knows by
then. The experts of sites that were withdrawn are masked;
when anything else is refused, or no expert would be left, it closes its door. Answers that are being written end
there. `SIGTERM` lets them be finished, for a while.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from types import FrameType

from fedcompose.errors import ConfigError, FedcomposeError, RefusedError
from fedcompose.release import ReceivedRelease, VerifiedRelease
from fedcompose.serve.limits import Door, is_loopback
from fedcompose.standing import verify_for_use, withdrawn_experts

Verdict = Callable[[], Mapping[str, str]]  # as `Judge`
Mask = Callable[[Collection[str]], object]  # as `Engine.mask`
Refuse = Callable[[str], object]  # as `Engine.refuse`

LOOK_SECONDS = 60.0  # between two looks at the clock, which can be set while the server runs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judge:
    """Judges a release that is already loaded, as on the day it was loaded but by what is known now."""

    release: VerifiedRelease
    root_fingerprints: Collection[str] | None = None

    def __call__(self) -> dict[str, str]:
        """The sites whose experts must not speak any more, each with the code of the reason.

        Raises: RefusedError: as `verify_for_use`, of a site only where no other is left; `RELEASE_OTHER` when another
            release lies in the folder now.
        """
        now = datetime.now(UTC)
        withdrawn = withdrawn_experts(self.release, now)
        if len(withdrawn) == len(self.release.experts):
            raise next(iter(withdrawn.values()))
        again = verify_for_use(ReceivedRelease(self.release.path), self.root_fingerprints, now, withdrawn)
        if again.dir_hash != self.release.dir_hash:
            raise RefusedError(
                "RELEASE_OTHER",
                "the folder holds another release than the one that is loaded",
                expected=self.release.dir_hash,
                got=again.dir_hash,
                fix="start the server again to serve it",
            )
        return {site: refusal.code for site, refusal in withdrawn.items()}


def judge_anew(judge: Verdict, door: Door, mask: Mask, refuse: Refuse) -> bool:
    """Mask experts, and open or close the door, by today's judgement; whether it is open."""
    try:
        withdrawn = judge()
        mask(withdrawn)
    except Exception as failure:  # of any kind: what cannot be judged is not served
        door.closed = failure.code if isinstance(failure, FedcomposeError) else "JUDGEMENT_FAILED"
        refuse(door.closed)
        log.error("the release is refused; nothing is answered", extra={"code": door.closed})
        return False
    door.closed = None
    for site, code in withdrawn.items():
        log.warning("the expert of a site is withdrawn, and masked", extra={"site": site, "code": code})
    log.info("the release was judged anew", extra={"count": len(withdrawn)})
    return True


def keep_judging(
    judge: Verdict, ends: Collection[datetime], door: Door, mask: Mask, refuse: Refuse
) -> asyncio.Task[None]:
    """From now on judge anew at each `SIGHUP`, and once one of `ends` is past; for the event loop of a main thread."""
    hangup = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hangup.set)
    return asyncio.create_task(_keep_judging(hangup, ends, partial(judge_anew, judge, door, mask, refuse)))


async def _keep_judging(hangup: asyncio.Event, ends: Collection[datetime], judge: Callable[[], object]) -> None:
    """One judgement after the other, so that the last one counts; beside the answers."""
    while True:
        ahead = [end for end in ends if end > datetime.now(UTC)]
        if hangup.is_set() or len(ahead) < len(ends):
            hangup.clear()
            ends = ahead
            await asyncio.to_thread(judge)
        seconds = min([LOOK_SECONDS, *((end - datetime.now(UTC)).total_seconds() for end in ends)])
        with suppress(TimeoutError):
            await asyncio.wait_for(hangup.wait(), seconds)


def end_quietly_on_terminate() -> None:
    """`SIGTERM` is a wish, not a failure: uvicorn finishes what is being answered and then raises the signal again,
    and this process should end with status 0 by then."""

    def ignore(number: int, frame: FrameType | None) -> None: ...

    signal.signal(signal.SIGTERM, ignore)


def check_exposure(host: str, has_keys: bool) -> None:
    """Raises: ConfigError: `API_KEYS_NEEDED` where others could ask without a key."""
    if not is_loopback(host) and not has_keys:
        raise ConfigError(
            "API_KEYS_NEEDED",
            "others could reach this server, and it would answer anybody",
            expected="keys, where --host is not of this machine alone",
            got=f"--host {host!a} and no keys",
            fix="give --api-key-file FILE, and put something that speaks TLS in front",
        )
