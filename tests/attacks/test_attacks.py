"""Every attack of the catalogue (docs/attacks.md), tried: refused with its code, nothing of it kept.

The tables lie beside this file, one for each kind of thing that is attacked. A row of the catalogue without a case
here, a case without a row, or another code than the catalogue says fails `test_the_catalogue_and_the_cases_agree`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest

from fedcompose.files import dir_hash, folder_digests
from tests.attacks import (
    calls,
    claims,
    configuration,
    egress,
    federations,
    files,
    ledgers,
    members,
    releases,
    signatures,
    terms,
    traces,
    transport,
    weights,
)
from tests.attacks.attack import Cases, a_release, an_adapter, some_traces
from tests.attacks.harmless import HARMLESS
from tests.federation_sim import FederationSim, make_federation

CATALOGUE = Path(__file__).parents[2] / "docs" / "attacks.md"


class Attacked(Protocol):
    """Something about to be judged. `refusal` gives the code, and asserts that nothing of it was kept."""

    def refusal(self) -> str: ...

    def admit(self) -> None: ...


Setting = Callable[[FederationSim, Path], Any]
TABLES: dict[str, tuple[Setting, Cases]] = {
    "courier": (an_adapter, signatures.COURIER),
    "signer": (an_adapter, signatures.SIGNER),
    "claims": (an_adapter, claims.CLAIMS),
    "terms": (an_adapter, terms.RECEIVED),
    "composing": (terms.a_composition, terms.COMPOSED),
    "members": (an_adapter, members.MEMBERS),
    "memory": (an_adapter, members.MEMORY),
    "files": (an_adapter, files.FILES),
    "weights": (an_adapter, weights.FILE),
    "tensors": (an_adapter, weights.TENSORS),
    "configuration": (an_adapter, configuration.CONFIGURATION),
    "traces": (some_traces, traces.TRACE),
    "transport": (transport.a_fetch, transport.TRANSPORT),
    "calls": (calls.a_call, calls.CALLS),
    "questions": (egress.a_question, egress.QUESTIONS),
    "receipts": (egress.a_receipt, egress.RECEIPTS),
    "leaving": (egress.something_leaving, egress.LEAVING),
    "egress ledgers": (egress.an_egress_ledger, egress.EGRESS),
    "releases": (a_release, releases.RELEASES),
    "terms in releases": (a_release, terms.RELEASED),
    "first trust": (federations.a_first_federation_file, federations.FIRST),
    "federation files": (federations.a_federation_file, federations.NEXT),
    "revocation lists": (federations.a_revocation_list, federations.REVOCATIONS),
    "ledgers": (ledgers.a_ledger, ledgers.LEDGERS),
}
ATTACKS = [pytest.param(table, name, id=name) for table, (_, cases) in TABLES.items() for name in cases]


@pytest.fixture(scope="module")
def released(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, random_experts: dict[str, Path]
) -> FederationSim:
    """One federation for all attacks, with a release; every attack works on its own copies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDCOMPOSE_HOME", str(tmp_path_factory.mktemp("home")))
        sim = make_federation(tmp_path_factory.mktemp("federation"), tiny_base, random_experts)
        sim.released()
    return sim


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nothing here has to survive a power cut


@pytest.mark.parametrize(("table", "name"), ATTACKS)
def test_attack(released: FederationSim, tmp_path: Path, table: str, name: str) -> None:
    setting, cases = TABLES[table]
    mutate, code = cases[name]
    attacked: Attacked = setting(released, tmp_path)
    mutate(attacked)
    assert attacked.refusal() == code


@pytest.mark.parametrize("table", TABLES)
def test_without_an_attack_everything_is_accepted(released: FederationSim, tmp_path: Path, table: str) -> None:
    """Negative control: what the attacks start from is good."""
    TABLES[table][0](released, tmp_path).admit()


@pytest.mark.parametrize("name", HARMLESS)
def test_without_effect(released: FederationSim, tmp_path: Path, name: str) -> None:
    HARMLESS[name](an_adapter(released, tmp_path))


def test_the_catalogue_and_the_cases_agree() -> None:
    cases = [(name, code) for _, table in TABLES.values() for name, (_, code) in table.items()]
    cases += [(name, "NO_EFFECT") for name in HARMLESS]
    rows = re.findall(r"^\| ([a-z0-9.-]+) \| .+ \| ([A-Z_]+) \|$", CATALOGUE.read_text("utf-8"), re.MULTILINE)
    assert len({name for name, _ in rows}) == len(rows) > 400
    assert set(rows) - set(cases) == set(), "rows of docs/attacks.md without a case, or with another code"
    assert set(cases) - set(rows) == set(), "cases without a row in docs/attacks.md, or with another code"


def test_an_ingredient_is_named_by_what_its_site_signed(released: FederationSim, tmp_path: Path) -> None:
    release = a_release(released, tmp_path)
    digests = folder_digests(release.path("ingredients/site-a"))
    del digests["model.sig"]
    listed = json.loads(release.path("composition.json").read_bytes())["experts"][0]
    assert listed["dirHash"] == dir_hash(digests)
