"""The command as an operator runs it: keys, numbers, logs without words, judged anew, drained."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedcompose.amendments import revoke_keys, set_status
from fedcompose.cli import main
from fedcompose.drafts import amend
from fedcompose.federation import Revocation
from fedcompose.trust_state import accepted_file, trusted_federation
from tests.federation_sim import FederationSim

SECRET = "Zanzibar"
KEY = "k" * 24


@pytest.fixture
def folder(talking_sim: FederationSim, tmp_path: Path) -> Path:
    return shutil.copytree(talking_sim.coordinator_home / "release", tmp_path / "release")


@contextmanager
def serving(folder: Path, sim: FederationSim, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server in a process of its own, and its address."""
    trust = ["--root-fingerprint", sim.root.keyid, "--base", str(sim.base.path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedcompose", "serve", str(folder), *trust, "--port", "0", "--json", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        announced = ""
        while not announced.endswith("}\n"):
            line = process.stdout.readline()
            assert line, process.stderr.read() if process.stderr else ""
            announced += line
        yield json.loads(announced)["url"], process
    finally:
        process.kill()
        process.wait()


def chat(url: str, tokens: int = 4, **options: object) -> httpx.Response:
    body = {"model": "auto", "messages": [{"role": "user", "content": SECRET}], "max_tokens": tokens}
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.post(f"{url}/v1/chat/completions", json=body | options, headers=headers, timeout=60)


def test_keys_numbers_and_logs_without_words(folder: Path, talking_sim: FederationSim, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"me {KEY}\n")
    keys.chmod(0o600)
    limits = ["--api-key-file", str(keys), "--requests-per-minute", "6"]
    with serving(folder, talking_sim, *limits) as (url, process):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/ready").json() == {"status": "ready"}
        assert chat(url).status_code == 200
        again = chat(url)
        assert (again.status_code, again.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(again.headers["retry-after"]) <= 10
        numbers = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
        assert 'fedcompose_requests_total{path="/v1/chat/completions",status="200"} 1.0' in numbers
        assert "fedcompose_time_to_first_token_seconds_count 1.0" in numbers
        assert "fedcompose_distinct_experts_per_step_count" in numbers and 'expert="site-' in numbers
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert process.stderr is not None
        logged = process.stderr.read()
    lines = [json.loads(line) for line in logged.splitlines() if line.startswith("{")]
    assert {"answered"} <= {line["event"] for line in lines}
    assert 429 in {line.get("status") for line in lines}
    assert SECRET not in logged and KEY not in logged


def test_a_release_that_is_tampered_with_while_it_is_served_serves_no_more(
    folder: Path, talking_sim: FederationSim
) -> None:
    with serving(folder, talking_sim) as (url, process):
        assert chat(url).status_code == 200
        data = (folder / "router.safetensors").read_bytes()
        (folder / "router.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        process.send_signal(signal.SIGHUP)
        _until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        refused = chat(url)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "file_changed")
        (folder / "router.safetensors").write_bytes(data)
        process.send_signal(signal.SIGHUP)
        _until(lambda: httpx.get(f"{url}/ready").status_code == 200)
        assert chat(url).status_code == 200


def test_a_withdrawn_site_is_masked_until_it_is_back_and_a_withdrawn_coordinator_ends_all(
    folder: Path, talking_sim: FederationSim
) -> None:
    def accept(change: Callable[[dict[str, Any]], object]) -> None:
        now = accepted_file(talking_sim.federation.id)[0]  # type: ignore[index]
        newer = amend(now, lambda document: change(document) and None, talking_sim.root, talking_sim.now)
        trusted_federation(newer, None, talking_sim.now)
        process.send_signal(signal.SIGHUP)

    def masked() -> list[str]:
        masked: list[str] = httpx.get(f"{url}/v1/models").json()["data"][0]["masked"]
        return masked

    def writers() -> set[str]:
        tokens = chat(url, tokens=24, routing=True).json()["choices"][0]["routing"]["tokens"]
        return {talking[row] for token in tokens for row in token["layers"]}

    talking = list(talking_sim.sites)
    trusted_federation(talking_sim.envelope, [talking_sim.root.keyid], talking_sim.now)
    with serving(folder, talking_sim) as (url, process):
        before = writers()
        assert "site-b" in before
        accept(lambda document: set_status(document, "site-b", "suspended"))
        _until(lambda: masked() == ["site-b"])
        assert writers() == {"site-a"}
        assert chat(url, model="expert:site-b").status_code == 404
        assert chat(url, routing={"force": "site-b"}).status_code == 400
        card = httpx.get(f"{url}/release").json()
        assert [expert["masked"] for expert in card["experts"]] == [False, True]
        assert "site-b was withdrawn" in " ".join(card["cautions"])
        accept(lambda document: set_status(document, "site-b", "active"))
        _until(lambda: masked() == [])
        assert writers() == before
        stolen = Revocation(at=talking_sim.now, reason="compromised")
        accept(lambda document: revoke_keys(document, [talking_sim.coordinator.keyid], stolen))
        _until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        assert chat(url).json()["error"]["code"] == "key_revoked"


def test_what_is_being_answered_at_the_end_is_finished(folder: Path, talking_sim: FederationSim) -> None:
    with serving(folder, talking_sim) as (url, process):
        alone = chat(url, tokens=200).json()["choices"][0]["message"]["content"]
        found: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: found.append(chat(url, tokens=200)))
        asking.start()
        _until(lambda: "fedcompose_requests_running 1.0" in httpx.get(f"{url}/metrics").text)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        asking.join(60)
    assert found[0].json()["choices"][0]["message"]["content"] == alone


def test_others_are_not_let_in_without_keys(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["serve", str(folder), "--host", "0.0.0.0"])  # noqa: S104
    assert end.value.code == 2
    assert "API_KEYS_NEEDED" in capsys.readouterr().err


def _until(true: object, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)
