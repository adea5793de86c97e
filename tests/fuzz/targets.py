"""What an enemy may send, and what must come of it: a refusal, or a meaning that was intended.

Some targets play a courier without a key: whatever is accepted must mean what the original meant. The others play a
dishonest signer, whose key makes anything look genuine: what is accepted must be readable once more from the form in
which this program would write it. Nothing here needs a model package.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from fedcompose import ledger, receipt
from fedcompose.adapter import parse_adapter, parse_config, tensor_name
from fedcompose.call import CALL_TYPE, make_call, verify_call
from fedcompose.composition import parse_composition
from fedcompose.delivery import DELIVERY_TYPE, make_receipt, read_receipt
from fedcompose.drafts import create_federation, enrol
from fedcompose.errors import FedcomposeError
from fedcompose.federation_file import FEDERATION_TYPE, verify_federation
from fedcompose.files import dump_json, parse_json
from fedcompose.gates import read_gates, write_gates
from fedcompose.invitation import INVITATION_TYPE, make_invitation, read_invitation
from fedcompose.keys import ENROLMENT_TYPE, load_signer, new_key, read_enrolment
from fedcompose.ledger import EMPTY
from fedcompose.provenance import (
    BaseReference,
    Ingredient,
    LoraSummary,
    Provenance,
    ReleaseProvenance,
)
from fedcompose.revocations import (
    REVOCATIONS_TYPE,
    RevokedKey,
    WithdrawnRelease,
    next_revocations,
    no_revocations,
    verify_revocations,
)
from fedcompose.signing import (
    STATEMENT_PAYLOAD_TYPE,
    Signer,
    load_public_key,
    public_pem_of,
    sign_envelope,
    sign_files,
    verify_files,
)
from fedcompose.statement import build_provenance, build_release_provenance, parse_provenance, parse_release_provenance
from fedcompose.tensors import StoredTensor, canonical_safetensors, parse_safetensors
from fedcompose.traces import Trace, decode, encode

NOW = datetime(2026, 11, 20, 9, tzinfo=UTC)
FEDERATION = "urn:uuid:6b0c0000-0000-4000-8000-000000000004"
MODULE = "model.layers.0.mlp.up_proj"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"], "rank_pattern": {"q": 1}}
TENSORS = re.compile(rb"(?s)(?P<size>.{8})(?P<header>\{.*?\} *)(?P<body>.*)")

Form = Literal["json", "lines", "safetensors", "bytes"]


@dataclass(frozen=True)
class Target:
    """`read` gives the meaning of what it accepts; of a courier's bytes it must be that of the seed."""

    form: Form
    seed: bytes
    read: Callable[[bytes], object]
    courier: bool = False

    def try_(self, data: bytes) -> bool:
        """Whether these bytes were accepted. Any error but a refusal is a finding, and so is another meaning."""
        try:
            meaning = self.read(data)
        except FedcomposeError as refusal:
            said = refusal.diagnostics()
            assert all(line.isprintable() for line in said.split("\n")), ascii(said)
            return False
        assert not self.courier or meaning == self.read(self.seed), "another meaning was accepted"
        return True


def targets(folder: Path) -> dict[str, Target]:
    """All targets by name; keys, and what has to lie in a file, go into `folder`."""
    root, hub, site = (
        _key(folder, name, role) for name, role in (("root", "root"), ("hub", "coordinator"), ("a", "site"))
    )
    federation_file = _federation_file(folder, root)
    known = verify_federation(federation_file, root_fingerprints=[root.keyid], now=NOW)
    digests = {"adapter_config.json": "1" * 64, "adapter_model.safetensors": "2" * 64, "provenance.json": "3" * 64}
    bundle = sign_files("adapter", digests, site)
    call = make_call(known, hub, "tiny", ["adapter"], deadline=NOW + timedelta(days=1), now=NOW, nonce=bytes(32))
    withdrawn = next_revocations(
        no_revocations(FEDERATION),
        [RevokedKey(keyid=site.keyid, at=NOW, reason="compromised")],
        [WithdrawnRelease(dirHash="4" * 64, at=NOW)],
        root,
        NOW,
    )
    enrolment = (folder / "a.enroll.json").read_bytes()
    config, tensors = json.dumps(CONFIG).encode(), canonical_safetensors(_tensors())

    def read_federation(envelope: bytes) -> object:
        found = verify_federation(envelope, root_fingerprints=[root.keyid], now=NOW)
        written = found.model_dump_json(by_alias=True).encode()
        again = sign_envelope(written, FEDERATION_TYPE, [root])
        assert verify_federation(again, root_fingerprints=[root.keyid], now=NOW) == found
        return found

    def read_call(envelope: bytes) -> object:
        found = verify_call(envelope, known, "a", NOW)
        assert verify_call(sign_envelope(found.payload, CALL_TYPE, [hub]), known, "a", NOW) == found
        return found

    delivery = make_receipt(known, hub, NOW, site="a", call="c", offer="0" * 64, bytes=7, ledger=EMPTY)

    def read_delivery(envelope: bytes) -> object:
        found = read_receipt(envelope, known)
        payload = dump_json(found.model_dump(mode="json", by_alias=True))
        assert read_receipt(sign_envelope(payload, DELIVERY_TYPE, [hub]), known) == found
        return found

    invitation = make_invitation(known, hub, "hub.example.org:9443", _certificate(), NOW)

    def read_invited(envelope: bytes) -> object:
        found = read_invitation(envelope, known, NOW)
        payload = dump_json(found.model_dump(mode="json", by_alias=True))
        assert read_invitation(sign_envelope(payload, INVITATION_TYPE, [hub]), known, NOW) == found
        return found

    answer = receipt.sign_receipt(receipt.Receipt.model_validate_json(json.dumps(_receipt())), hub)

    def read_answer(envelope: bytes) -> object:
        found = receipt.verify_receipt(envelope, [hub.public_pem])
        assert receipt.verify_receipt(receipt.sign_receipt(found, hub), [hub.public_pem]) == found
        return found

    def read_revocations(envelope: bytes) -> object:
        found = verify_revocations(envelope, known)
        again = sign_envelope(found.model_dump_json(by_alias=True).encode(), REVOCATIONS_TYPE, [root])
        assert verify_revocations(again, known) == found
        return found

    def read_ledger(data: bytes) -> object:
        path = folder / "ledger.jsonl"
        path.write_bytes(data)
        entries = ledger.verify(path)
        assert len(entries) == data.count(b"\n")
        return entries

    return {
        "bundle": Target("json", bundle, lambda data: verify_files(data, site.public_pem), courier=True),
        "statement": Target("json", _inside(bundle), lambda data: _read_statement(data, bundle, site)),
        "federation file": Target("json", federation_file, read_federation, courier=True),
        "federation": Target("json", _payload(federation_file), _signed(FEDERATION_TYPE, root, read_federation)),
        "call file": Target("json", call, read_call, courier=True),
        "call": Target("json", _payload(call), _signed(CALL_TYPE, hub, read_call)),
        "delivery file": Target("json", delivery, read_delivery, courier=True),
        "delivery": Target("json", _payload(delivery), _signed(DELIVERY_TYPE, hub, read_delivery)),
        "invitation file": Target("json", invitation, read_invited, courier=True),
        "invitation": Target("json", _payload(invitation), _signed(INVITATION_TYPE, hub, read_invited)),
        "receipt file": Target("json", answer, read_answer, courier=True),
        "receipt": Target("json", _payload(answer), _signed(receipt.RECEIPT_TYPE, hub, read_answer)),
        "revocations file": Target("json", withdrawn, read_revocations, courier=True),
        "revocations": Target("json", _payload(withdrawn), _signed(REVOCATIONS_TYPE, root, read_revocations)),
        "enrolment file": Target("json", enrolment, read_enrolment, courier=True),
        "enrolment": Target("json", _payload(enrolment), _signed(ENROLMENT_TYPE, site, read_enrolment)),
        "provenance": Target("json", _dumped(build_provenance(_claims())), _read_provenance),
        "release provenance": Target(
            "json", _dumped(build_release_provenance(_release_claims())), _read_release_provenance
        ),
        "composition": Target("json", _dumped(_composition()), _read_composition),
        "configuration": Target("json", config, _read_config),
        "weights": Target("safetensors", tensors, lambda data: _read_weights(config, data)),
        "router": Target("safetensors", tensors, _read_tensors),
        "gates": Target("safetensors", write_gates({MODULE: np.ones(4, dtype="<f4")}), _read_gates),
        "traces": Target("lines", encode(_traces()), _read_traces),
        "ledger": Target("lines", _ledger(folder / "seed.jsonl"), read_ledger),
        "public key": Target("bytes", site.public_pem, _read_key),
        "json": Target("json", _dumped({"a": [1, -2.5e3, "é", None, True, {"b": {}}], "c": ""}), _read_json),
    }


# --- how each is read -----------------------------------------------------------------------------


def _signed(kind: str, signer: Signer, read: Callable[[bytes], object]) -> Callable[[bytes], object]:
    return lambda payload: read(sign_envelope(payload, kind, [signer]))


def _read_statement(payload: bytes, bundle: bytes, signer: Signer) -> object:
    envelope = json.loads(sign_envelope(payload, STATEMENT_PAYLOAD_TYPE, [signer]))
    envelope["signatures"][0]["keyid"] = ""
    document = json.loads(bundle) | {"dsseEnvelope": envelope}
    found = verify_files(json.dumps(document).encode(), signer.public_pem)
    assert verify_files(sign_files(found.name, found.digests, signer), signer.public_pem).digests == found.digests
    return found


def _read_provenance(data: bytes) -> object:
    found = parse_provenance(data)
    assert parse_provenance(_dumped(build_provenance(found))) == found
    return found


def _read_release_provenance(data: bytes) -> object:
    found = parse_release_provenance(data)
    assert parse_release_provenance(_dumped(build_release_provenance(found))) == found
    return found


def _read_composition(data: bytes) -> object:
    found = parse_composition(data)
    assert parse_composition(found.model_dump_json(by_alias=True).encode()) == found
    return found


def _read_config(data: bytes) -> object:
    found = parse_config(data)
    assert 0 < found.scale(MODULE) < 1e5 and 1 <= found.rank(MODULE) <= 512
    return found


def _read_weights(config: bytes, data: bytes) -> object:
    found = parse_adapter(config, data, None)
    assert parse_adapter(config, canonical_safetensors(found.tensors), None).tensors == found.tensors
    assert all(np.isfinite(tensor.float32()).all() for tensor in found.tensors.values())
    return found


def _read_tensors(data: bytes) -> object:
    found = parse_safetensors(data)
    assert parse_safetensors(canonical_safetensors(found)) == found
    for tensor in found.values():
        assert tensor.float32().shape == tensor.shape and tensor.shape[0] > 0
    return found


def _read_gates(data: bytes) -> object:
    found = read_gates(data, parse_config(json.dumps(CONFIG).encode()), None)
    again = read_gates(write_gates(found), parse_config(json.dumps(CONFIG).encode()), None)
    assert all((found[name] == again[name]).all() for name in found | again)
    return {name: gate.tobytes() for name, gate in found.items()}


def _read_traces(data: bytes) -> object:
    found = decode(data)
    assert decode(encode(found)) == found
    return found


def _read_key(pem: bytes) -> object:
    found = public_pem_of(load_public_key(pem))
    assert found == pem
    return found


def _read_json(data: bytes) -> object:
    found = parse_json(data, "it")
    assert parse_json(json.dumps(found).encode(), "it") == found == json.loads(data)
    return found


# --- good things to begin with --------------------------------------------------------------------


def _key(folder: Path, name: str, role: Any) -> Signer:
    return load_signer(new_key(folder, name, role, "clock" if role == "site" else None, None).private)


def _federation_file(folder: Path, root: Signer) -> bytes:
    envelope = create_federation("Test", root, "root", {"tiny": "1" * 64}, FEDERATION, NOW)
    for name in ("hub", "a"):
        envelope = enrol(envelope, (folder / f"{name}.enroll.json").read_bytes(), root, NOW)
    return envelope


def _payload(envelope: bytes) -> bytes:
    return base64.b64decode(json.loads(envelope)["payload"])


def _inside(bundle: bytes) -> bytes:
    return base64.b64decode(json.loads(bundle)["dsseEnvelope"]["payload"])


def _dumped(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document).encode()


def _claims() -> Provenance:
    return Provenance(
        federation=FEDERATION,
        federation_version=3,
        base=BaseReference(name="tiny", dir_hash="1" * 64),
        subjects={"adapter_config.json": "2" * 64, "adapter_model.safetensors": "3" * 64},
        invocation="urn:uuid:6b0c0000-0000-4000-8000-000000000005",
        finished=NOW,
        metrics={"accuracy": 0.5},
        versions={"fedcompose": "0.1.0"},
        kind="adapter",
        site="a",
        domain="clock",
        sequence=7,
        expires=NOW + timedelta(days=14),
        lora=LoraSummary(r=2, alpha=4.0, targets=("up_proj",)),
    )


def _release_claims() -> ReleaseProvenance:
    entry = Ingredient(
        site="a", dir_hash="4" * 64, payload_sha256="5" * 64, keyid="6" * 64, sequence=7, received_on=NOW
    )
    shared = _claims().model_dump(include={"federation", "federation_version", "subjects", "invocation", "versions"})
    return ReleaseProvenance(
        **shared, base=_claims().base, finished=NOW, coordinator="hub", method="hard", ingredients=(entry,)
    )


def _receipt() -> dict[str, Any]:
    return {
        "schema": "fedcompose/receipt/v1",
        "id": "chatcmpl-1",
        "written": "2026-11-20T09:00:00Z",
        "model": "auto",
        "federation": FEDERATION,
        "release": "1" * 64,
        "router": "2" * 64,
        "base": "3" * 64,
        "experts": [{"site": "a", "domain": "clock", "dirHash": "4" * 64, "tokens": 5}],
        "baseTokens": 2,
        "mergedTokens": 0,
        "tokens": 7,
        "answer": "5" * 64,
    }


def _certificate() -> bytes:
    """Of an authority that has signed itself."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, NOW, NOW + timedelta(days=9))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _composition() -> dict[str, Any]:
    return {
        "schema": "fedcompose/composition/v1",
        "method": "hard",
        "base": {"name": "tiny", "dirHash": "1" * 64},
        "router": {"scorer": "linear", "estimator": "top_k", "top_k": 2, "normalise": True},
        "experts": [{"site": "a", "domain": "clock", "dirHash": "4" * 64}],
        "targets": ["up_proj"],
        "attention": {"r": 4, "alpha": 8},
        "training": {"steps": 3},
    }


def _tensors() -> dict[str, StoredTensor]:
    values = np.random.default_rng(0).normal(scale=0.01, size=(2, 4)).astype("<f4")
    return {
        tensor_name(MODULE, "A"): StoredTensor("F32", (2, 4), memoryview(values.tobytes())),
        tensor_name(MODULE, "B"): StoredTensor("BF16", (3, 2), memoryview(b"\x00\x3c" * 6)),
    }


def _traces() -> list[Trace]:
    return [
        Trace(provenance_class="B", task="exact", generator="clock", config={"h": 24}, seed=1, completion="Answer: 1"),
        Trace(provenance_class="C", task="exact", question="1 + 1?", answer="2", completion="Answer: 2"),
    ]


def _ledger(path: Path) -> bytes:
    for number in range(3):
        ledger.append(path, "refused", NOW, contribution=f"{number:064x}", code="REPLAYED", bytes=number)
    return path.read_bytes()
