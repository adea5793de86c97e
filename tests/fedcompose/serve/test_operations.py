from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from fedcompose.errors import ConfigError, RefusedError
from fedcompose.release import ReceivedRelease, verify_for_use
from fedcompose.serve.limits import Door
from fedcompose.serve.operations import Judge, check_exposure, judge_anew, judge_on_hangup
from tests.federation_sim import FederationSim


@pytest.fixture
def judge(talking_sim: FederationSim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judge:
    """Of a copy of a release, believed on this machine by its root's fingerprint."""
    monkeypatch.setenv("FEDCOMPOSE_HOME", str(tmp_path / "home"))
    folder = shutil.copytree(talking_sim.coordinator_home / "release", tmp_path / "release")
    roots = [talking_sim.root.keyid]
    return Judge(verify_for_use(ReceivedRelease(folder), roots), roots)


def test_a_good_release_opens_the_door_again(judge: Judge) -> None:
    door, cancelled = Door(closed="KEY_REVOKED"), []
    assert judge_anew(judge, door, lambda: cancelled.append(1))
    assert (door.closed, cancelled) == (None, [])


def test_a_release_that_was_tampered_with_since_closes_the_door_and_ends_answers(judge: Judge) -> None:
    path = judge.release.path / "router.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    door, cancelled = Door(), []

    assert not judge_anew(judge, door, lambda: cancelled.append(1))
    assert (door.closed, cancelled) == ("FILE_CHANGED", [1])


def test_another_release_in_its_place_is_not_what_was_loaded(judge: Judge) -> None:
    loaded = Judge(judge.release.__class__(**{**judge.release.__dict__, "dir_hash": "0" * 64}), judge.root_fingerprints)
    with pytest.raises(RefusedError) as caught:
        loaded()
    assert caught.value.code == "RELEASE_OTHER"


def test_a_hangup_judges_beside_the_answers() -> None:
    door = Door()

    def refuse() -> None:
        time.sleep(0.1)  # the loop goes on meanwhile
        raise RefusedError("KEY_REVOKED", "a key was withdrawn")

    async def main() -> float:
        judge_on_hangup(refuse, door, lambda: None)
        os.kill(os.getpid(), signal.SIGHUP)
        longest, before = 0.0, time.monotonic()
        while door.closed is None:
            await asyncio.sleep(0.005)
            longest, before = max(longest, time.monotonic() - before), time.monotonic()
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
        return longest

    longest = asyncio.run(asyncio.wait_for(main(), 10))
    assert door.closed == "KEY_REVOKED"
    assert longest < 0.09


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "127.0.0.1.example.org", ""])  # noqa: S104
def test_no_server_is_open_to_others_without_keys(host: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_exposure(host, has_keys=False)
    assert caught.value.code == "API_KEYS_NEEDED"
    check_exposure(host, has_keys=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.5.5.5"])
def test_this_machine_alone_needs_none(host: str) -> None:
    check_exposure(host, has_keys=False)
