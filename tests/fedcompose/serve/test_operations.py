from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Collection
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedcompose.amendments import set_status
from fedcompose.drafts import amend
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.release import ReceivedRelease
from fedcompose.revocations import RevokedKey, next_revocations, no_revocations
from fedcompose.serve.limits import Door
from fedcompose.serve.operations import Judge, check_exposure, judge_anew, keep_judging
from fedcompose.standing import verify_for_use
from fedcompose.trust_state import accept_revocations, trusted_federation
from tests.federation_sim import FederationSim

Change = Callable[[dict[str, Any]], object]
Happening = Callable[[FederationSim], None]


def nothing(_: object) -> None:
    pass


@pytest.fixture
def judge(talking_sim: FederationSim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judge:
    """Of a copy of a release, believed on this machine by its root's fingerprint."""
    monkeypatch.setenv("FEDCOMPOSE_HOME", str(tmp_path / "home"))
    folder = shutil.copytree(talking_sim.coordinator_home / "release", tmp_path / "release")
    roots = [talking_sim.root.keyid]
    return Judge(verify_for_use(ReceivedRelease(folder), roots), roots)


def test_a_good_release_opens_the_door_again(judge: Judge) -> None:
    door, masked, refused = Door(closed="KEY_REVOKED"), [], []
    assert judge_anew(judge, door, masked.append, refused.append)
    assert (door.closed, masked, refused) == (None, [{}], [])


def test_a_release_that_was_tampered_with_since_closes_the_door_and_ends_answers(judge: Judge) -> None:
    path = judge.release.path / "router.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    door, refused = Door(), list[str]()

    assert not judge_anew(judge, door, lambda sites: None, refused.append)
    assert (door.closed, refused) == ("FILE_CHANGED", ["FILE_CHANGED"])


def changed(*changes: Change) -> Happening:
    """This machine accepts the release's version of the federation file, and the next one."""

    def happen(sim: FederationSim) -> None:
        trusted_federation(sim.envelope, [sim.root.keyid], sim.now)
        newer = amend(sim.envelope, lambda document: [each(document) for each in changes] and None, sim.root, sim.now)
        trusted_federation(newer, None, sim.now)

    return happen


def listed(whose: str, reason: Any, after: timedelta) -> Happening:
    """This machine accepts a revocation list."""

    def happen(sim: FederationSim) -> None:
        trusted_federation(sim.envelope, [sim.root.keyid], sim.now)
        signer = sim.sites[whose].signer if whose in sim.sites else sim.coordinator
        entry = RevokedKey(keyid=signer.keyid, at=sim.now + after, reason=reason)
        accept_revocations(next_revocations(no_revocations(sim.federation.id), [entry], [], sim.root, sim.now))

    return happen


def suspended(site: str) -> Change:
    return lambda document: set_status(document, site, "suspended")


HOUR = timedelta(hours=1)
SINCE: dict[str, tuple[Happening, dict[str, str] | str]] = {  # what happened; who is masked, or why all is refused
    "nothing": (changed(), {}),
    "a site suspended": (changed(suspended("site-b")), {"site-b": "SITE_SUSPENDED"}),
    "a site removed": (changed(lambda document: document["sites"].pop(0)), {"site-a": "KEY_UNKNOWN"}),
    "a site may send traces only": (
        changed(lambda document: document["sites"][0].update(may=["traces"])), {"site-a": "NOT_PERMITTED"}
    ),
    "a site's key stolen before": (listed("site-a", "compromised", -HOUR), {"site-a": "KEY_REVOKED"}),
    "a site's key stolen": (listed("site-a", "compromised", HOUR), {}),
    "both sites suspended": (changed(suspended("site-a"), suspended("site-b")), "SITE_SUSPENDED"),
    "the hub's key stolen": (listed("hub", "compromised", HOUR), "KEY_REVOKED"),
    "the hub's key rotated before": (listed("hub", "rotated", -HOUR), "KEY_REVOKED"),
    "another base": (
        changed(lambda document: document["base_models"][0].update(dirHash="0" * 64)), "BASE_MISMATCH"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SINCE)
def test_a_withdrawn_site_is_masked_and_a_withdrawn_coordinator_refused(
    judge: Judge, talking_sim: FederationSim, what: str
) -> None:
    """`nothing` is the control. At the next start all but nothing and a theft that came later are refused."""
    happen, expected = SINCE[what]
    happen(talking_sim)
    for roots in (judge.root_fingerprints, None):  # believed for a fingerprint, or for what was accepted
        door, masked = Door(), list[Any]()
        again = Judge(judge.release, roots)
        assert judge_anew(again, door, masked.append, nothing) is not isinstance(expected, str)
        assert (door.closed if isinstance(expected, str) else masked[0]) == expected
        with nullcontext() if expected == {} else pytest.raises(RefusedError):
            verify_for_use(ReceivedRelease(judge.release.path), roots)


@pytest.mark.parametrize("file", ["ingredients/site-b/adapter_model.safetensors", "router.safetensors"])
@pytest.mark.parametrize("happen", [changed(suspended("site-b")), listed("site-b", "compromised", -HOUR)])
def test_a_withdrawn_site_excuses_no_other_byte(
    judge: Judge, talking_sim: FederationSim, file: str, happen: Happening
) -> None:
    path = judge.release.path / file
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    happen(talking_sim)
    with pytest.raises(RefusedError) as caught:
        judge()
    assert caught.value.code == "FILE_CHANGED"


def test_what_cannot_be_judged_is_not_served() -> None:
    def fail() -> dict[str, str]:
        raise OSError("no such device")

    door = Door()
    assert not judge_anew(fail, door, nothing, nothing)
    assert door.closed == "JUDGEMENT_FAILED"


def test_an_engine_that_cannot_mask_answers_nothing(judge: Judge, talking_sim: FederationSim) -> None:
    def mask(sites: Collection[str]) -> None:
        if sites:
            raise RefusedError("EXPERT_UNMASKABLE", "not without them")

    door = Door()
    assert judge_anew(judge, door, mask, nothing)
    changed(suspended("site-b"))(talking_sim)
    assert not judge_anew(judge, door, mask, nothing)
    assert door.closed == "EXPERT_UNMASKABLE"


def test_another_release_in_its_place_is_not_what_was_loaded(judge: Judge) -> None:
    loaded = Judge(judge.release.__class__(**{**judge.release.__dict__, "dir_hash": "0" * 64}), judge.root_fingerprints)
    with pytest.raises(RefusedError) as caught:
        loaded()
    assert caught.value.code == "RELEASE_OTHER"


def test_a_hangup_judges_beside_the_answers() -> None:
    door = Door()

    def refuse() -> dict[str, str]:
        time.sleep(0.1)  # the loop goes on meanwhile
        raise RefusedError("KEY_REVOKED", "a key was withdrawn")

    async def main() -> float:
        judging = keep_judging(refuse, [], door, nothing, nothing)
        os.kill(os.getpid(), signal.SIGHUP)
        longest, before = 0.0, time.monotonic()
        while door.closed is None:
            await asyncio.sleep(0.005)
            longest, before = max(longest, time.monotonic() - before), time.monotonic()
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
        judging.cancel()
        return longest

    longest = asyncio.run(asyncio.wait_for(main(), 10))
    assert door.closed == "KEY_REVOKED"
    assert longest < 0.09


def test_a_hangup_during_a_judgement_is_judged_after_it() -> None:
    door, codes, alone = Door(), ["KEY_REVOKED", "SITE_SUSPENDED"], threading.Lock()

    def refuse() -> dict[str, str]:
        assert alone.acquire(blocking=False), "two at the same time"
        code = codes.pop(0)
        if codes:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
        alone.release()
        raise RefusedError(code, "withdrawn")

    async def main() -> None:
        judging = keep_judging(refuse, [], door, nothing, nothing)
        os.kill(os.getpid(), signal.SIGHUP)
        while door.closed != "SITE_SUSPENDED":
            await asyncio.sleep(0.005)
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
        judging.cancel()

    asyncio.run(asyncio.wait_for(main(), 10))


def test_when_the_time_of_a_sites_terms_is_over_it_is_judged_without_a_hangup() -> None:
    end = datetime.now(UTC) + timedelta(seconds=0.2)
    judged: list[datetime] = []

    def judge() -> dict[str, str]:
        judged.append(datetime.now(UTC))
        return {"site-a": "USE_EXPIRED"}

    async def main() -> None:
        judging = keep_judging(judge, [end, end + timedelta(days=1)], Door(), nothing, nothing)
        await asyncio.sleep(0.5)
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
        judging.cancel()

    asyncio.run(main())
    assert len(judged) == 1 and judged[0] >= end


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "127.0.0.1.example.org", ""])  # noqa: S104
def test_no_server_is_open_to_others_without_keys(host: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_exposure(host, has_keys=False)
    assert caught.value.code == "API_KEYS_NEEDED"
    check_exposure(host, has_keys=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.5.5.5"])
def test_this_machine_alone_needs_none(host: str) -> None:
    check_exposure(host, has_keys=False)
