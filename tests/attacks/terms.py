"""Attacks on a site's terms of use: they are inside its signature, and whoever composes or releases is held to them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedcompose.files import write_atomic
from fedcompose.signing import verify_files
from fedcompose_coordinator import home as homes
from tests.attacks.attack import Cases, Contribution, Mutation, Release, an_adapter, refusal_of
from tests.attacks.releases import OURS, rename_expert
from tests.federation_sim import FederationSim


def use(days: float = 2, **changes: Any) -> dict[str, Any]:
    """Terms as they lie in the provenance, good for so many days from now."""
    expires = (datetime.now(UTC) + timedelta(days=days)).strftime("%Y-%m-%dT%H:%M:%SZ")
    terms = {"purpose": "research", "recipients": ["hub"], "expires": expires, "contact": "office@example.org"}
    return terms | changes


def claims_terms(days: float = 2, **changes: Any) -> Mutation:
    return lambda attack: attack.claim(use=use(days, **changes))


RECEIVED: Cases = {
    "terms-over": (claims_terms(-1), "USE_EXPIRED"),
    "terms-for-nobody": (claims_terms(recipients=[]), "PROVENANCE_INVALID"),
    "terms-without-an-end": (claims_terms(expires="never"), "PROVENANCE_INVALID"),
    "terms-with-an-escape": (claims_terms(contact="\x1b[2J"), "PROVENANCE_INVALID"),
}


@dataclass
class Composing(Contribution):
    """An adapter of site-a that this coordinator has admitted, and that it will compose with some days later."""

    days: int = 0

    def refusal(self) -> str:
        super().admit()
        return refusal_of(self.compose)

    def admit(self) -> None:
        super().admit()
        self.compose()

    def compose(self) -> None:
        """As far as `coordinator compose` goes before it loads anything."""
        with pytest.MonkeyPatch.context() as patch:
            clock = SimpleNamespace(now=lambda zone: datetime.now(zone) + timedelta(days=self.days))
            patch.setattr(homes, "datetime", clock)
            assert homes.members_of(self.sim.coordinator_home, self.sim.federation)


def a_composition(released: FederationSim, tmp_path: Path) -> Composing:
    made = an_adapter(released, tmp_path)
    made.claim(use=use())
    write_atomic(
        made.sim.coordinator_home / "coordinator.toml", f'id = "hub"\nbase = "{made.sim.base.path}"\nkey = "k"'.encode()
    )
    return Composing(made.sim, made.folder, made.signer)


COMPOSED: Cases = {
    "terms-for-another-coordinator": (claims_terms(recipients=["hub-2"]), "USE_RECIPIENT"),
    "terms-over-since-it-was-received": (lambda attack: setattr(attack, "days", 3), "USE_EXPIRED"),
}


def in_a_release(days: float = 2, **changes: Any) -> Mutation:
    """The coordinator releases with the expert all the same, and signs that."""

    def mutate(attack: Release) -> None:
        expert = Release(attack.sim, attack.path(OURS), attack.sim.sites["site-a"].signer)
        expert.claim(use=use(days, **changes))
        rename_expert(attack, 0, verify_files(expert.path("model.sig").read_bytes(), expert.signer.public_pem))
        attack.sign()

    return mutate


RELEASED: Cases = {
    "expert-not-meant-for-this-coordinator": (in_a_release(recipients=["hub-2"]), "USE_RECIPIENT"),
    "expert-whose-terms-were-over": (in_a_release(-1), "USE_EXPIRED"),
}
