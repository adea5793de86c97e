"""Attacks on a release: by whoever passes it on, and by a coordinator that signs something else than it should."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from fedcompose.document import format_time
from fedcompose.drafts import create_federation
from fedcompose.federation import Federation
from fedcompose.files import dir_hash, folder_digests
from fedcompose.revocations import RevokedKey, WithdrawnRelease, next_revocations, no_revocations
from fedcompose.signing import SignedFiles, verify_files
from fedcompose.tensors import canonical_safetensors
from fedcompose.trust_state import accept_revocations, trusted_federation
from tests.attacks.attack import (
    Cases,
    Change,
    Contribution,
    Mutation,
    Release,
    hardlink,
    symlink,
    tensor,
    with_file,
    with_signed_file,
)
from tests.attacks.weights import INFINITY, NAN, WEIGHTS, file_of

ROUTER = "router.safetensors"
OURS, THEIRS = "ingredients/site-a", "ingredients/site-b"


def composition(change: Change) -> Mutation:
    """The coordinator writes another composition and signs it."""

    def mutate(attack: Release) -> None:
        attack.edit("composition.json", change)
        attack.sign()

    return mutate


def ingredients(change: Change) -> Mutation:
    """... makes other claims about the experts (the base is the first entry)."""

    def mutate(attack: Release) -> None:
        attack.edit("provenance.json", lambda d: change(d["predicate"]["buildDefinition"]["resolvedDependencies"]))
        attack.sign()

    return mutate


def claims(change: Change) -> Mutation:
    def mutate(attack: Release) -> None:
        attack.edit("provenance.json", lambda d: change(d["predicate"]))
        attack.sign()

    return mutate


def router(shape: tuple[int, ...], value: bytes = bytes(4)) -> Mutation:
    return with_signed_file(ROUTER, canonical_safetensors({"weight": tensor(shape, value)}))


def replaced_expert(attack: Release) -> None:
    """One site's weights in another's place, named in everything that the coordinator signs."""
    shutil.copy(attack.path(f"{THEIRS}/{WEIGHTS}"), attack.path(f"{OURS}/{WEIGHTS}"))
    attack.sign()


def altered_expert(attack: Release) -> None:
    attack.rewrite(f"{OURS}/{WEIGHTS}", lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    attack.sign()


def forged_expert(attack: Release) -> None:
    """The coordinator signs its own weights as the site's."""
    replaced_expert(attack)
    Release(attack.sim, attack.path(OURS), attack.signer).sign()
    attack.sign()


def swapped_experts(attack: Release) -> None:
    """Two genuine contributions under each other's names."""
    attack.path(OURS).rename(attack.path("ingredients/x"))
    attack.path(THEIRS).rename(attack.path(OURS))
    attack.path("ingredients/x").rename(attack.path(THEIRS))
    attack.sign()


def dropped_expert(attack: Release) -> None:
    shutil.rmtree(attack.path(THEIRS))
    attack.sign()


def another_round(attack: Release) -> None:
    """A genuine contribution of the site, but not the one that the release says was used."""
    newer = Contribution(attack.sim, attack.folder, attack.signer).another()
    shutil.rmtree(attack.path(OURS))
    shutil.copytree(newer, attack.path(OURS))
    attack.sign()


def answering(attack: Release, *calls: str) -> None:
    """Both experts answer a call of one name; `calls` are the digests of what each site was told."""
    for row, (site, digest) in enumerate(zip(("site-a", "site-b"), calls, strict=True)):
        expert = Release(attack.sim, attack.path(f"ingredients/{site}"), attack.sim.sites[site].signer)
        expert.claim(call={"id": "round-1", "nonce": "0" * 64, "sha256": digest})
        rename_expert(attack, row, verify_files(expert.path("model.sig").read_bytes(), expert.signer.public_pem))
    attack.sign()


def rename_expert(attack: Release, row: int, signed: SignedFiles) -> None:
    """The coordinator names an expert by what its site has signed now."""
    named = {"dirHash": dir_hash(signed.digests)}
    attack.edit("composition.json", lambda document: document["experts"][row].update(named))

    def change(document: dict[str, Any]) -> None:
        entry = document["predicate"]["buildDefinition"]["resolvedDependencies"][row + 1]
        entry["digest"].update(named)
        entry["annotations"].update(omsPayloadSha256=signed.payload_sha256)

    attack.edit("provenance.json", change)


def listed_twice_everywhere(attack: Release) -> None:
    """One expert in two rows of everything that the coordinator signs, so that it weighs more than it seems."""
    attack.edit("composition.json", lambda document: document["experts"].append(document["experts"][0]))
    ingredients(lambda entries: entries.append(entries[1]))(attack)
    router((3, 32))(attack)


def claims_about_other_files(attack: Release) -> None:
    """The provenance of a release with another router, signed beside this one."""
    other = {"sha256": "0" * 64}
    attack.edit("provenance.json", lambda d: next(s for s in d["subject"] if s["name"] == ROUTER).update(digest=other))
    attack.sign_only()


def traces_beside_an_expert(attack: Release) -> None:
    shutil.copy(attack.sim.sites["site-a"].outbox / "traces" / "traces.jsonl", attack.path(OURS))
    attack.sign()


def own_root(attack: Release) -> None:
    """A federation file of the attacker, who is its own root."""
    bases = {base.name: base.dir_hash for base in attack.sim.federation.base_models}
    envelope = create_federation("Test", attack.stranger(), "eve", bases, attack.sim.federation.id, attack.sim.now)
    attack.path("federation.json").write_bytes(envelope)
    attack.sign()


def at(time: timedelta) -> Mutation:
    """Somebody verifies at another time."""

    def mutate(attack: Release) -> None:
        attack.sim.now += time

    return mutate


def linked_expert(attack: Release) -> None:
    attack.path("ingredients/site-c").symlink_to(attack.path(OURS))


def weights_in_attention(data: bytes) -> Mutation:
    return with_signed_file(f"attention/{WEIGHTS}", data)


def renamed(attack: Release) -> None:
    """Nobody may call itself by a name that is no name."""
    folder = attack.path("ingredients") / "SITE-A"
    attack.path(OURS).rename(folder)
    attack.sign()


def moved(name: str, to: str) -> Mutation:
    def mutate(attack: Release) -> None:
        (target := attack.path(to)).parent.mkdir(exist_ok=True)
        Path(attack.path(name)).rename(target)
        attack.sign()

    return mutate


def note(**changes: Any) -> Change:
    """Other words about the expert of site-a."""
    return lambda entries: entries[1]["annotations"].update(changes)


def knows(withdraw: Callable[[Release, Federation], bytes]) -> Mutation:
    """This machine has accepted the federation file, and a revocation list."""

    def mutate(attack: Release) -> None:
        sim = attack.sim
        accept_revocations(withdraw(attack, trusted_federation(sim.envelope, [sim.root.keyid], sim.now)))

    return mutate


def key_withdrawn(signer: Callable[[Release], Any]) -> Mutation:
    """A key that signed a part of the release was in other hands before that."""

    def withdraw(attack: Release, federation: Federation) -> bytes:
        sim = attack.sim
        entry = RevokedKey(keyid=signer(attack).keyid, at=sim.now - timedelta(hours=1), reason="compromised")
        return next_revocations(no_revocations(federation.id), [entry], [], sim.root, sim.now)

    return knows(withdraw)


def release_withdrawn(attack: Release, federation: Federation) -> bytes:
    digests = folder_digests(attack.folder)
    del digests["model.sig"]
    entry = WithdrawnRelease(dirHash=dir_hash(digests), at=attack.sim.now)
    return next_revocations(no_revocations(federation.id), [], [entry], attack.sim.root, attack.sim.now)


def made(at: timedelta) -> Mutation:
    """The coordinator claims another time, within the life of its key."""

    def mutate(attack: Release) -> None:
        time = format_time(attack.sim.now + at)
        attack.edit("provenance.json", lambda d: d["predicate"]["runDetails"]["metadata"].update(finishedOn=time))
        attack.sign()
        attack.sim.now += max(at, timedelta(0))

    return mutate


RELEASES: Cases = {
    "release-signed-by-a-site": (lambda a: a.sign(a.sim.sites["site-a"].signer), "KEY_UNKNOWN"),
    "release-signed-by-a-root": (lambda a: a.sign(a.sim.root), "KEY_UNKNOWN"),
    "release-signed-by-a-stranger": (lambda a: a.sign(a.stranger()), "KEY_UNKNOWN"),
    "release-unsigned": (lambda a: a.path("model.sig").unlink(), "FILE_MISSING"),
    "release-with-a-root-of-its-own": (own_root, "TRUST_ROOT_UNKNOWN"),
    "release-from-the-future": (at(-timedelta(hours=1)), "RELEASE_FROM_FUTURE"),
    "release-made-after-its-federation-file-expired": (made(timedelta(days=91)), "FEDERATION_EXPIRED"),
    "release-made-before-its-federation-file": (made(-timedelta(minutes=1)), "FEDERATION_OLD"),
    "release-withdrawn": (knows(release_withdrawn), "RELEASE_WITHDRAWN"),
    "release-by-a-compromised-coordinator": (key_withdrawn(lambda a: a.sim.coordinator), "KEY_REVOKED"),
    "release-with-an-expert-of-a-compromised-site": (
        key_withdrawn(lambda a: a.sim.sites["site-b"].signer),
        "KEY_REVOKED",
    ),
    "release-by-another-coordinator": (
        claims(lambda p: p["runDetails"]["builder"].update(id="urn:fedcompose:coordinator:other")),
        "COORDINATOR_MISMATCH",
    ),
    "release-with-claims-of-a-contribution": (
        lambda a: shutil.copy(a.path(f"{OURS}/provenance.json"), a.path("provenance.json")),
        "PROVENANCE_INVALID",
    ),
    "release-with-claims-about-other-files": (claims_about_other_files, "PROVENANCE_SUBJECTS"),
    "release-for-another-federation": (
        claims(
            lambda p: p["buildDefinition"]["externalParameters"].update(
                federation="urn:uuid:00000000-0000-4000-8000-000000000009"
            )
        ),
        "FEDERATION_MISMATCH",
    ),
    "release-extra-traces": (with_file("traces.jsonl"), "FILE_UNEXPECTED"),
    "release-extra-pickle": (with_file(f"{OURS}/adapter_model.bin"), "FILE_UNEXPECTED"),
    "release-extra-chat-template": (with_file("chat_template.jinja"), "FILE_UNEXPECTED"),
    "release-extra-site": (with_file("ingredients/site-c/adapter_config.json"), "FILE_MISSING"),
    "release-extra-evaluation": (with_file("evaluation.json", b"{}"), "FILE_UNSIGNED"),
    "release-traces-beside-an-expert": (traces_beside_an_expert, "FILE_UNEXPECTED"),
    "release-deep-folder": (with_file(f"{OURS}/a/b"), "FILE_UNEXPECTED"),
    "release-site-that-is-no-name": (renamed, "FILE_UNEXPECTED"),
    "release-symbolic-link": (symlink("composition.json"), "FILE_NOT_REGULAR"),
    "release-symbolic-link-to-a-folder": (linked_expert, "FILE_NOT_REGULAR"),
    "release-hard-link": (hardlink(ROUTER), "FILE_LINKED"),
    "expert-replaced": (replaced_expert, "FILE_CHANGED"),
    "expert-altered": (altered_expert, "FILE_CHANGED"),
    "expert-forged": (forged_expert, "KEY_UNKNOWN"),
    "expert-swapped": (swapped_experts, "INGREDIENT_MISMATCH"),
    "expert-left-out": (dropped_expert, "COMPOSITION_EXPERTS"),
    "expert-of-another-round": (another_round, "INGREDIENT_MISMATCH"),
    "expert-listed-twice": (composition(lambda c: c["experts"].append(c["experts"][0])), "COMPOSITION_EXPERTS"),
    "expert-listed-twice-everywhere": (listed_twice_everywhere, "COMPOSITION_EXPERTS"),
    "expert-rows-swapped": (composition(lambda c: c["experts"].reverse()), "COMPOSITION_EXPERTS"),
    "expert-under-another-domain": (
        composition(lambda c: c["experts"][0].update(domain="law")),
        "INGREDIENT_MISMATCH",
    ),
    "expert-by-another-key": (ingredients(note(keyid="0" * 64)), "INGREDIENT_MISMATCH"),
    "expert-of-another-number": (ingredients(note(sequence=1 << 40)), "INGREDIENT_MISMATCH"),
    "expert-of-another-statement": (ingredients(note(omsPayloadSha256="0" * 64)), "INGREDIENT_MISMATCH"),
    "expert-before-its-key-counted": (ingredients(note(receivedOn="2020-01-01T00:00:00Z")), "KEY_EXPIRED"),
    "expert-after-the-release": (ingredients(note(receivedOn="2126-01-01T00:00:00Z")), "INGREDIENT_TIME"),
    "expert-of-another-call-of-the-same-name": (
        lambda a: answering(a, "1" * 64, "2" * 64),
        "INGREDIENT_CALL",
    ),
    "base-of-another-federation": (ingredients(lambda d: d[0]["digest"].update(dirHash="0" * 64)), "BASE_MISMATCH"),
    "base-twice": (ingredients(lambda d: d.append(d[0])), "PROVENANCE_INVALID"),
    "composition-of-another-base": (composition(lambda c: c["base"].update(dirHash="0" * 64)), "COMPOSITION_MISMATCH"),
    "composition-unknown-field": (composition(lambda c: c.update(trust_remote_code=True)), "COMPOSITION_INVALID"),
    "composition-other-method": (composition(lambda c: c.update(method="magic")), "COMPOSITION_MISMATCH"),
    "composition-unknown-router": (composition(lambda c: c["router"].update(scorer="magic")), "COMPOSITION_INVALID"),
    "composition-senseless-router": (
        composition(lambda c: c["router"].update(estimator="top_k")),
        "COMPOSITION_INVALID",
    ),
    "composition-no-router": (composition(lambda c: c.update(router=None)), "COMPOSITION_INVALID"),
    "composition-masked-and-there": (
        composition(lambda c: c.update(masked=[c["experts"][0]["site"]])),
        "COMPOSITION_EXPERTS",
    ),
    "composition-no-attention": (composition(lambda c: c.update(attention=None)), "COMPOSITION_MISMATCH"),
    "composition-other-attention": (composition(lambda c: c["attention"].update(r=8)), "COMPOSITION_MISMATCH"),
    "composition-no-object": (with_signed_file("composition.json", b"[]"), "COMPOSITION_INVALID"),
    "composition-key-twice": (with_signed_file("composition.json", b'{"a": 1, "a": 2}'), "JSON_INVALID"),
    "router-nan": (router((2, 32), NAN), "ROUTER_INVALID"),
    "router-infinite": (router((2, 32), INFINITY), "ROUTER_INVALID"),
    "router-row-too-few": (router((1, 32)), "ROUTER_INVALID"),
    "router-of-one-number": (
        with_signed_file(ROUTER, file_of({"w": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, bytes(4))),
        "SAFETENSORS_INVALID",
    ),
    "router-pickle": (with_signed_file(ROUTER, b"\x80\x04K\x01."), "SAFETENSORS_INVALID"),
    "attention-pickle": (weights_in_attention(b"\x80\x04K\x01."), "SAFETENSORS_INVALID"),
    "attention-altered": (
        lambda a: a.rewrite(f"attention/{WEIGHTS}", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        "FILE_CHANGED",
    ),
    "attention-over-the-base": (
        moved("attention/adapter_config.json", "attention/lm_head.json"),
        "FILE_UNEXPECTED",
    ),
    "evaluation-no-object": (with_signed_file("evaluation.json", b"[]"), "EVALUATION_INVALID"),
}
