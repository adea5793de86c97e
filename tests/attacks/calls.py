"""Attacks on a call, judged at site-a: somebody else calls, or the coordinator asks what it may not."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from fedcompose.call import CALL_TYPE, make_call, verify_call
from fedcompose.federation_file import FEDERATION_TYPE
from fedcompose.files import dump_json
from fedcompose.keys import load_signer, new_key
from fedcompose.signing import SIGNATURE_FILE, Signer, sign_envelope
from tests.attacks.attack import Cases, Change, Mutation, elsewhere, refusal_of
from tests.federation_sim import FederationSim


@dataclass
class SentCall:
    """A signed call on its way to site-a."""

    sim: FederationSim
    envelope: bytes

    def refusal(self) -> str:
        return refusal_of(self.admit)

    def admit(self) -> None:
        verify_call(self.envelope, self.sim.federation, "site-a", self.sim.now)

    def sign(self, change: Change, signer: Signer | None = None, payload_type: str = CALL_TYPE) -> None:
        payload = json.loads(base64.b64decode(json.loads(self.envelope)["payload"]))
        changed = change(payload)
        text = dump_json(payload if changed is None else changed)
        self.envelope = sign_envelope(text, payload_type, [signer or self.sim.coordinator])

    def stranger(self) -> Signer:
        return load_signer(new_key(self.sim.folder / "eve", "eve", "coordinator", None, None).private)


def a_call(released: FederationSim, tmp_path: Path) -> SentCall:
    sim = elsewhere(released, tmp_path)
    base = sim.federation.base_models[0].name
    deadline = sim.now + timedelta(days=1)
    envelope = make_call(
        sim.federation, sim.coordinator, base, ["adapter"], deadline=deadline, now=sim.now, nonce=bytes(range(32))
    )
    return SentCall(sim, envelope)


def says(**changes: Any) -> Mutation:
    return lambda attack: attack.sign(lambda call: call.update(changes))


def signed_by(who: Any) -> Mutation:
    return lambda attack: attack.sign(lambda call: None, who(attack))


def document(change: Change) -> Mutation:
    """Another envelope around the same payload."""

    def mutate(attack: SentCall) -> None:
        envelope = json.loads(attack.envelope)
        change(envelope)
        attack.envelope = json.dumps(envelope).encode()

    return mutate


def becomes(read: Any) -> Mutation:
    """Something else that was signed, in the place of a call."""

    def mutate(attack: SentCall) -> None:
        attack.envelope = read(attack)

    return mutate


def the_folders_signature(attack: SentCall) -> bytes:
    bundle = json.loads((attack.sim.sites["site-a"].outbox / "adapter" / SIGNATURE_FILE).read_bytes())
    return json.dumps(bundle["dsseEnvelope"]).encode()


def an_enrolment(attack: SentCall) -> bytes:
    return new_key(attack.sim.folder / "new", "hub-2", "coordinator", None, None).enrolment.read_bytes()


def relabelled(attack: SentCall) -> None:
    """The federation file under the label of a call: the label is signed too."""
    envelope = json.loads(attack.sim.envelope) | {"payloadType": CALL_TYPE}
    attack.envelope = json.dumps(envelope).encode()


def respelled(attack: SentCall) -> bytes:
    """The same call without a blank, which would have another digest."""
    payload = json.loads(base64.b64decode(json.loads(attack.envelope)["payload"]))
    compact = json.dumps(payload, separators=(",", ":")).encode()
    return sign_envelope(compact, CALL_TYPE, [attack.sim.coordinator])


CALLS: Cases = {
    "call-by-a-stranger": (signed_by(lambda a: a.stranger()), "ENVELOPE_KEY"),
    "call-by-a-site": (signed_by(lambda a: a.sim.sites["site-b"].signer), "ENVELOPE_KEY"),
    "call-by-a-root": (signed_by(lambda a: a.sim.root), "ENVELOPE_KEY"),
    "call-altered": (
        document(lambda e: e.update(payload=base64.b64encode(b"{}").decode())),
        "ENVELOPE_INVALID",
    ),
    "call-signature-of-another": (document(lambda e: e["signatures"][0].update(sig="AAAA")), "ENVELOPE_INVALID"),
    "call-unsigned": (document(lambda e: e.update(signatures=[])), "ENVELOPE_SHAPE"),
    "call-signed-twice-by-one-key": (document(lambda e: e["signatures"].extend(e["signatures"])), "ENVELOPE_SHAPE"),
    "call-unknown-field-outside": (document(lambda e: e.update(trusted=True)), "ENVELOPE_SHAPE"),
    "call-unknown-field-inside": (says(run="rm -rf /"), "CALL_INVALID"),
    "call-of-another-version": (says(schema="fedcompose/call/v2"), "CALL_INVALID"),
    "call-of-another-type": (
        lambda a: a.sign(lambda call: None, payload_type=FEDERATION_TYPE),
        "ENVELOPE_TYPE",
    ),
    "call-that-is-a-federation-file": (becomes(lambda a: a.sim.envelope), "ENVELOPE_TYPE"),
    "call-that-is-a-federation-file-relabelled": (relabelled, "ENVELOPE_KEY"),
    "call-that-is-a-signature": (becomes(the_folders_signature), "ENVELOPE_TYPE"),
    "call-that-is-an-enrolment": (becomes(an_enrolment), "ENVELOPE_TYPE"),
    "call-no-json": (becomes(lambda a: b"\x80\x04K\x01."), "ENVELOPE_SHAPE"),
    "call-for-another-federation": (
        says(federation="urn:uuid:00000000-0000-4000-8000-000000000009"),
        "CALL_FEDERATION",
    ),
    "call-on-another-base": (
        lambda a: a.sign(lambda call: call["base"].update(dirHash="0" * 64)),
        "CALL_BASE",
    ),
    "call-after-its-deadline": (says(deadline="2026-01-01T00:00:00Z"), "CALL_EXPIRED"),
    "call-to-another-site": (says(sites=[{"id": "site-b", "domain": "ordering"}]), "CALL_SITE"),
    "call-in-another-domain": (says(sites=[{"id": "site-a", "domain": "law"}]), "CALL_SITE"),
    "call-to-one-site-twice": (lambda a: a.sign(lambda call: call["sites"].extend(call["sites"])), "CALL_INVALID"),
    "call-for-data": (says(want=["data"]), "CALL_INVALID"),
    "call-by-another-coordinator": (says(coordinator="hub-2"), "CALL_COORDINATOR"),
    "call-under-another-policy": (says(policy="0" * 64), "CALL_POLICY"),
    "call-in-another-spelling": (
        lambda a: setattr(a, "envelope", respelled(a)),
        "CALL_INVALID",
    ),
    "call-with-a-short-nonce": (says(nonce="00"), "CALL_INVALID"),
    "call-with-a-path-as-id": (says(id="../../x"), "CALL_INVALID"),
    "call-with-an-escape": (says(id="\x1b[2J"), "CALL_INVALID"),
}
