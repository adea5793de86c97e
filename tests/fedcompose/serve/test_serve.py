"""The command: verified first, one machine only, and what it prints works."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fedcompose.cli import main
from fedcompose.commands import serve
from fedcompose.serve.limits import STALLED_SECONDS
from tests.federation_sim import FederationSim


@pytest.fixture
def folder(talking_sim: FederationSim, tmp_path: Path) -> Path:
    """A copy of the release."""
    return shutil.copytree(talking_sim.coordinator_home / "release", tmp_path / "release")


@pytest.fixture
def trust(talking_sim: FederationSim) -> list[str]:
    return ["--root-fingerprint", talking_sim.root.keyid, "--base", str(talking_sim.base.path)]


@pytest.mark.parametrize("command", ["serve", "chat"])
def test_a_tampered_release_is_refused_before_anything_is_loaded(folder: Path, trust: list[str], command: str) -> None:
    data = bytearray((folder / "router.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "router.safetensors").write_bytes(data)
    code = (
        "import sys\nfrom fedcompose.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert not {'torch', 'transformers', 'safetensors.torch'} & sys.modules.keys()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, command, str(folder), *trust], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1, result.stderr
    assert result.stderr.startswith("FILE_CHANGED: ")


def test_a_release_of_strangers_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["serve", str(folder)])
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("TRUST_ROOT_UNKNOWN: ")


def test_a_missing_extra_says_how_to_install_it(
    folder: Path, trust: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    with pytest.raises(SystemExit) as end:
        main(["serve", str(folder), *trust])
    assert end.value.code == 3
    text = capsys.readouterr().err
    assert "PACKAGE_MISSING" in text and "no uvicorn" in text and "pip install 'fedcompose[serve]'" in text


def test_a_port_in_use_is_said_before_anything_is_loaded(
    folder: Path, trust: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as end:
        main(["serve", str(folder), *trust, "--port", str(taken.getsockname()[1])])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("PORT_UNUSABLE: ")


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="of Linux")
def test_a_connection_whose_reader_takes_nothing_is_given_up_by_the_system() -> None:
    with serve._listen("127.0.0.1", 0) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()):
            accepted, _ = listener.accept()
            with accepted:
                milliseconds = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    assert milliseconds == STALLED_SECONDS * 1000


def test_what_it_prints_works_and_it_ends_at_ctrl_c(folder: Path, trust: list[str]) -> None:
    server = subprocess.Popen(
        [sys.executable, "-m", "fedcompose", "serve", str(folder), *trust, "--port", "0"],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert server.stdout is not None
    try:
        lines = []
        while '-d \'{"model"' not in (lines[-1:] or [""])[0]:
            lines.append(server.stdout.readline())
            assert lines[-1], "the server ended"
        printed = "".join(lines)
        assert "Serving http://127.0.0.1:" in printed
        assert "site-a (clock), site-b (ordering)" in printed
        snippet = re.search(r"(?s)openai package:\n\n(.*?)\n\n", printed)
        assert snippet is not None
        exec(re.sub(r"^  ", "", snippet[1], flags=re.MULTILINE), {})  # noqa: S102
        curl = re.search(r"(?s)From a shell:\n\n(.*)", printed)
        assert curl is not None
        answer = subprocess.run(["sh", "-c", curl[1]], capture_output=True, text=True, check=True)
        assert '"finish_reason":' in answer.stdout
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 0
