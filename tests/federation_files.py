"""Small federation files with fixed keys, and what a hostile or careless root could sign."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedcompose.drafts import create_federation, enrol
from fedcompose.errors import FedcomposeError
from fedcompose.federation_file import FEDERATION_TYPE
from fedcompose.files import dump_json, sha256_hex
from fedcompose.keys import ENROLMENT_TYPE, read_enrolment
from fedcompose.signing import Signer, keyid_of, public_pem_of, sign_envelope

NOW = datetime(2026, 11, 20, 9, 30, 0, tzinfo=UTC)
DAY = timedelta(days=1)
URN = "urn:uuid:6b0c0000-0000-4000-8000-000000000000"
BASES = {"tiny": "b" * 64}


@dataclass(frozen=True)
class MemorySigner:
    key: ec.EllipticCurvePrivateKey

    @property
    def public_pem(self) -> bytes:
        return public_pem_of(self.key.public_key())

    @property
    def keyid(self) -> str:
        return keyid_of(self.public_pem)

    def sign(self, data: bytes) -> bytes:
        return self.key.sign(data, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))


def signer(seed: int) -> MemorySigner:
    return MemorySigner(ec.derive_private_key(seed, ec.SECP256R1()))


ROOT, ROOT_2, ROOT_3, SITE, HUB, STRANGER = (signer(seed) for seed in range(101, 107))


def node_key(seed: int) -> str:
    """The public key of a site's connection."""
    return public_pem_of(ec.derive_private_key(seed, ec.SECP384R1()).public_key()).decode()


def request(
    member: Signer,
    name: str,
    role: str = "site",
    domain: str | None = "math",
    *,
    old: Signer | None = None,
    node: str | None = None,
) -> bytes:
    """An enrolment; one that takes over from `old` is signed by both."""
    document = {"schema": "fedcompose/enrolment/v1", "id": name, "role": role, "domain": domain}
    document |= {"public_key": member.public_pem.decode(), "replaces": old.keyid if old else None, "node_key": node}
    present = {key: value for key, value in document.items() if value is not None}
    return sign_envelope(dump_json(present), ENROLMENT_TYPE, [member, old] if old else [member])


FIRST = create_federation("Demo", ROOT, "root", BASES, URN, NOW)
SECOND = enrol(FIRST, request(SITE, "site-a"), ROOT, NOW)
THIRD = enrol(SECOND, request(HUB, "hub", "coordinator", None), ROOT, NOW + DAY)


def shared(threshold: int, *roots: MemorySigner) -> bytes:
    """The draft of a federation with several roots, signed by the first."""
    others = [read_enrolment(request(root, f"root-{n}", "root", None)) for n, root in enumerate(roots[1:], 2)]
    return create_federation("Demo", roots[0], "root", BASES, URN, NOW, others=others, threshold=threshold)


def payload_of(envelope: bytes) -> bytes:
    return base64.b64decode(json.loads(envelope)["payload"])


def digest_of(envelope: bytes) -> str:
    return sha256_hex(payload_of(envelope))


def changed(envelope: bytes, *path: Any, by: tuple[MemorySigner, ...] = (ROOT,)) -> bytes:
    """The same file with one place changed, validly signed."""
    *place, value = path
    document = item = json.loads(payload_of(envelope))
    for step in place[:-1]:
        item = item[step]
    item[place[-1]] = value
    return sign_envelope(json.dumps(document).encode(), FEDERATION_TYPE, by)


def following(envelope: bytes, by: tuple[MemorySigner, ...], **changes: Any) -> bytes:
    """The next version with these fields changed, signed by whoever is given."""
    document = json.loads(payload_of(envelope))
    document |= {"version": document["version"] + 1, "previous": digest_of(envelope)} | changes
    return sign_envelope(json.dumps(document).encode(), FEDERATION_TYPE, by)


def roots_entry(*roots: MemorySigner) -> list[dict[str, str]]:
    return [
        {"keyid": root.keyid, "name": f"root {number}", "public_key": root.public_pem.decode()}
        for number, root in enumerate(roots)
    ]


def with_roots(envelope: bytes, threshold: int, *roots: MemorySigner, by: tuple[MemorySigner, ...]) -> bytes:
    document = json.loads(payload_of(envelope)) | {"threshold": threshold, "roots": roots_entry(*roots)}
    return sign_envelope(json.dumps(document).encode(), FEDERATION_TYPE, by)


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(FedcomposeError) as caught:
        call()
    return caught.value.code
