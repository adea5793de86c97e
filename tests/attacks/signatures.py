"""Attacks on `model.sig`: its envelope, by whoever carried the folder, and its statement, by whoever signed it."""

from __future__ import annotations

import base64
import json
import shutil
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, utils

from fedcompose.files import MAX_JSON_BYTES
from fedcompose.signing import SIGNATURE_FILE, STATEMENT_PAYLOAD_TYPE, sign_envelope
from tests.attacks.attack import Cases, Change, Contribution, Mutation

P256 = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # the order of the curve's group
FIRST = 0


def bundle(change: Change) -> Mutation:
    """Another JSON document in the same file."""

    def mutate(attack: Contribution) -> None:
        document = json.loads(attack.path(SIGNATURE_FILE).read_bytes())
        changed = change(document)
        attack.path(SIGNATURE_FILE).write_text(json.dumps(document if changed is None else changed))

    return mutate


def raw(old: bytes, new: bytes) -> Mutation:
    """Other bytes that a JSON library would not write."""
    return lambda attack: attack.rewrite(SIGNATURE_FILE, lambda data: data.replace(old, new, 1))


def envelope(change: Change) -> Mutation:
    return bundle(lambda document: change(document["dsseEnvelope"]))


def signature(make: Any) -> Mutation:
    """Another signature, made by `make(message, attack)` over the very message that should be signed."""

    def mutate(attack: Contribution) -> None:
        document = json.loads(attack.path(SIGNATURE_FILE).read_bytes())
        payload = base64.b64decode(document["dsseEnvelope"]["payload"])
        kind = STATEMENT_PAYLOAD_TYPE.encode()
        message = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
        made = base64.b64encode(make(message, attack)).decode()
        document["dsseEnvelope"]["signatures"][FIRST]["sig"] = made
        attack.path(SIGNATURE_FILE).write_text(json.dumps(document))

    return mutate


def fixed_width(message: bytes, attack: Contribution) -> bytes:
    """The same signature as IEEE P1363 writes it: r and s one after the other."""
    r, s = utils.decode_dss_signature(attack.signer.sign(message))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def other_hash(message: bytes, attack: Contribution) -> bytes:
    return attack.signer._key.sign(message, ec.ECDSA(hashes.SHA384()))


def other_curve(message: bytes, attack: Contribution) -> bytes:
    return ec.derive_private_key(7, ec.SECP384R1()).sign(message, ec.ECDSA(hashes.SHA256()))


def edwards(message: bytes, attack: Contribution) -> bytes:
    return ed25519.Ed25519PrivateKey.from_private_bytes(b"7" * 32).sign(message)


def zeros(message: bytes, attack: Contribution) -> bytes:
    """r = s = 0, which careless verifiers take for a signature of anything."""
    return utils.encode_dss_signature(0, 0)


def twin_signature(attack: Contribution) -> None:
    """(r, n - s) in place of (r, s): other bytes, still a signature by the same key over the same statement."""

    def twin(message: bytes, _: Contribution) -> bytes:
        r, s = utils.decode_dss_signature(attack.signer.sign(message))
        return utils.encode_dss_signature(r, P256 - s)

    signature(twin)(attack)


def a_document(payload: Any, payload_type: str) -> Mutation:
    """A document of another kind, signed by the site, in the place of the signature."""

    def mutate(attack: Contribution) -> None:
        signed = sign_envelope(json.dumps(payload).encode(), payload_type, [attack.signer])
        attack.path(SIGNATURE_FILE).write_bytes(signed)

    return mutate


def statement(change: Change) -> Mutation:
    return lambda attack: attack.sign_statement(change)


def predicate(**changes: Any) -> Mutation:
    return statement(lambda document: document["predicate"]["serialization"].update(changes))


def first_file(**changes: Any) -> Mutation:
    return statement(lambda document: document["predicate"]["resources"][FIRST].update(changes))


def hidden_by_ignore_paths(attack: Contribution) -> None:
    attack.path("README.md").write_text("not signed")
    attack.sign_statement(lambda d: d["predicate"]["serialization"].update(ignore_paths=["README.md"]))


def other_folder(attack: Contribution) -> None:
    shutil.copy(attack.sim.sites["site-b"].outbox / "adapter" / SIGNATURE_FILE, attack.path(SIGNATURE_FILE))


def left_out(attack: Contribution) -> None:
    attack.sign_only(leave_out="adapter_config.json")


# By the courier: whoever carries the folder has no key.
COURIER: Cases = {
    "signature-removed": (lambda a: a.path(SIGNATURE_FILE).unlink(), "FILE_MISSING"),
    "signature-emptied": (lambda a: a.path(SIGNATURE_FILE).write_bytes(b""), "SIGNATURE_MISSING"),
    "signature-stripped": (envelope(lambda e: e.update(signatures=[])), "SIGNATURE_MISSING"),
    "signature-second": (
        envelope(lambda e: e["signatures"].append({"sig": "AAAA", "keyid": ""})),
        "SIGNATURE_SHAPE",
    ),
    "signature-keyid": (envelope(lambda e: e["signatures"][FIRST].update(keyid="0" * 64)), "SIGNATURE_SHAPE"),
    "bundle-media-type": (bundle(lambda b: b.update(mediaType="application/json")), "SIGNATURE_SHAPE"),
    "bundle-next-version": (
        bundle(lambda b: b.update(mediaType="application/vnd.dev.sigstore.bundle.v0.4+json")),
        "SIGNATURE_SHAPE",
    ),
    "bundle-unknown-field": (bundle(lambda b: b.update(trusted=True)), "SIGNATURE_SHAPE"),
    "bundle-certificate": (
        bundle(lambda b: b.update(verificationMaterial={"x509CertificateChain": {"certificates": []}})),
        "SIGNATURE_SHAPE",
    ),
    "bundle-log-entry": (bundle(lambda b: b["verificationMaterial"].update(tlogEntries=[{}])), "SIGNATURE_SHAPE"),
    "bundle-timestamp": (
        bundle(lambda b: b["verificationMaterial"].update(timestampVerificationData={})),
        "SIGNATURE_SHAPE",
    ),
    "bundle-key-inside": (
        bundle(lambda b: b["verificationMaterial"]["publicKey"].update(rawBytes="AAAA")),
        "SIGNATURE_SHAPE",
    ),
    "hint-removed": (bundle(lambda b: b["verificationMaterial"].update(publicKey={})), "SIGNATURE_SHAPE"),
    "hint-of-nobody": (bundle(lambda b: b["verificationMaterial"]["publicKey"].update(hint="0" * 64)), "KEY_UNKNOWN"),
    "payload-type-of-a-call": (
        envelope(lambda e: e.update(payloadType="application/vnd.fedcompose.call.v1+json")),
        "SIGNATURE_SHAPE",
    ),
    "payload-swapped": (
        envelope(lambda e: e.update(payload=base64.b64encode(b"{}").decode())),
        "SIGNATURE_INVALID",
    ),
    "signature-of-another-folder": (other_folder, "FILE_CHANGED"),
    "json-duplicate-key": (raw(b'"hint":', b'"hint":"' + b"0" * 64 + b'","hint":'), "SIGNATURE_SHAPE"),
    "json-nan": (raw(b'"tlogEntries":[]', b'"tlogEntries":[NaN]'), "SIGNATURE_SHAPE"),
    "json-deep": (raw(b'"tlogEntries":[]', b'"tlogEntries":' + b"[" * 9999 + b"]" * 9999), "SIGNATURE_SHAPE"),
    "json-huge-integer": (raw(b'"tlogEntries":[]', b'"tlogEntries":[%s]' % (b"9" * 9999)), "SIGNATURE_SHAPE"),
    "json-byte-order-mark": (raw(b'{"mediaType"', b'\xef\xbb\xbf{"mediaType"'), "SIGNATURE_SHAPE"),
    "json-not-utf8": (raw(b'{"mediaType"', b'{"\xff":1,"mediaType"'), "SIGNATURE_SHAPE"),
    "json-two-documents": (lambda a: a.rewrite(SIGNATURE_FILE, lambda data: data * 2), "SIGNATURE_SHAPE"),
    "json-too-large": (
        lambda a: a.rewrite(SIGNATURE_FILE, lambda data: data + b" " * MAX_JSON_BYTES),
        "FILE_TOO_LARGE",
    ),
    "base64-junk": (raw(b'"payload":"', b'"payload":"*'), "SIGNATURE_SHAPE"),
    "base64-other-spelling": (raw(b'"payload":"', b'"payload":"\\n'), "SIGNATURE_SHAPE"),
    "signature-p1363": (signature(fixed_width), "SIGNATURE_INVALID"),
    "signature-other-hash": (signature(other_hash), "SIGNATURE_INVALID"),
    "signature-other-curve": (signature(other_curve), "SIGNATURE_INVALID"),
    "signature-ed25519": (signature(edwards), "SIGNATURE_INVALID"),
    "signature-of-zeros": (signature(zeros), "SIGNATURE_INVALID"),
    "call-as-signature": (
        a_document({"schema": "fedcompose/call/v1"}, "application/vnd.fedcompose.call.v1+json"),
        "SIGNATURE_SHAPE",
    ),
    "federation-file-as-signature": (
        lambda a: a.path(SIGNATURE_FILE).write_bytes(a.sim.envelope),
        "SIGNATURE_SHAPE",
    ),
}

# By the signer: the statement is signed with the site's own key.
SIGNER: Cases = {
    "predicate-of-v0.1": (
        statement(lambda d: d.update(predicateType="https://model_signing/Digests/v0.1")),
        "SIGNATURE_STATEMENT",
    ),
    "predicate-of-provenance": (
        statement(lambda d: d.update(predicateType="https://slsa.dev/provenance/v1")),
        "SIGNATURE_STATEMENT",
    ),
    "statement-of-v0.1": (
        statement(lambda d: d.update(_type="https://in-toto.io/Statement/v0.1")),
        "SIGNATURE_STATEMENT",
    ),
    "statement-unknown-field": (statement(lambda d: d["predicate"].update(claims={})), "SIGNATURE_STATEMENT"),
    "statement-no-object": (statement(lambda d: [d]), "SIGNATURE_STATEMENT"),
    "second-subject": (statement(lambda d: d["subject"].append(d["subject"][FIRST])), "SIGNATURE_STATEMENT"),
    "root-digest-wrong": (
        statement(lambda d: d["subject"][FIRST]["digest"].update(sha256="0" * 64)),
        "SIGNATURE_STATEMENT",
    ),
    "links-allowed": (predicate(allow_symlinks=True), "SIGNATURE_STATEMENT"),
    "hash-of-another-kind": (predicate(hash_type="blake2b"), "SIGNATURE_STATEMENT"),
    "files-in-shards": (predicate(method="shards", shard_size=1), "SIGNATURE_STATEMENT"),
    "file-digest-of-another-kind": (first_file(algorithm="sha512"), "SIGNATURE_STATEMENT"),
    "file-listed-twice": (
        statement(lambda d: d["predicate"]["resources"].append(d["predicate"]["resources"][FIRST])),
        "SIGNATURE_STATEMENT",
    ),
    "no-file-listed": (statement(lambda d: d["predicate"].update(resources=[])), "SIGNATURE_STATEMENT"),
    "names-not-sorted": (statement(lambda d: d["predicate"]["resources"].reverse()), "SIGNATURE_STATEMENT"),
    "ignore-paths-hide-a-file": (hidden_by_ignore_paths, "FILE_UNSIGNED"),
    "file-left-out": (left_out, "FILE_UNSIGNED"),
    "file-signed-but-absent": (lambda a: a.sign_only(**{"README.md": "0" * 64}), "FILE_MISSING"),
    "name-parent": (first_file(name="../adapter_config.json"), "SIGNATURE_STATEMENT"),
    "name-inner-parent": (first_file(name="a/../b"), "SIGNATURE_STATEMENT"),
    "name-absolute": (first_file(name="/etc/passwd"), "SIGNATURE_STATEMENT"),
    "name-backslash": (first_file(name="a\\b"), "SIGNATURE_STATEMENT"),
    "name-drive": (first_file(name="C:a"), "SIGNATURE_STATEMENT"),
    "name-device": (first_file(name="NUL"), "FILE_UNSIGNED"),
    "name-nul": (first_file(name="a\0b"), "SIGNATURE_STATEMENT"),
    "name-hidden": (first_file(name=".git/config"), "SIGNATURE_STATEMENT"),
    "name-look-alike": (first_file(name="\u0430dapter_config.json"), "SIGNATURE_STATEMENT"),
    "name-combining": (first_file(name="e\u0301.json"), "SIGNATURE_STATEMENT"),
    "name-escape": (first_file(name="\x1b[31m.json"), "SIGNATURE_STATEMENT"),
    "name-case-twin": (
        statement(
            lambda d: d["predicate"]["resources"].insert(
                0, d["predicate"]["resources"][FIRST] | {"name": "ADAPTER_CONFIG.JSON"}
            )
        ),
        "SIGNATURE_STATEMENT",
    ),
}
