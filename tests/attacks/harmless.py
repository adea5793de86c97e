"""What is accepted and has no effect: each does what an attacker would, and asserts that nothing follows from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest.mock import patch

from fedcompose.adapter import BASE_NAME, canonical_config, read_adapter
from fedcompose.bases import base_shapes
from fedcompose.document import format_time
from fedcompose.drafts import amend
from fedcompose_coordinator import intake
from tests.attacks.attack import Contribution
from tests.attacks.signatures import twin_signature

CONFIG = "adapter_config.json"


def twin(attack: Contribution) -> None:
    """Identity is what was signed, never the signature."""
    attack.admit()
    before = attack.stored()
    twin_signature(attack)
    assert attack.receive(attack.folder).outcome == "already admitted"
    assert attack.stored() == before


def again(attack: Contribution) -> None:
    attack.admit()
    before = attack.stored()
    assert attack.receive(attack.folder).outcome == "already admitted"
    assert attack.stored() == before


def another_base_by_name(attack: Contribution) -> None:
    """Nobody reads the name; what is composed is written anew, without it."""
    attack.edit(CONFIG, lambda config: config.update(base_model_name_or_path="evil/model", revision="main"))
    attack.sign()
    attack.admit()
    (stored,) = attack.sim.coordinator_home.glob("store/*")
    written = json.loads(canonical_config(read_adapter(stored, base_shapes(attack.sim.base))))
    assert written["base_model_name_or_path"] == BASE_NAME and "revision" not in written


def readme_with_an_escape(attack: Contribution) -> None:
    """No command prints it, and nothing of it is written down."""
    attack.path("README.md").write_text("\x1b[2J")
    attack.sign()
    attack.admit()
    assert b"\x1b" not in (attack.sim.coordinator_home / "ledger.jsonl").read_bytes()


def changed_afterwards(attack: Contribution) -> None:
    attack.admit()
    before = attack.stored()
    attack.path(CONFIG).write_bytes(b"{}")
    assert attack.stored() == before
    assert len(attack.sim.admitted()) == 1


def changed_while_it_was_verified(attack: Contribution) -> None:
    """The source becomes another folder between copying and verifying."""
    original, verify = attack.path(CONFIG).read_bytes(), intake.verify_contribution

    def change_first(*arguments: Any, **options: Any) -> Any:
        attack.path(CONFIG).write_bytes(b"{}")
        return verify(*arguments, **options)

    with patch.object(intake, "verify_contribution", change_first):
        attack.admit()
    assert original in attack.stored().values()


def revoked_afterwards(reason: str) -> Callable[[Contribution], None]:
    """A key that counted when the contribution was received leaves it good."""

    def check(attack: Contribution) -> None:
        attack.admit()
        sim = attack.sim
        later = {"at": format_time(sim.now + timedelta(minutes=1)), "reason": reason}
        sim.envelope = amend(sim.envelope, lambda d: d["sites"][0]["keys"][0].update(revoked=later), sim.root, sim.now)
        sim.now += timedelta(days=1)
        assert [each.site for each in sim.admitted()] == ["site-a"]
        assert (sim.federation.doubts(attack.signer.keyid) is not None) == (reason == "compromised")

    return check


HARMLESS: dict[str, Callable[[Contribution], None]] = {
    "twin-of-a-signature": twin,
    "sent-twice": again,
    "base-by-another-name": another_base_by_name,
    "readme-with-an-escape": readme_with_an_escape,
    "changed-after-it-was-received": changed_afterwards,
    "changed-while-it-was-verified": changed_while_it_was_verified,
    "key-rotated-afterwards": revoked_afterwards("rotated"),
    "key-compromised-afterwards": revoked_afterwards("compromised"),
}
