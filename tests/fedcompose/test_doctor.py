from __future__ import annotations

import http.server
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fedcompose import doctor
from fedcompose.commands.doctor import register
from fedcompose.doctor import Finding, examine
from fedcompose.files import write_atomic
from fedcompose.invitation import INVITATION_FILE, make_invitation
from fedcompose_coordinator.tls import make_certificates
from tests.flower_sim import FlowerSim

SITE = "site-a"


@pytest.fixture
def sim(tmp_path: Path) -> FlowerSim:
    return FlowerSim(tmp_path)


@pytest.fixture
def port(sim: FlowerSim) -> Iterator[int]:
    """A listener on loopback with the coordinator's certificate, which refuses everything as the real one does."""
    make_certificates(sim.home, ["127.0.0.1"], sim.now)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sim.home / "tls" / "server.pem", sim.home / "tls" / "server.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Refusing(http.server.BaseHTTPRequestHandler):
    status = 403

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def invite(sim: FlowerSim, port: int) -> None:
    envelope = make_invitation(
        sim.federation, sim.signer, f"127.0.0.1:{port}", (sim.home / "tls" / "ca.pem").read_bytes(), sim.now
    )
    write_atomic(sim.folder(SITE) / INVITATION_FILE, envelope)


def of_site(sim: FlowerSim, now: datetime | None = None) -> dict[str, Finding]:
    return {each.check: each for each in examine(sim.folder(SITE), None, now or datetime.now(UTC))}


def test_a_site_in_order_gets_no_bad_mark(sim: FlowerSim, port: int) -> None:
    invite(sim, port)
    found = of_site(sim)
    assert not [each for each in found.values() if each.state == "bad"]
    expected = {"python", "versions", "flower", "federation", "base", "key", "enrolment", "reachability", "certificate"}
    assert expected <= found.keys()
    assert found["clock"].state == "ok"


def test_a_coordinator_in_order_gets_no_bad_mark(sim: FlowerSim) -> None:
    make_certificates(sim.home, ["127.0.0.1"], sim.now)
    found = examine(None, sim.home, datetime.now(UTC))
    assert not [each for each in found if each.state == "bad"]
    assert {"federation", "base", "key", "certificate", "listener"} <= {each.check for each in found}


def expose_key(sim: FlowerSim) -> None:
    (sim.home.parent / "keys" / f"{SITE}.key").chmod(0o644)


def change_base(sim: FlowerSim) -> None:
    write_atomic(sim.base / "model.safetensors", b"other weights")


def rename(sim: FlowerSim) -> None:
    settings = sim.folder(SITE) / "site.toml"
    settings.write_text(settings.read_text().replace('id = "site-a"', 'id = "site-b"'))


def break_settings(sim: FlowerSim) -> None:
    (sim.folder(SITE) / "site.toml").write_text("id = ")


def forget_federation(sim: FlowerSim) -> None:
    (sim.folder(SITE) / "federation.json").unlink()


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (expose_key, "key"),
        (change_base, "base"),
        (rename, "enrolment"),
        (break_settings, "settings"),
        (forget_federation, "federation"),
    ],
)
def test_each_fault_is_found_and_has_a_cure(sim: FlowerSim, fault: Callable[[FlowerSim], None], check: str) -> None:
    fault(sim)
    found = of_site(sim)[check]
    assert found.state == "bad"
    assert found.fix


def test_what_ends_soon_is_noted_and_what_has_ended_is_bad(sim: FlowerSim) -> None:
    expires = sim.federation.expires
    assert of_site(sim, expires - timedelta(days=1))["federation"].state == "note"
    assert of_site(sim, expires)["federation"].state == "bad"


def test_a_listener_that_is_not_there(sim: FlowerSim, port: int) -> None:
    invite(sim, 1)
    assert of_site(sim)["reachability"].state == "bad"


def test_a_listener_with_another_authority(sim: FlowerSim, port: int) -> None:
    make_certificates(sim.home, ["127.0.0.1"], sim.now)  # the listener keeps the certificate that it has
    invite(sim, port)
    assert of_site(sim)["certificate"].state == "bad"


def test_a_listener_that_answers_everybody(sim: FlowerSim, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    invite(sim, port)
    assert "gate" not in of_site(sim)
    monkeypatch.setattr(Refusing, "status", 200)
    assert of_site(sim)["gate"].state == "bad"


@pytest.mark.parametrize(("seconds", "state"), [(0, "ok"), (-59, "ok"), (61, "note"), (-301, "bad"), (301, "bad")])
def test_clocks_that_are_apart(seconds: int, state: str) -> None:
    assert doctor.clock(timedelta(seconds=seconds)).state == state


def test_the_command_ends_with_3_when_something_is_bad(sim: FlowerSim) -> None:
    app = typer.Typer()
    register(app)
    arguments = ["--site", str(sim.folder(SITE)), "--json"]
    fine = CliRunner().invoke(app, arguments)
    assert fine.exit_code == 0, fine.output
    expose_key(sim)
    bad = CliRunner().invoke(app, arguments)
    assert bad.exit_code == 3
    assert {"check": "key", "state": "bad"}.items() <= {each["check"]: each for each in json.loads(bad.stdout)}[
        "key"
    ].items()


def test_without_a_folder_named_it_looks_at_the_one_it_stands_in(
    sim: FlowerSim, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = typer.Typer()
    register(app)
    make_certificates(sim.home, ["127.0.0.1"], sim.now)
    for place, site, home in (
        (sim.folder(SITE), sim.folder(SITE), None),
        (sim.home, None, sim.home),
        (sim.home.parent, None, None),
    ):
        monkeypatch.chdir(place)
        checks = [each["check"] for each in json.loads(CliRunner().invoke(app, ["--json"]).stdout)]
        assert checks == [each.check for each in examine(site, home, datetime.now(UTC))]


def test_nothing_is_changed(sim: FlowerSim, private_home: Path) -> None:
    before = {path: path.stat().st_mtime_ns for root in (sim.home.parent, private_home) for path in root.rglob("*")}
    examine(sim.folder(SITE), sim.home, datetime.now(UTC))
    after = {path: path.stat().st_mtime_ns for root in (sim.home.parent, private_home) for path in root.rglob("*")}
    assert {path for path in before.keys() ^ after.keys() if path.name != "trust-state.lock"} == set()
