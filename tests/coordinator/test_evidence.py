"""The evidence pack says what is known of a release, and says no where there is nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fedcompose.cli import main
from fedcompose.delivery import make_receipt
from fedcompose.errors import RefusedError
from fedcompose.files import read_json, write_json
from fedcompose.ledger import Head
from fedcompose.provenance import AuditStatement, Provenance, TraceSummary
from fedcompose.traces import ProvenanceClass
from fedcompose.trust_state import trusted_federation
from fedcompose_client import contribute as contributing
from fedcompose_client.config import Use
from fedcompose_coordinator.approvals import Rule
from fedcompose_coordinator.evaluation import summarise
from fedcompose_coordinator.evidence import STATEMENT, build_evidence
from fedcompose_coordinator.intake import NO_APPROVALS
from fedcompose_coordinator.report_evidence import evidence
from tests.coordinator.sample_report import sample_plan, write_cells
from tests.federation_sim import FederationSim

HEAD = Head(entries=9, head="9" * 64)


def released(sim: FederationSim, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A release in which site-a tells everything it can about privacy, and site-b nothing."""
    audited = {"audit": AuditStatement(verdict="inconclusive", target="twin")}
    use = Use(
        purpose="research", recipients=("hub",), until=(sim.now + timedelta(days=9)).date(), contact="dpo@a.example"
    )
    with monkeypatch.context() as patched:
        patched.setattr(contributing, "privacy_claims", lambda *_: audited)
        sim.contribute("site-a", use=use)
    sim.contribute("site-b", traces=False)
    sim.receive()
    sim.compose()
    receipt = make_receipt(
        sim.federation, sim.coordinator, sim.now, site="site-a", call="first", offer="0" * 64, bytes=1234, ledger=HEAD
    )
    (sim.coordinator_home / "receipts").mkdir()
    (sim.coordinator_home / "receipts" / "first-site-a.json").write_bytes(receipt)
    return build_evidence(sim.coordinator_home, sim.release(), sim.admitted(), sim.federation, NO_APPROVALS)


def enforced(found: dict[str, Any], words: str) -> bool | None:
    (guard,) = (each for each in found["guards"] if words in each["guard"])
    answer: bool | None = guard["enforced"]
    return answer


def test_it_says_what_is_known_and_what_is_not(sim: FederationSim, monkeypatch: pytest.MonkeyPatch) -> None:
    found = released(sim, monkeypatch)
    told, silent = found["sites"]
    assert found["statement"] == STATEMENT
    assert (told["audit"]["verdict"], told["terms"]["contact"]) == ("inconclusive", "dpo@a.example")
    assert told["traces"]["classes"] == {"B": 3}
    assert told["receipts"][0]["site_ledger"] == HEAD.model_dump()
    assert [silent[name] for name in ("audit", "differential_privacy", "terms", "traces")] == [None] * 4
    assert silent["receipts"] == []
    assert found["egress"]["bytes_receipted"] == 1234 < found["egress"]["bytes_held"]
    for words in ("differential privacy", "audited", "states terms", "signed receipt", "screened", "people approve"):
        assert enforced(found, words) is False, words
    assert enforced(found, "trainer had no network") is None
    assert json.loads(json.dumps(found)) == found


def test_guards_are_said_to_be_enforced_where_they_were(sim: FederationSim, monkeypatch: pytest.MonkeyPatch) -> None:
    released(sim, monkeypatch)
    home = sim.coordinator_home
    experts = {each.site: each.dir_hash for each in sim.release().experts}
    for screened, holds in ((experts, True), (experts | {"site-b": "0" * 64}, False), ({}, False)):  # some of others
        (home / "screening.json").write_text(json.dumps({"checks": ["weights"], "findings": [], "experts": screened}))
        found = build_evidence(home, sim.release(), sim.admitted(), sim.federation, Rule(needed=2))
        assert enforced(found, "screened") is holds
    assert enforced(found, "people approve") and enforced(found, "made again at intake")
    own = [replace(each, provenance=with_class(each.provenance, "F")) for each in sim.admitted()]
    found = build_evidence(home, sim.release(), own, sim.federation, Rule(needed=2))
    assert enforced(found, "made again at intake") is False


def with_class(claims: Provenance, name: ProvenanceClass) -> Provenance:
    """As if the site's traces were of this class."""
    if claims.traces is None:
        return claims
    return claims.model_copy(update={"traces": TraceSummary(classes={name: 3}, declared_non_private=True)})


def test_a_receipt_that_was_changed_stops_it(sim: FederationSim, monkeypatch: pytest.MonkeyPatch) -> None:
    released(sim, monkeypatch)
    path = sim.coordinator_home / "receipts" / "first-site-a.json"
    path.write_bytes(path.read_bytes().replace(b'"sig":"', b'"sig":"AAAA', 1))
    with pytest.raises(RefusedError):
        build_evidence(sim.coordinator_home, sim.release(), sim.admitted(), sim.federation, NO_APPROVALS)


def test_the_page_has_the_card_and_lets_no_text_become_markup(
    sim: FederationSim, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = released(sim, monkeypatch)
    found["sites"][0]["terms"]["purpose"] = "<script>alert(1)</script>"
    page = str(evidence({"evidence": found}))
    assert "may leak membership or content" in page
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "none: nothing was measured" in page and "inconclusive" in page
    assert evidence({}) is None


def test_the_command_writes_it(
    sim: FederationSim, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    released(sim, monkeypatch)
    trusted_federation(sim.envelope, [sim.root.keyid], sim.now)
    home, plan = sim.coordinator_home, sample_plan()
    (home / "coordinator.toml").write_text(f'id = "hub"\nbase = "{sim.base.path}"\nkey = "keys/hub.key"\n')
    write_cells(plan, tmp_path)
    write_json(home / "evaluation.json", summarise(plan, tmp_path))
    for option in ([], ["--evidence"]):
        with pytest.raises(SystemExit) as ended:
            main(["coordinator", "report", "--home", str(home), *option])
        assert ended.value.code == 0, capsys.readouterr().err
        assert (home / "evidence.json").exists() == bool(option)
        assert ('id="privacy"' in (home / "report.html").read_text()) == bool(option)
    assert read_json(home / "report.json")["evidence"] == read_json(home / "evidence.json")
