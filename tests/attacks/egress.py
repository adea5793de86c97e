"""Attacks on a site that answers over Flower: questions, false receipts, what its own program lets out, its ledger."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from fedcompose import ledger, wire
from fedcompose.call import CALL_TYPE, COLLECTION_PERIOD
from fedcompose.delivery import DELIVERY_TYPE, make_receipt
from fedcompose.files import dump_json
from fedcompose.keys import load_signer, new_key
from fedcompose.ledger import Entry, Head
from fedcompose.parts import offer_digest, stream_bytes
from fedcompose.signing import Signer, read_envelope_unverified, sign_envelope
from fedcompose.wire import Context, Description, Message, RecordDict, Status, TaskIdentity
from fedcompose_client.egress import REFUSALS, SITE_ERROR, Announced, send
from fedcompose_client.egress_ledger import LEDGER_FILE, departures, note
from fedcompose_client.flower import accept_call, make_app
from fedcompose_client.jobs import decide, jobs, record
from fedcompose_client.offer import outbox_parts
from tests.attacks.attack import Cases, Change, Mutation, refusal_of
from tests.flower_sim import FlowerSim


@dataclass
class Asked:
    """A question to site-a, which has signed something for a call. It answers with a code of its list, or with more."""

    sim: FlowerSim
    action: str
    fields: dict[str, Any]
    now: datetime

    @property
    def folder(self) -> Path:
        return self.sim.folder("site-a")

    @property
    def call_id(self) -> str:
        return jobs(self.folder)[0].call.id

    def refusal(self) -> str:
        receipts, before = self.receipts(), len(self.lines())
        code = self.ask(self.action)
        assert code in {*REFUSALS, SITE_ERROR}, f"the attack was answered with {code}"
        assert [entry.event for entry in self.lines()[before:]] == ["code"], "more than a code left"
        assert self.receipts() == receipts
        return code

    def admit(self) -> None:
        assert self.ask(self.action) == wire.ACCEPTED

    def ask(self, action: str) -> str:
        """The code in the answer of the site's own app."""
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        message = Message(wire.request(**self.fields), dst_node_id=2, message_type=f"query.{action}")
        answer = make_app(self.folder, lambda: self.now)(message, Context(1, 2, {}, RecordDict(), {})).content
        return str(answer["answer"]["code"])

    def lines(self) -> Sequence[Entry]:
        return departures(self.folder, None).entries

    def receipts(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.folder / "receipts").glob("*")}

    def signed(self) -> bytes:
        """The coordinator's receipt for what lies in the outbox now."""
        parts = outbox_parts(self.sim.outbox("site-a"), ["adapter", "traces"])
        return make_receipt(
            self.sim.federation, self.sim.signer, self.sim.now, site="site-a", call=self.call_id,
            offer=offer_digest(parts), bytes=stream_bytes(parts), ledger=ledger.head(self.folder / LEDGER_FILE),
        )  # fmt: skip

    def sign(self, change: Change, signer: Signer | None = None, payload_type: str = DELIVERY_TYPE) -> None:
        """Sign another receipt."""
        document = json.loads(read_envelope_unverified(self.fields["receipt"], DELIVERY_TYPE))
        change(document)
        self.fields["receipt"] = sign_envelope(dump_json(document), payload_type, [signer or self.sim.signer])

    def stranger(self) -> Signer:
        return load_signer(new_key(self.folder / "eve", "eve", "coordinator", None, None).private)


def a_question(released: object, tmp_path: Path) -> Asked:
    """For all that was signed."""
    sim = FlowerSim(tmp_path)
    job = accept_call(sim.folder("site-a"), sim.call(), sim.now)
    sim.fill_outbox("site-a")
    offer = offer_digest(outbox_parts(sim.outbox("site-a"), ["adapter", "traces"]))
    fields = {"call_id": job.call.id, "nonce": job.call.nonce, "domain": "math", "offer": offer, "start": 0}
    return Asked(sim, "fetch", fields | {"length": wire.WINDOW_BYTES}, sim.now)


def a_receipt(released: object, tmp_path: Path) -> Asked:
    """For all that was signed and has left."""
    asked = a_question(released, tmp_path)
    assert [asked.ask(action) for action in ("offer", "fetch")] == [wire.ACCEPTED] * 2
    asked.action, asked.fields["receipt"] = "receipt", asked.signed()
    return asked


# --- questions ------------------------------------------------------------------------------------


def asks(**changes: Any) -> Mutation:
    return lambda attack: attack.fields.update(changes)


def action(name: str) -> Mutation:
    return lambda attack: setattr(attack, "action", name)


def another_file(attack: Asked) -> None:
    (attack.sim.outbox("site-a") / "adapter" / "adapter_model.safetensors").write_text("rows")


def link(attack: Asked) -> None:
    (attack.sim.outbox("site-a") / "adapter" / "README.md").symlink_to(attack.folder / "site.toml")


def held(attack: Asked) -> None:
    record(attack.folder, attack.call_id, "held", attack.sim.now, offer=attack.fields["offer"])


def too_late(attack: Asked) -> None:
    attack.now = jobs(attack.folder)[0].call.deadline + COLLECTION_PERIOD


BAD = "MESSAGE_INVALID"
QUESTIONS: Cases = {
    "asked-to-run-something": (action("shell"), "ACTION_UNKNOWN"),
    "asked-for-the-data": (action("data"), "ACTION_UNKNOWN"),
    "asked-about-no-call": (asks(call_id="never-made"), "CALL_UNKNOWN"),
    "asked-with-another-nonce": (asks(nonce="0" * 64), "CALL_UNKNOWN"),
    "asked-about-a-path": (asks(call_id="../site"), BAD),
    "asked-for-another-domain": (asks(domain="logic"), "DOMAIN_UNKNOWN"),
    "asked-for-another-offer": (asks(offer="0" * 64), "OFFER_CHANGED"),
    "asked-for-bytes-before-the-first": (asks(start=-1), BAD),
    "asked-for-too-much-at-once": (asks(length=1 << 40), BAD),
    "asked-for-a-fraction": (asks(start=0.0), BAD),
    "asked-nothing": (lambda attack: attack.fields.clear(), BAD),
    "asked-after-the-end": (too_late, "CALL_EXPIRED"),
    "asked-after-the-site-refused": (
        lambda attack: decide(attack.folder, attack.call_id, "refused", attack.sim.now),
        "NOT_READY",
    ),
    "asked-before-the-owner-released-it": (held, "NOT_READY"),
    "asked-for-what-was-not-signed": (another_file, "NOT_READY"),
    "asked-for-a-link": (link, SITE_ERROR),
}


# --- receipts -------------------------------------------------------------------------------------


def says(**changes: Any) -> Mutation:
    return lambda attack: attack.sign(lambda receipt: receipt.update(changes))


def signed_by(who: Callable[[Asked], Signer]) -> Mutation:
    return lambda attack: attack.sign(lambda receipt: None, who(attack))


def envelope(change: Change) -> Mutation:
    """Another envelope around the same payload."""

    def mutate(attack: Asked) -> None:
        document = json.loads(attack.fields["receipt"])
        change(document)
        attack.fields["receipt"] = json.dumps(document).encode()

    return mutate


def receipt(change: Callable[[bytes], Any]) -> Mutation:
    return lambda attack: attack.fields.update(receipt=change(attack.fields["receipt"]))


def size(change: int) -> Mutation:
    return lambda attack: attack.sign(lambda receipt: receipt.update(bytes=receipt["bytes"] + change))


def head(**changes: Any) -> Mutation:
    return lambda attack: attack.sign(lambda receipt: receipt["ledger"].update(changes))


def second(attack: Asked) -> None:
    """The site has a receipt for this offer; another one, as good, would take its place."""
    attack.admit()
    attack.fields["receipt"] = attack.signed()  # its ledger has a line more by now


def announced_only(attack: Asked) -> None:
    """Another contribution was signed and announced, and none of it left."""
    attack.sim.fill_outbox("site-a", size=4000)
    assert attack.ask("offer") == wire.ACCEPTED
    attack.fields["receipt"] = attack.signed()


WRONG = "DELIVERY_INVALID"
RECEIPTS: Cases = {
    "receipt-by-a-stranger": (signed_by(lambda a: a.stranger()), "ENVELOPE_KEY"),
    "receipt-by-another-site": (signed_by(lambda a: a.sim.site_signer("site-b")), "ENVELOPE_KEY"),
    "receipt-by-the-site-itself": (signed_by(lambda a: a.sim.site_signer("site-a")), "ENVELOPE_KEY"),
    "receipt-by-a-root": (signed_by(lambda a: a.sim.root_signer), "ENVELOPE_KEY"),
    "receipt-altered": (envelope(lambda e: e.update(payload=base64.b64encode(b"{}").decode())), "ENVELOPE_INVALID"),
    "receipt-signature-of-another": (envelope(lambda e: e["signatures"][0].update(sig="AAAA")), "ENVELOPE_INVALID"),
    "receipt-unsigned": (envelope(lambda e: e.update(signatures=[])), "ENVELOPE_SHAPE"),
    "receipt-no-json": (receipt(lambda data: b"\x80\x04K\x01."), "ENVELOPE_SHAPE"),
    "receipt-cut": (receipt(lambda data: data[:-20]), "ENVELOPE_SHAPE"),
    "receipt-too-large": (receipt(lambda data: data + b" " * 16 * 1024), BAD),
    "receipt-as-text": (receipt(lambda data: data.decode()), BAD),
    "receipt-missing": (lambda attack: attack.fields.pop("receipt"), BAD),
    "receipt-of-another-type": (lambda a: a.sign(lambda receipt: None, payload_type=CALL_TYPE), "ENVELOPE_TYPE"),
    "receipt-that-is-the-call": (lambda a: a.fields.update(receipt=a.sim.newest_call()), "ENVELOPE_TYPE"),
    "receipt-of-another-version": (says(schema="fedcompose/delivery/v2"), WRONG),
    "receipt-unknown-field": (says(path="/etc/passwd"), WRONG),
    "receipt-with-a-path-as-call": (says(call="../../x"), WRONG),
    "receipt-for-another-federation": (says(federation="urn:uuid:00000000-0000-4000-8000-000000000009"), WRONG),
    "receipt-by-another-coordinator": (says(coordinator="hub-2"), WRONG),
    "receipt-of-another-site": (says(site="site-b"), WRONG),
    "receipt-for-another-call": (says(call="another"), WRONG),
    "receipt-for-another-offer": (says(offer="0" * 64), WRONG),
    "receipt-for-fewer-bytes": (size(-1), WRONG),
    "receipt-for-more-bytes": (size(1), WRONG),
    "receipt-with-a-head-that-never-was": (head(head="0" * 64), WRONG),
    "receipt-with-a-head-to-come": (head(entries=10**6), WRONG),
    "receipt-second-for-one-offer": (second, WRONG),
    "receipt-for-what-never-left": (announced_only, "EGRESS_UNRECORDED"),
}


# --- what the site's own program hands to the broker ----------------------------------------------


@dataclass
class Leaving:
    """An object that somebody's change to the site's program hands to the broker."""

    asked: Asked
    thing: Any = field(default_factory=lambda: Status("ready"))

    def refusal(self) -> str:
        code = refusal_of(self.admit)
        assert not self.asked.lines(), "something left"
        return code

    def admit(self) -> None:
        send(self.asked.folder, self.thing, self.asked.now)


def something_leaving(released: object, tmp_path: Path) -> Leaving:
    return Leaving(a_question(released, tmp_path))


def leaves(thing: Any) -> Mutation:
    return lambda attack: setattr(attack, "thing", thing)


def unsigned(attack: Leaving) -> None:
    another_file(attack.asked)
    attack.thing = Announced(attack.asked.call_id, "math")


LEAVING: Cases = {
    "leaving-rows": (leaves({"rows": ["private"]}), "EGRESS_TYPE"),
    "leaving-bytes": (leaves(b"private"), "EGRESS_TYPE"),
    "leaving-a-file": (leaves(Path("data.jsonl")), "EGRESS_TYPE"),
    "leaving-an-error": (leaves(ValueError("private")), "EGRESS_TYPE"),
    "leaving-a-state-in-words": (leaves(Status("Ann Smith is ill")), BAD),  # type: ignore[arg-type]
    "leaving-a-step-that-is-text": (leaves(Status("training", step="Ann Smith")), BAD),  # type: ignore[arg-type]
    "leaving-a-version-with-a-path": (leaves(Description(1, "1.0 /home/ann", "site-a")), BAD),
    "leaving-what-was-not-signed": (unsigned, "NOT_READY"),
}


# --- the egress ledger ----------------------------------------------------------------------------


@dataclass
class Told:
    """The ledger of a site after everything has left and the coordinator's receipt is kept."""

    asked: Asked

    def refusal(self) -> str:
        return refusal_of(self.admit)

    def admit(self) -> None:
        found = departures(self.asked.folder, self.asked.sim.federation)
        assert found.receipts and {"offer", "window"} <= found.totals.keys()

    @property
    def path(self) -> Path:
        return self.asked.folder / LEDGER_FILE


def an_egress_ledger(released: object, tmp_path: Path) -> Told:
    asked = a_receipt(released, tmp_path)
    asked.admit()
    return Told(asked)


def told(change: Callable[[list[bytes]], object]) -> Mutation:
    def mutate(attack: Told) -> None:
        lines = attack.path.read_bytes().splitlines(keepends=True)
        change(lines)
        attack.path.write_bytes(b"".join(lines))

    return mutate


def anew(attack: Told) -> None:
    count = len(attack.asked.lines())
    attack.path.unlink()
    for _ in range(count):
        note(attack.asked.folder, "status", attack.asked.now, bytes=1, sha256="0" * 64)


def untold(attack: Told) -> None:
    """The windows are missing from a ledger that was written anew, and the receipt is made to fit its head."""
    anew(attack)
    (path,) = (attack.asked.folder / "receipts").glob("*")
    last: Head = ledger.head(attack.path)
    attack.asked.sign(lambda receipt: receipt.update(ledger=last.model_dump()))
    path.write_bytes(attack.asked.fields["receipt"])


def forged(attack: Told) -> None:
    """A receipt that names an earlier head, under the coordinator's signature of the genuine one."""
    (path,) = (attack.asked.folder / "receipts").glob("*")
    document = json.loads(path.read_bytes())
    payload = json.loads(base64.b64decode(document["payload"]))
    payload["ledger"]["entries"] = 1
    document["payload"] = base64.b64encode(dump_json(payload)).decode()
    path.write_text(json.dumps(document))


EGRESS: Cases = {
    "egress-line-removed": (told(lambda lines: lines.pop(0)), "LEDGER_BROKEN"),
    "egress-line-edited": (
        told(lambda lines: lines.insert(0, lines.pop(0).replace(b'"bytes":', b'"bytes":1'))),
        "LEDGER_BROKEN",
    ),
    "egress-lines-swapped": (told(lambda lines: lines.insert(0, lines.pop(1))), "LEDGER_BROKEN"),
    "egress-line-twice": (told(lambda lines: lines.append(lines[-1])), "LEDGER_BROKEN"),
    "egress-ledger-cut": (told(lambda lines: lines.__delitem__(slice(1, None))), "LEDGER_TRUNCATED"),
    "egress-ledger-emptied": (told(lambda lines: lines.clear()), "LEDGER_TRUNCATED"),
    "egress-ledger-written-anew": (anew, "LEDGER_FORKED"),
    "egress-without-a-line": (untold, "EGRESS_UNRECORDED"),
    "egress-receipt-altered": (forged, "ENVELOPE_INVALID"),
}
