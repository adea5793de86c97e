"""Attacks by what a contribution claims: who signs, for whom, for which call, when, and about which files."""

from __future__ import annotations

import base64
import shutil
from datetime import timedelta
from typing import Any

from fedcompose.call import Call, WantedLora
from fedcompose.drafts import create_federation, enrol
from fedcompose.signing import SIGNATURE_FILE
from tests.attacks.attack import Cases, Contribution, Mutation

NOBODY = "urn:uuid:00000000-0000-4000-8000-000000000009"


def newer_first(attack: Contribution) -> None:
    """The coordinator has a newer contribution when the old one is sent once more."""
    assert attack.receive(attack.another()).outcome == "admitted"


def same_number_again(attack: Contribution) -> None:
    """Other claims under a number that was used."""
    attack.admit()
    attack.claim(expires="2099-01-01T00:00:00Z")


def mixed_rounds(attack: Contribution) -> None:
    """Weights and claims of one round with the signature of the next, each of them made by the site."""
    shutil.copy(attack.another() / SIGNATURE_FILE, attack.path(SIGNATURE_FILE))


def claims_of_another_round(attack: Contribution) -> None:
    shutil.copy(attack.another() / "provenance.json", attack.path("provenance.json"))


def another_federation_of_the_same_site(attack: Contribution) -> None:
    """The site's key belongs to two federations; what was signed for one is sent to the coordinator of the other."""
    sim = attack.sim
    bases = {base.name: base.dir_hash for base in sim.federation.base_models}
    envelope = create_federation("Other", sim.root, "root", bases, NOBODY, sim.now)
    for request in (
        sim.sites["site-a"].folder / "keys" / "site-a.enroll.json",
        sim.sites["site-b"].folder / "keys" / "site-b.enroll.json",
    ):
        envelope = enrol(envelope, request.read_bytes(), sim.root, sim.now)
    sim.envelope = envelope


def other_base(attack: Contribution) -> None:
    def change(document: dict[str, Any]) -> None:
        document["predicate"]["buildDefinition"]["resolvedDependencies"][0]["digest"]["dirHash"] = "0" * 64

    attack.edit("provenance.json", change)
    attack.sign()


def other_subjects(attack: Contribution) -> None:
    def change(document: dict[str, Any]) -> None:
        document["subject"][0]["digest"]["sha256"] = "0" * 64

    attack.edit("provenance.json", change)
    attack.sign_only()


def subject_twice(attack: Contribution) -> None:
    attack.edit("provenance.json", lambda d: d["subject"].append(d["subject"][0]))
    attack.sign_only()


def repeated(text: bytes) -> Mutation:
    """A field twice, so that two readers could believe two different things."""

    def mutate(attack: Contribution) -> None:
        attack.rewrite("provenance.json", lambda data: data.replace(text, text + b" 1, " + text, 1))
        attack.sign_only()

    return mutate


def builder(identity: str) -> Mutation:
    def mutate(attack: Contribution) -> None:
        attack.edit("provenance.json", lambda d: d["predicate"]["runDetails"]["builder"].update(id=identity))
        attack.sign_only()

    return mutate


def metrics(text: str) -> Mutation:
    """What claims to be numbers holds something else."""

    def mutate(attack: Contribution) -> None:
        content = base64.b64encode(text.encode()).decode()
        attack.edit("provenance.json", lambda d: d["predicate"]["runDetails"]["byproducts"][0].update(content=content))
        attack.sign_only()

    return mutate


def after(time: timedelta) -> Mutation:
    def mutate(attack: Contribution) -> None:
        attack.sim.now += time

    return mutate


def named(call: Call) -> dict[str, str]:
    """What an answer says about the call that it answers."""
    return {"id": call.id, "nonce": call.nonce, "sha256": call.digest}


def answer(wrong: dict[str, str] | None = None, **call: Any) -> Mutation:
    """The contribution answers a call of this coordinator, or nearly."""
    return lambda attack: attack.claim(call=named(attack.call(**call)) | (wrong or {}))


def too_late(attack: Contribution) -> None:
    """Made after the call ended."""
    made = attack.call()
    attack.sim.now += timedelta(hours=2)
    attack.folder = attack.another()
    attack.claim(call=named(made))


def twice(attack: Contribution) -> None:
    made = attack.call()
    assert attack.receive(attack.another(made)).outcome == "admitted"
    attack.folder = attack.another(made)


def kind_of_traces(attack: Contribution) -> None:
    def change(document: dict[str, Any]) -> None:
        build = document["predicate"]["buildDefinition"]
        build["buildType"] = "https://fedcompose.dev/distill/v1"
        del build["externalParameters"]["lora"]
        build["externalParameters"]["traces"] = {"classes": {"B": 1}, "declaredNonPrivate": False}

    attack.edit("provenance.json", change)
    attack.sign()


CLAIMS: Cases = {
    "key-of-a-stranger": (lambda a: a.sign(a.stranger()), "KEY_UNKNOWN"),
    "key-of-the-coordinator": (lambda a: a.sign(a.sim.coordinator), "KEY_UNKNOWN"),
    "key-of-a-root": (lambda a: a.sign(a.sim.root), "KEY_UNKNOWN"),
    "key-of-another-site": (lambda a: a.sign(a.sim.sites["site-b"].signer), "SITE_MISMATCH"),
    "claims-another-site": (lambda a: a.claim(site="site-b"), "PROVENANCE_INVALID"),
    "claims-another-domain": (lambda a: a.claim(domain="ordering"), "DOMAIN_MISMATCH"),
    "claims-another-kind": (kind_of_traces, "PROVENANCE_KIND"),
    "claims-another-federation": (lambda a: a.claim(federation=NOBODY), "FEDERATION_MISMATCH"),
    "sent-to-another-federation": (another_federation_of_the_same_site, "FEDERATION_MISMATCH"),
    "claims-a-federation-file-to-come": (lambda a: a.claim(federationVersion=99), "FEDERATION_OLD"),
    "claims-another-base": (other_base, "BASE_MISMATCH"),
    "claims-another-builder": (builder("urn:fedcompose:coordinator:hub"), "PROVENANCE_INVALID"),
    "claims-another-lora": (
        lambda a: a.claim(lora={"r": 8, "alpha": 8.0, "targets": ["up_proj"]}),
        "PROVENANCE_CONTENT",
    ),
    "claims-an-audit-below-its-own-limit": (
        lambda a: a.claim(audit={"verdict": "fail", "target": "twin"}, limits={"requireAudit": "pass"}),
        "AUDIT_BELOW_LIMIT",
    ),
    "claims-less-privacy-than-its-own-limit": (
        lambda a: a.claim(limits={"requireAudit": "none", "maxEpsilon": 8.0}),
        "EPSILON_ABOVE_LIMIT",
    ),
    "claims-an-audit-with-a-note": (
        lambda a: a.claim(audit={"verdict": "pass", "target": "twin", "note": "patient 7"}),
        "PROVENANCE_INVALID",
    ),
    "claims-about-other-files": (other_subjects, "PROVENANCE_SUBJECTS"),
    "claims-about-a-file-twice": (subject_twice, "PROVENANCE_INVALID"),
    "claims-smuggled": (lambda a: a.claim(host="gpu-7"), "PROVENANCE_INVALID"),
    "claims-in-two-versions": (repeated(b'"sequence":'), "JSON_INVALID"),
    "claims-a-site-with-an-escape": (lambda a: a.claim(site="\x1b[31msite-a"), "PROVENANCE_INVALID"),
    "metrics-that-are-text": (metrics('{"note": "patient 7"}'), "PROVENANCE_INVALID"),
    "metrics-with-an-escape": (metrics('{"\\u001b[31m": 1}'), "PROVENANCE_INVALID"),
    "metrics-that-are-infinite": (metrics('{"loss": 1e999}'), "JSON_INVALID"),
    "weights-and-claims-of-two-rounds": (mixed_rounds, "FILE_CHANGED"),
    "claims-of-another-round": (claims_of_another_round, "FILE_CHANGED"),
    "expired": (lambda a: a.claim(expires="2026-01-01T00:00:00Z"), "CONTRIBUTION_EXPIRED"),
    "sent-after-it-expired": (after(timedelta(days=60)), "CONTRIBUTION_EXPIRED"),
    "from-the-future": (after(-timedelta(hours=1)), "CONTRIBUTION_FROM_FUTURE"),
    "answers-an-unknown-call": (
        lambda a: a.claim(call={"id": "x", "nonce": "0" * 64, "sha256": "0" * 64}),
        "CALL_UNKNOWN",
    ),
    "answers-with-another-nonce": (answer({"nonce": "0" * 64}), "CALL_UNKNOWN"),
    "answers-another-call-of-this-name": (answer({"sha256": "0" * 64}), "CALL_UNKNOWN"),
    "answers-too-late": (too_late, "CALL_EXPIRED"),
    "answers-twice": (twice, "CALL_ANSWERED"),
    "answers-with-another-kind": (answer(want=["traces"]), "CALL_KIND"),
    "answers-with-another-rank": (answer(lora=WantedLora(rank=2)), "CALL_SHAPE"),
    "answers-with-other-modules": (answer(lora=WantedLora(targets=("up_proj",))), "CALL_SHAPE"),
    "older-than-what-was-admitted": (newer_first, "REPLAYED"),
    "number-used-twice": (same_number_again, "REPLAYED"),
    "number-of-zero": (lambda a: a.claim(sequence=0), "PROVENANCE_INVALID"),
    "number-beyond-counting": (lambda a: a.claim(sequence=1 << 60), "PROVENANCE_INVALID"),
}
