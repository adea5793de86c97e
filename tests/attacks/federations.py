"""Attacks on the federation file and the revocation list, judged by a machine that accepted earlier ones."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedcompose.call import CALL_TYPE
from fedcompose.drafts import amend, create_federation, enrol, sign_draft
from fedcompose.federation_file import FEDERATION_TYPE, open_federation
from fedcompose.files import sha256_hex
from fedcompose.keys import read_enrolment
from fedcompose.revocations import (
    REVOCATIONS_TYPE,
    RevokedKey,
    WithdrawnRelease,
    next_revocations,
    no_revocations,
)
from fedcompose.signing import Signer, keyid_of, sign_envelope
from fedcompose.trust_state import accept_federation, accept_revocations, trusted_federation
from tests.attacks.attack import Cases, Change, Mutation, refusal_of
from tests.federation_files import BASES, NOW, request, signer

FEDERATION = "urn:uuid:6b0c0000-0000-4000-8000-000000000002"


@dataclass
class History:
    """The versions of a federation file whose changes two roots have to sign, and everybody's keys."""

    roots: list[Signer] = field(default_factory=list)
    versions: list[bytes] = field(default_factory=list)
    keys: dict[str, Signer] = field(default_factory=dict)
    seed: int = 1000

    @property
    def current(self) -> bytes:
        return self.versions[-1]

    def key(self, name: str, role: str = "site") -> bytes:
        """A new key; what it asks for."""
        self.keys[name] = signer(self.seed + len(self.keys))
        return request(self.keys[name], name, role, "clock" if role == "site" else None)

    def follow(self, proposed: bytes) -> None:
        """Add a version that the first root proposed, once the second has signed it."""
        accepted = open_federation(self.current) if self.versions else None
        self.versions.append(sign_draft(proposed, accepted, self.roots[1], NOW))

    def enrol(self, name: str, role: str = "site") -> None:
        self.follow(enrol(self.current, self.key(name, role), self.roots[0], NOW))


def two_roots(seed: int = 1000) -> History:
    """Version 1 with two roots, then a coordinator and two sites."""
    made = History(seed=seed)
    _, second = (made.key(name, "root") for name in ("root-1", "root-2"))
    made.roots = [made.keys["root-1"], made.keys["root-2"]]
    others = [read_enrolment(second)]
    made.follow(create_federation("Test", made.roots[0], "root-1", BASES, FEDERATION, NOW, others=others, threshold=2))
    made.enrol("hub", "coordinator")
    made.enrol("site-a")
    made.enrol("site-b")
    return made


@dataclass
class FederationFile:
    """The newest version on its way to a machine that accepted the one before."""

    made: History
    envelope: bytes
    now: datetime = NOW
    fingerprints: list[str] | None = None

    def refusal(self) -> str:
        before = remembered()
        code = refusal_of(self.admit)
        assert remembered() == before, "something of the attack was remembered"
        return code

    def admit(self) -> None:
        trusted_federation(self.envelope, self.fingerprints, self.now)

    def sign(self, change: Change, *signers: Signer, payload_type: str = FEDERATION_TYPE) -> None:
        """Another document in the place of the newest version, by these signers: by default both roots."""
        payload = json.loads(base64.b64decode(json.loads(self.envelope)["payload"]))
        changed = change(payload)
        text = json.dumps(payload if changed is None else changed).encode()
        self.envelope = sign_envelope(text, payload_type, signers or self.made.roots)

    def stranger(self, name: str = "eve") -> Signer:
        self.made.key(name, "root")
        return self.made.keys[name]


def remembered() -> dict[str, bytes]:
    """All that this machine remembers about federations."""
    home = Path(os.environ["FEDCOMPOSE_HOME"])
    names = ("*.json", "federations/*", "revocations/*")
    return {str(path): path.read_bytes() for name in names for path in home.glob(name)}


def a_federation_file(released: object, tmp_path: Path) -> FederationFile:
    made = two_roots()
    trusted_federation(made.versions[-2], [root.keyid for root in made.roots], NOW)
    return FederationFile(made, made.current)


def a_first_federation_file(released: object, tmp_path: Path) -> FederationFile:
    """The same on a machine that knows nothing but the roots' fingerprints."""
    made = two_roots()
    return FederationFile(made, made.current, fingerprints=[root.keyid for root in made.roots])


def says(change: Change) -> Mutation:
    """The roots sign a document that is not one, or a courier with their help."""
    return lambda attack: attack.sign(change)


def outside(change: Change) -> Mutation:
    def mutate(attack: Any) -> None:
        envelope = json.loads(attack.envelope)
        change(envelope)
        attack.envelope = json.dumps(envelope).encode()

    return mutate


def becomes(read: Callable[[Any], bytes]) -> Mutation:
    def mutate(attack: Any) -> None:
        attack.envelope = read(attack)

    return mutate


def at(time: timedelta) -> Mutation:
    def mutate(attack: FederationFile) -> None:
        attack.now += time

    return mutate


def by_one_root(attack: FederationFile) -> None:
    """A genuine next version that only one root has signed."""
    attack.envelope = amend(attack.envelope, lambda document: None, attack.made.roots[0], attack.now)


def threshold_lowered(attack: FederationFile) -> None:
    """One root makes a version for which one root is enough."""
    attack.sign(lambda document: document.update(threshold=1), attack.made.roots[0])


def roots_replaced(attack: FederationFile) -> None:
    """The attacker's own roots sign a file in which they are the roots."""
    eve, mallory = attack.stranger(), attack.stranger("mallory")
    attack.sign(lambda document: document.update(roots=[entry(eve), entry(mallory)]), eve, mallory)


def one_root_replaced(attack: FederationFile) -> None:
    """One root and the attacker."""
    first, eve = attack.made.roots[0], attack.stranger()
    attack.sign(lambda document: document["roots"].__setitem__(1, entry(eve)), first, eve)


def entry(signer: Signer, keyid: str | None = None) -> dict[str, str]:
    return {"keyid": keyid or signer.keyid, "name": "root", "public_key": signer.public_pem.decode()}


def one_key_under_two_names(attack: FederationFile) -> None:
    """Two roots that are one: the same key under another fingerprint, and a signature under each."""
    first = attack.made.roots[0]
    other = "0" * 64
    attack.sign(lambda document: document.update(roots=[entry(first), entry(first, other)]), first)
    outside(lambda envelope: envelope["signatures"].append(envelope["signatures"][0] | {"keyid": other}))(attack)


def expired_while_the_clock_was_wrong(attack: FederationFile) -> None:
    """The machine has used the file late in its life; then its clock is set back, so that an old one counts again."""
    attack.admit()
    attack.now += timedelta(days=80)
    attack.admit()
    attack.now -= timedelta(days=60)


def other_content(attack: FederationFile) -> None:
    """The version that the machine accepted, with another content."""
    attack.envelope = attack.made.versions[-2]
    attack.sign(lambda document: document.update(name="Test, but other"))


def swapped_keys(attack: FederationFile) -> None:
    """Both roots sign a version in which two sites have each other's keys."""
    attack.admit()

    def swap(document: dict[str, Any]) -> None:
        first, second = document["sites"]
        first["keys"], second["keys"] = second["keys"], first["keys"]

    attack.envelope = next_version(attack, swap)


def next_version(attack: FederationFile, change: Change) -> bytes:
    """A version that both roots sign without looking, after the one on its way."""
    envelope = json.loads(attack.envelope)
    document = json.loads(payload := base64.b64decode(envelope["payload"]))
    document |= {"version": document["version"] + 1, "previous": sha256_hex(payload)}
    change(document)
    return sign_envelope(json.dumps(document).encode(), FEDERATION_TYPE, attack.made.roots)


def key_of(private: Any) -> dict[str, str]:
    pem = private.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return {"keyid": keyid_of(pem), "public_key": pem.decode()}


def site_key(**changes: Any) -> Mutation:
    return says(lambda document: document["sites"][0]["keys"][0].update(changes))


def other_federation(attack: FederationFile) -> None:
    """Another federation's file, genuine, under the roots' fingerprints of this one."""
    attack.envelope = two_roots(seed=2000).current


FIRST: Cases = {
    "first-without-fingerprints": (lambda a: setattr(a, "fingerprints", None), "TRUST_ROOT_UNKNOWN"),
    "first-with-too-few-fingerprints": (lambda a: a.fingerprints.pop(), "TRUST_ROOT_UNKNOWN"),
    "first-with-a-fingerprint-twice": (
        lambda a: setattr(a, "fingerprints", a.fingerprints[:1] * 2),
        "TRUST_ROOT_UNKNOWN",
    ),
    "first-with-another-fingerprint": (
        lambda a: setattr(a, "fingerprints", [*a.fingerprints, a.stranger().keyid]),
        "TRUST_ROOT_UNKNOWN",
    ),
    "first-of-another-federation": (other_federation, "TRUST_ROOT_UNKNOWN"),
    "first-with-roots-of-its-own": (roots_replaced, "TRUST_ROOT_UNKNOWN"),
    "first-with-the-threshold-lowered": (threshold_lowered, "TRUST_ROOT_UNKNOWN"),
    "first-expired": (at(timedelta(days=91)), "FEDERATION_EXPIRED"),
    "first-from-the-future": (at(-timedelta(days=30)), "CLOCK_BEHIND"),
}

NEXT: Cases = {
    "federation-rolled-back": (becomes(lambda a: a.made.versions[0]), "FEDERATION_ROLLBACK"),
    "federation-frozen": (at(timedelta(days=91)), "FEDERATION_EXPIRED"),
    "federation-clock-set-back": (expired_while_the_clock_was_wrong, "CLOCK_BEHIND"),
    "federation-from-the-future": (at(-timedelta(days=30)), "CLOCK_BEHIND"),
    "federation-forked": (other_content, "FEDERATION_FORK"),
    "federation-that-follows-another": (says(lambda d: d.update(previous="0" * 64)), "FEDERATION_FORK"),
    "federation-signed-by-one-of-two": (by_one_root, "FEDERATION_THRESHOLD"),
    "federation-threshold-lowered": (threshold_lowered, "TRUST_ROOT_UNKNOWN"),
    "federation-threshold-of-nobody": (says(lambda d: d.update(threshold=0)), "FEDERATION_INVALID"),
    "federation-threshold-beyond-its-roots": (says(lambda d: d.update(threshold=3)), "FEDERATION_INVALID"),
    "federation-roots-replaced": (roots_replaced, "TRUST_ROOT_UNKNOWN"),
    "federation-one-root-replaced": (one_root_replaced, "TRUST_ROOT_UNKNOWN"),
    "federation-signed-by-a-stranger": (lambda a: a.sign(lambda d: None, a.stranger()), "ENVELOPE_KEY"),
    "federation-signed-by-the-coordinator": (lambda a: a.sign(lambda d: None, a.made.keys["hub"]), "ENVELOPE_KEY"),
    "federation-one-key-as-two-roots": (one_key_under_two_names, "FEDERATION_INVALID"),
    "federation-one-signature-twice": (
        outside(lambda e: e.update(signatures=e["signatures"][:1] * 2)),
        "ENVELOPE_SHAPE",
    ),
    "federation-one-signature-wrong": (
        outside(lambda e: e["signatures"][1].update(sig=e["signatures"][0]["sig"])),
        "ENVELOPE_INVALID",
    ),
    "federation-unsigned": (outside(lambda e: e.update(signatures=[])), "ENVELOPE_SHAPE"),
    "federation-thousand-signatures": (
        outside(lambda e: e["signatures"].extend({"keyid": f"{n:064x}", "sig": "AAAA"} for n in range(1000))),
        "ENVELOPE_SHAPE",
    ),
    "federation-altered": (
        outside(lambda e: e.update(payload=base64.b64encode(b" " + base64.b64decode(e["payload"])).decode())),
        "ENVELOPE_INVALID",
    ),
    "federation-unknown-field-outside": (outside(lambda e: e.update(trusted=True)), "ENVELOPE_SHAPE"),
    "federation-unknown-field-inside": (says(lambda d: d.update(admin="eve")), "FEDERATION_INVALID"),
    "federation-of-another-version": (
        says(lambda d: d.update(schema="fedcompose/federation/v2")),
        "FEDERATION_INVALID",
    ),
    "federation-labelled-as-a-call": (outside(lambda e: e.update(payloadType=CALL_TYPE)), "ENVELOPE_TYPE"),
    "federation-signed-as-a-call": (
        lambda a: (a.sign(lambda d: None, payload_type=CALL_TYPE), outside(relabel)(a)),
        "ENVELOPE_INVALID",
    ),
    "federation-that-is-an-enrolment": (becomes(lambda a: a.made.key("new")), "ENVELOPE_TYPE"),
    "federation-no-json": (becomes(lambda a: b"\x80\x04K\x01."), "ENVELOPE_SHAPE"),
    "federation-key-twice-in-json": (
        lambda a: setattr(a, "envelope", a.envelope.replace(b'"payloadType":', b'"payloadType":"x","payloadType":')),
        "ENVELOPE_SHAPE",
    ),
    "federation-endless-numbers": (says(lambda d: d.update(version=1 << 60)), "FEDERATION_INVALID"),
    "federation-deep": (says(lambda d: d.update(name=json.loads("[" * 40 + "]" * 40))), "JSON_INVALID"),
    "federation-keys-swapped": (swapped_keys, "FEDERATION_KEY_MOVED"),
    "federation-key-at-two-sites": (
        says(lambda d: d["sites"][1].update(keys=d["sites"][0]["keys"])),
        "FEDERATION_INVALID",
    ),
    "federation-key-at-a-site-and-the-coordinator": (
        says(lambda d: d["coordinators"][0].update(keys=d["sites"][0]["keys"])),
        "FEDERATION_INVALID",
    ),
    "federation-key-of-a-root-at-a-site": (
        lambda a: a.sign(
            lambda d: d["sites"][0]["keys"][0].update(
                keyid=a.made.roots[0].keyid, public_key=a.made.roots[0].public_pem.decode()
            )
        ),
        "FEDERATION_INVALID",
    ),
    "federation-key-under-another-fingerprint": (site_key(keyid="0" * 64), "FEDERATION_INVALID"),
    "federation-key-of-another-kind": (
        site_key(**key_of(ed25519.Ed25519PrivateKey.from_private_bytes(b"7" * 32))),
        "KEY_UNUSABLE",
    ),
    "federation-key-on-another-curve": (site_key(**key_of(ec.derive_private_key(7, ec.SECP521R1()))), "KEY_UNUSABLE"),
    "federation-key-in-another-spelling": (
        says(
            lambda d: d["sites"][0]["keys"][0].update(
                public_key=d["sites"][0]["keys"][0]["public_key"].replace("\n", "\r\n")
            )
        ),
        "KEY_UNUSABLE",
    ),
    "federation-key-that-ends-before-it-begins": (site_key(not_after="2020-01-01T00:00:00Z"), "FEDERATION_INVALID"),
    "federation-time-in-another-zone": (
        says(lambda d: d.update(expires="2099-01-01T00:00:00+02:00")),
        "FEDERATION_INVALID",
    ),
    "federation-site-twice": (says(lambda d: d["sites"][1].update(id="site-a")), "FEDERATION_INVALID"),
    "federation-site-with-a-path": (says(lambda d: d["sites"][0].update(id="../../x")), "FEDERATION_INVALID"),
    "federation-site-with-an-escape": (says(lambda d: d["sites"][0].update(id="\x1b[2J")), "FEDERATION_INVALID"),
    "federation-name-with-an-escape": (says(lambda d: d.update(name="\x1b[2J")), "FEDERATION_INVALID"),
    "federation-right-that-is-none": (says(lambda d: d["sites"][0].update(may=["data"])), "FEDERATION_INVALID"),
}


def relabel(envelope: dict[str, Any]) -> None:
    envelope["payloadType"] = FEDERATION_TYPE


# --- the revocation list --------------------------------------------------------------------------


@dataclass
class RevocationList:
    """The second list on its way to a machine that accepted the first."""

    made: History
    first: bytes
    envelope: bytes

    def refusal(self) -> str:
        before = remembered()
        code = refusal_of(self.admit)
        assert remembered() == before, "something of the attack was remembered"
        return code

    def admit(self) -> None:
        accept_revocations(self.envelope)

    def sign(self, change: Change, signer: Signer | None = None, payload_type: str = REVOCATIONS_TYPE) -> None:
        payload = json.loads(base64.b64decode(json.loads(self.envelope)["payload"]))
        changed = change(payload)
        text = json.dumps(payload if changed is None else changed).encode()
        self.envelope = sign_envelope(text, payload_type, [signer or self.made.roots[0]])


def a_revocation_list(released: object, tmp_path: Path) -> RevocationList:
    made = two_roots()
    trusted_federation(made.current, [root.keyid for root in made.roots], NOW)
    entry = RevokedKey(keyid=made.keys["site-a"].keyid, at=NOW, reason="compromised")
    release = WithdrawnRelease(dirHash="2" * 64, at=NOW)
    first = next_revocations(no_revocations(FEDERATION), [entry], [release], made.roots[1], NOW)
    older = accept_revocations(first)
    other = RevokedKey(keyid=made.keys["site-b"].keyid, at=NOW, reason="rotated")
    return RevocationList(made, first, next_revocations(older, [other], [], made.roots[0], NOW))


def first_once_more(attack: RevocationList) -> None:
    attack.admit()
    attack.envelope = attack.first


def unknown_federation(attack: RevocationList) -> None:
    attack.sign(lambda document: document.update(federation="urn:uuid:00000000-0000-4000-8000-000000000009"))


def of_another_federation(attack: RevocationList) -> None:
    """A list of another federation with the same root, relabelled by nobody: just sent to the wrong place."""
    accept = "urn:uuid:6b0c0000-0000-4000-8000-000000000003"
    first, second = attack.made.roots
    envelope = create_federation("Other", first, "root-1", BASES, accept, NOW)
    accept_federation([envelope], [first.keyid], NOW)
    attack.sign(lambda document: document.update(federation=accept), second)


def listed(change: Change) -> Mutation:
    return lambda attack: attack.sign(change)


REVOCATIONS: Cases = {
    "revocations-rolled-back": (first_once_more, "REVOCATIONS_ROLLBACK"),
    "revocations-forked": (listed(lambda d: d.update(number=1)), "REVOCATIONS_FORK"),
    "revocations-take-a-key-back": (
        listed(lambda d: d.update(keys=d["keys"][1:])),
        "REVOCATIONS_ROLLBACK",
    ),
    "revocations-take-a-reason-back": (listed(lambda d: d["keys"][0].update(reason="rotated")), "REVOCATIONS_ROLLBACK"),
    "revocations-take-a-time-back": (
        listed(lambda d: d["keys"][0].update(at="2099-01-01T00:00:00Z")),
        "REVOCATIONS_ROLLBACK",
    ),
    "revocations-take-a-release-back": (listed(lambda d: d.update(releases=[])), "REVOCATIONS_ROLLBACK"),
    "revocations-by-a-site": (lambda a: a.sign(lambda d: None, a.made.keys["site-b"]), "ENVELOPE_KEY"),
    "revocations-by-the-coordinator": (lambda a: a.sign(lambda d: None, a.made.keys["hub"]), "ENVELOPE_KEY"),
    "revocations-of-an-unknown-federation": (unknown_federation, "TRUST_ROOT_UNKNOWN"),
    "revocations-of-another-federation": (of_another_federation, "ENVELOPE_KEY"),
    "revocations-altered": (
        outside(lambda e: e.update(payload=base64.b64encode(b" " + base64.b64decode(e["payload"])).decode())),
        "ENVELOPE_INVALID",
    ),
    "revocations-unsigned": (outside(lambda e: e.update(signatures=[])), "ENVELOPE_SHAPE"),
    "revocations-that-are-a-federation-file": (becomes(lambda a: a.made.current), "ENVELOPE_TYPE"),
    "revocations-signed-as-a-call": (lambda a: a.sign(lambda d: None, payload_type=CALL_TYPE), "ENVELOPE_TYPE"),
    "revocations-unknown-field": (listed(lambda d: d.update(restore=[])), "REVOCATIONS_INVALID"),
    "revocations-key-twice": (listed(lambda d: d["keys"].append(d["keys"][0])), "REVOCATIONS_INVALID"),
    "revocations-number-negative": (listed(lambda d: d.update(number=-1)), "REVOCATIONS_INVALID"),
}
