"""The invitation: only a coordinator of this federation can make one, and only a well made one is believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fedcompose.errors import RefusedError
from fedcompose.files import dump_json
from fedcompose.invitation import INVITATION_TYPE, make_invitation, read_invitation
from fedcompose.signing import read_envelope_unverified, sign_envelope
from fedcompose_coordinator.tls import CA_FILE, TLS, make_certificates
from tests.flower_sim import FlowerSim

ADDRESS = "hub.example.org:9443"


@pytest.fixture
def sim(tmp_path: Path) -> FlowerSim:
    return FlowerSim(tmp_path)


@pytest.fixture
def ca(tmp_path: Path, sim: FlowerSim) -> bytes:
    make_certificates(tmp_path / "hub", ["hub.example.org"], sim.now)
    return (tmp_path / "hub" / TLS / CA_FILE).read_bytes()


def code_of(action: Callable[[], object]) -> str:
    with pytest.raises(RefusedError) as caught:
        action()
    return caught.value.code


def test_a_coordinators_invitation_is_read_as_it_was_made(sim: FlowerSim, ca: bytes) -> None:
    found = read_invitation(make_invitation(sim.federation, sim.signer, ADDRESS, ca, sim.now), sim.federation, sim.now)
    assert (found.coordinator, found.address, found.ca_pem) == ("hub", ADDRESS, ca)


def test_nobody_else_can_invite(sim: FlowerSim, ca: bytes) -> None:
    for signer in (sim.root_signer, sim.site_signer("site-a")):
        assert (
            code_of(lambda signer=signer: make_invitation(sim.federation, signer, ADDRESS, ca, sim.now))
            == "KEY_UNKNOWN"
        )
        payload = read_envelope_unverified(
            make_invitation(sim.federation, sim.signer, ADDRESS, ca, sim.now), INVITATION_TYPE
        )
        forged = sign_envelope(payload, INVITATION_TYPE, [signer])
        assert code_of(lambda forged=forged: read_invitation(forged, sim.federation, sim.now)) == "ENVELOPE_KEY"


def test_it_counts_as_long_as_the_coordinators_key(sim: FlowerSim, ca: bytes) -> None:
    envelope = make_invitation(sim.federation, sim.signer, ADDRESS, ca, sim.now)
    later = sim.now + timedelta(days=4000)
    assert code_of(lambda: read_invitation(envelope, sim.federation, later)) == "KEY_EXPIRED"


def test_a_changed_one_is_refused(sim: FlowerSim, ca: bytes) -> None:
    envelope = json.loads(make_invitation(sim.federation, sim.signer, ADDRESS, ca, sim.now))
    envelope["payload"] = envelope["payload"][:-8] + "AAAAAAA="
    assert code_of(lambda: read_invitation(json.dumps(envelope).encode(), sim.federation, sim.now)).startswith(
        "ENVELOPE_"
    )


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"federation": "urn:uuid:00000000-0000-4000-8000-000000000002"}, "INVITATION_FEDERATION"),
        ({"coordinator": "another"}, "INVITATION_COORDINATOR"),
        ({"address": "hub.example.org"}, "INVITATION_INVALID"),
        ({"address": "hub.example.org:0"}, "INVITATION_INVALID"),
        ({"address": "hub.example.org:65536"}, "INVITATION_INVALID"),
        ({"address": "hub --insecure:1"}, "INVITATION_INVALID"),
        ({"address": "-o:1"}, "INVITATION_INVALID"),
        ({"address": "a:1\n"}, "INVITATION_INVALID"),
        ({"ca_certificate": "no certificate"}, "INVITATION_INVALID"),
        ({"ca_certificate": ""}, "INVITATION_INVALID"),
        ({"ca_certificate": "twice"}, "INVITATION_INVALID"),
        ({"schema": "fedcompose/invitation/v2"}, "INVITATION_INVALID"),
        ({"command": "rm"}, "INVITATION_INVALID"),
    ],
)
def test_what_is_signed_must_still_make_sense(sim: FlowerSim, ca: bytes, changes: dict[str, Any], code: str) -> None:
    """Even by the coordinator: its address goes into a command line, its certificate into a trust store."""
    envelope = make_invitation(sim.federation, sim.signer, ADDRESS, ca, sim.now)
    if changes.get("ca_certificate") == "twice":
        changes = {"ca_certificate": 2 * ca.decode()}
    document = json.loads(read_envelope_unverified(envelope, INVITATION_TYPE)) | changes
    signed = sign_envelope(dump_json(document), INVITATION_TYPE, [sim.signer])
    assert code_of(lambda: read_invitation(signed, sim.federation, sim.now)) == code
