"""A site's terms of use travel inside its signature, and everybody on the way is held to them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedcompose import standing
from fedcompose.cli import main
from fedcompose.commands import verify as verifying
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.files import write_atomic
from fedcompose.release import ReceivedRelease, verify_release
from fedcompose.standing import ends_of_terms, terms_of, verify_for_use
from fedcompose_client.config import Use
from fedcompose_client.preview import describe_offer
from fedcompose_coordinator import home as homes
from fedcompose_coordinator.home import members_of
from tests.federation_sim import FederationSim

CONTACT = "office@example.org"


def terms(sim: FederationSim, *recipients: str, days: int = 2) -> Use:
    until = (sim.now + timedelta(days=days)).date()
    return Use(purpose="research on clocks", recipients=recipients or ("hub",), until=until, contact=CONTACT)


def code_of(action: Callable[[], object]) -> str:
    with pytest.raises((RefusedError, ConfigError)) as refused:
        action()
    return refused.value.code


class Later(datetime):
    """A clock that is some days ahead."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime.now(tz) + timedelta(days=5)


@pytest.fixture
def settled(sim: FederationSim) -> FederationSim:
    lines = [f'id = "hub"\nbase = "{sim.base.path}"\nkey = "keys/hub.key"']
    write_atomic(sim.coordinator_home / "coordinator.toml", "\n".join(lines).encode())
    return sim


def test_terms_are_signed_shown_and_come_with_the_release(settled: FederationSim) -> None:
    settled.contribute("site-a", use=terms(settled))
    settled.contribute("site-b")
    shown = describe_offer(settled.sites["site-a"].outbox, ["adapter", "traces"])
    assert {claims["use"]["contact"] for claims in shown["claims"].values()} == {CONTACT}
    assert shown["traces"]["count"] == 3 and len(shown["traces"]["first"]) == 3
    settled.receive()
    members_of(settled.coordinator_home, settled.federation)
    settled.compose()
    (line,) = terms_of(settled.release())
    assert "site-a" in line and "research on clocks" in line and CONTACT in line


def test_what_was_not_meant_for_this_coordinator_is_not_composed_and_not_released(settled: FederationSim) -> None:
    settled.contribute("site-a", use=terms(settled, "another"))
    settled.contribute("site-b")
    settled.receive()
    assert code_of(lambda: members_of(settled.coordinator_home, settled.federation)) == "USE_RECIPIENT"
    settled.compose()
    assert code_of(settled.release) == "USE_RECIPIENT"


def test_when_its_time_is_over_it_is_not_received(settled: FederationSim) -> None:
    settled.contribute("site-a", use=terms(settled))
    settled.contribute("site-b")
    settled.now += timedelta(days=5)
    codes = [receipt.refusal.code if receipt.refusal else receipt.outcome for receipt in settled.receive()]
    assert codes == ["USE_EXPIRED", "USE_EXPIRED", "admitted", "admitted"]


def test_when_its_time_is_over_it_is_not_composed(settled: FederationSim, monkeypatch: pytest.MonkeyPatch) -> None:
    settled.contribute("site-a", use=terms(settled))
    settled.receive(settled.sites["site-a"].outbox)
    assert members_of(settled.coordinator_home, settled.federation)
    monkeypatch.setattr(homes, "datetime", Later)
    assert code_of(lambda: members_of(settled.coordinator_home, settled.federation)) == "USE_EXPIRED"


def test_a_release_outlives_its_terms_as_an_archive_and_is_not_loaded(settled: FederationSim) -> None:
    settled.contribute("site-a", use=terms(settled))
    settled.contribute("site-b")
    settled.receive()
    settled.compose()
    path, roots = settled.release().path, [settled.root.keyid]
    (end,) = ends_of_terms(verify_for_use(ReceivedRelease(path), roots))
    assert timedelta(0) < end - datetime.now(UTC) < timedelta(days=5)
    later = datetime.now(UTC) + timedelta(days=5)
    verify_release(ReceivedRelease(path), roots, later)
    assert code_of(lambda: verify_for_use(ReceivedRelease(path), roots, later)) == "USE_EXPIRED"


def test_verify_prints_the_terms_and_refuses_them_as_of_now_when_they_are_over(
    settled: FederationSim, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settled.contribute("site-a", use=terms(settled))
    settled.contribute("site-b")
    settled.receive()
    settled.compose()
    settled.release()

    def said(*options: str) -> tuple[object, str]:
        release = str(settled.coordinator_home / "release")
        with pytest.raises(SystemExit) as ended:
            main(["verify", release, "--root-fingerprint", settled.root.keyid, *options])
        printed = capsys.readouterr()
        return ended.value.code, " ".join((printed.out + printed.err).split())

    status, text = said("--now")
    assert not status and "research on clocks" in text and CONTACT in text
    monkeypatch.setattr(verifying, "datetime", Later)
    assert not said()[0]
    status, text = said("--now")
    assert status == 1 and "USE_EXPIRED" in text


def test_without_the_check_it_would_be_loaded(settled: FederationSim, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the one above."""
    settled.contribute("site-a", use=terms(settled))
    settled.contribute("site-b")
    settled.receive()
    settled.compose()
    monkeypatch.setattr(standing, "check_terms", lambda *_: None)
    later = datetime.now(UTC) + timedelta(days=5)
    verify_for_use(ReceivedRelease(settled.release().path), [settled.root.keyid], later)


@pytest.mark.parametrize("change", [{"contact": ""}, {"recipients": ()}, {"purpose": "x" * 300}])
def test_terms_that_cannot_be_signed_are_refused(settled: FederationSim, change: dict[str, Any]) -> None:
    use = terms(settled).model_copy(update=change)
    assert code_of(lambda: settled.contribute("site-a", use=use)) == "USE_INVALID"


def test_the_settings_say_it(tmp_path: Path) -> None:
    from fedcompose_client.config import load_config

    write_atomic(
        tmp_path / "site.toml",
        b'id = "a"\nbase = "b"\nkey = "k"\n[use]\npurpose = "p"\nrecipients = ["hub"]\nuntil = 2030-01-01\n'
        b'contact = "c"\n[domains.d]\nfile = "f"\ntask = "numeric"\n',
    )
    use = load_config(tmp_path).use
    assert use is not None and use.until.isoformat() == "2030-01-01"
