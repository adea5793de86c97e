"""Sign bytes, and verify bytes or raise: OpenSSF Model Signing for folders, DSSE for documents. No I/O.

The rules, in the order in which they are checked:

1. One shape is accepted. Unknown fields, a second signature, certificates, log entries, another media type,
   another payload type and the older predicate are refused, and so is JSON that two readers could read
   differently.
2. The key comes from the caller. What the signed file says about its key (the hint) must be that key's
   fingerprint; it chooses nothing. The hash follows from the key's curve, never from the signed file.
3. The signature is checked over the very bytes that are parsed afterwards.
4. A statement lists whole files by SHA-256 under unique, portable names, and its root digest is recomputed.
   `ignore_paths` is never honoured: the caller compares the listed names with the folder, all of them.

Every failure is a `RefusedError` with a stable code; nothing here returns a bool. An ECDSA signature can be
altered without the key (s → n - s), so nothing may be identified by its signature: use the SHA-256 of what
was signed, or `files.dir_hash`.

Source: https://github.com/ossf/model-signing-spec (v1.0), https://github.com/secure-systems-lab/dsse.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedcompose.errors import RefusedError
from fedcompose.files import parse_json, sha256_hex

SIGNATURE_FILE = "model.sig"
BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
STATEMENT_PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"

MAX_NAME_CHARS = 255  # a signed file's name with its folders; what every file system can hold
MAX_ENVELOPE_SIGNATURES = 64  # far more roots than a federation has, few enough to check at once

_HASHES: dict[str, type[hashes.SHA256] | type[hashes.SHA384]] = {
    "secp256r1": hashes.SHA256,
    "secp384r1": hashes.SHA384,
}
_DIGEST = re.compile(r"[0-9a-f]{64}")
# Portable everywhere and never hidden: no leading dot means no "..", no ".git", which other verifiers skip.
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")

PublicKey = ec.EllipticCurvePublicKey


class Signer(Protocol):
    """Anything that holds a private key: a file, a token, a remote service."""

    @property
    def keyid(self) -> str: ...

    @property
    def public_pem(self) -> bytes: ...

    def sign(self, data: bytes) -> bytes:
        """An ECDSA signature in DER over `data`, hashed with SHA-256 (P-256) or SHA-384 (P-384)."""


@dataclass(frozen=True)
class SignedFiles:
    """What a verified `model.sig` says: these files, with these SHA-256 digests, signed by this key."""

    name: str
    digests: Mapping[str, str]
    payload_sha256: str
    keyid: str


@dataclass(frozen=True)
class VerifiedEnvelope:
    """A payload and the distinct keys whose signatures over it were checked."""

    payload: bytes
    keyids: frozenset[str]


# --- keys -----------------------------------------------------------------------------------------


def keyid_of(public_pem: bytes) -> str:
    """The fingerprint of a public key: SHA-256 of its PEM file, as `sha256sum site-a.pub` prints it."""
    return sha256_hex(public_pem)


def load_public_key(pem: bytes) -> PublicKey:
    """A P-256 or P-384 public key from its one canonical PEM form, so that a key has exactly one fingerprint.

    Raises: RefusedError: `KEY_UNUSABLE`.
    """
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise RefusedError("KEY_UNUSABLE", "not a readable public key", got=type(error).__name__) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _HASHES:
        raise RefusedError("KEY_UNUSABLE", "a key of another kind", expected="an ECDSA key on P-256 or P-384")
    if public_pem_of(key) != pem:
        raise RefusedError(
            "KEY_UNUSABLE",
            "the public key's PEM text is not in canonical form",
            fix="write it with `openssl ec -pubin -in KEY.pub -pubout`",
        )
    return key


def public_pem_of(key: PublicKey) -> bytes:
    """The canonical PEM form of a public key."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def signature_hash(key: PublicKey) -> hashes.HashAlgorithm:
    """The hash that belongs to the key's curve; there is no other choice."""
    return _HASHES[key.curve.name]()


def check_signature(public_pem: bytes, signature: bytes, data: bytes) -> None:
    """Return only if `signature` (DER) over `data` was made with this key.

    Raises: RefusedError: `KEY_UNUSABLE`, `SIGNATURE_INVALID`.
    """
    key = load_public_key(public_pem)
    try:
        key.verify(signature, data, ec.ECDSA(signature_hash(key)))
    except InvalidSignature as error:
        raise RefusedError(
            "SIGNATURE_INVALID",
            "the signature does not match what was signed",
            expected=f"key {keyid_of(public_pem)}",
        ) from error


# --- a folder's files: OpenSSF Model Signing v1.0 -------------------------------------------------


def sign_files(name: str, digests: Mapping[str, str], signer: Signer) -> bytes:
    """The content of `model.sig` for files with these SHA-256 digests.

    Names are listed in code-point order, as the specification says. `ignore_paths` tells other verifiers,
    which read the folder with the signature in it, to leave out `model.sig` and nothing else.

    Raises: ValueError: if a name or digest is one that `verify_files` would refuse.
    """
    try:
        listed = _listed_files([_resource(file, digests[file]) for file in sorted(digests)])
        _model_name(name)
    except RefusedError as error:
        raise ValueError(error.what) from error
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": _root_digest(listed.values())}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [SIGNATURE_FILE],
            },
            "resources": [_resource(file, digest) for file, digest in listed.items()],
        },
    }
    payload = _dump(statement)
    signature = signer.sign(_pae(STATEMENT_PAYLOAD_TYPE, payload))
    return _dump(
        {
            "mediaType": BUNDLE_TYPE,
            "verificationMaterial": {"publicKey": {"hint": signer.keyid}, "tlogEntries": []},
            "dsseEnvelope": {
                "payload": _encode(payload),
                "payloadType": STATEMENT_PAYLOAD_TYPE,
                "signatures": [{"sig": _encode(signature), "keyid": ""}],
            },
        }
    )


def read_hint(bundle: bytes) -> str:
    """The fingerprint of the key that claims to have signed: to look up the key, nothing more.

    Raises: RefusedError: `SIGNATURE_MISSING`, `SIGNATURE_SHAPE`.
    """
    return _read_bundle(bundle).hint


def verify_files(bundle: bytes, public_pem: bytes) -> SignedFiles:
    """The files that `public_pem`'s owner signed.

    Raises: RefusedError: `SIGNATURE_MISSING`, `SIGNATURE_SHAPE` (not the one accepted shape),
        `SIGNATURE_KEY` (made with another key), `KEY_UNUSABLE`, `SIGNATURE_INVALID`, `SIGNATURE_STATEMENT`
        (signed, but not a list of files that is acceptable).
    """
    read = _read_bundle(bundle)
    keyid = keyid_of(public_pem)
    if read.hint != keyid:
        raise RefusedError("SIGNATURE_KEY", "signed with another key", expected=f"key {keyid}", got=f"key {read.hint}")
    check_signature(public_pem, read.signature, _pae(STATEMENT_PAYLOAD_TYPE, read.payload))
    name, digests = _read_statement(read.payload)
    return SignedFiles(name, digests, sha256_hex(read.payload), keyid)


@dataclass(frozen=True)
class _Bundle:
    hint: str
    payload: bytes
    signature: bytes


def _read_bundle(bundle: bytes) -> _Bundle:
    if not bundle:
        raise RefusedError("SIGNATURE_MISSING", f"{SIGNATURE_FILE} is empty")
    shape = _Shape("SIGNATURE_SHAPE", SIGNATURE_FILE)
    document = shape.fields(shape.json(bundle), {"mediaType", "verificationMaterial", "dsseEnvelope"})
    shape.equal(document["mediaType"], BUNDLE_TYPE, "mediaType")
    material = shape.fields(document["verificationMaterial"], {"publicKey"}, {"tlogEntries"})
    shape.equal(material.get("tlogEntries", []), [], "tlogEntries")
    hint = shape.digest(shape.fields(material["publicKey"], {"hint"})["hint"], "hint")
    envelope = shape.fields(document["dsseEnvelope"], {"payload", "payloadType", "signatures"})
    shape.equal(envelope["payloadType"], STATEMENT_PAYLOAD_TYPE, "payloadType")
    signatures = shape.array(envelope["signatures"], "signatures")
    if not signatures:
        raise RefusedError("SIGNATURE_MISSING", f"{SIGNATURE_FILE} holds no signature")
    shape.equal(len(signatures), 1, "number of signatures")
    signature = shape.fields(signatures[0], {"sig"}, {"keyid"})
    if signature.get("keyid") not in (None, ""):
        shape.refuse("a keyid beside the signature, which must be empty")
    return _Bundle(hint, shape.base64(envelope["payload"], "payload"), shape.base64(signature["sig"], "sig"))


def _read_statement(payload: bytes) -> tuple[str, dict[str, str]]:
    """Name and digests of a signed OMS v1.0 statement."""
    shape = _Shape("SIGNATURE_STATEMENT", "the signed statement")
    statement = shape.fields(shape.json(payload), {"_type", "subject", "predicateType", "predicate"})
    shape.equal(statement["_type"], STATEMENT_TYPE, "_type")
    shape.equal(statement["predicateType"], PREDICATE_TYPE, "predicateType")
    subjects = shape.array(statement["subject"], "subject")
    shape.equal(len(subjects), 1, "number of subjects")
    subject = shape.fields(subjects[0], {"name", "digest"})
    root = shape.digest(shape.fields(subject["digest"], {"sha256"})["sha256"], "root digest")
    predicate = shape.fields(statement["predicate"], {"serialization", "resources"})
    _check_serialization(shape, predicate["serialization"])
    digests = _listed_files(predicate["resources"])
    shape.equal(root, _root_digest(digests.values()), "root digest")
    return _model_name(subject["name"]), digests


def _check_serialization(shape: _Shape, value: Any) -> None:
    serialization = shape.fields(value, {"method", "hash_type", "allow_symlinks"}, {"ignore_paths"})
    shape.equal(serialization["method"], "files", "method")
    shape.equal(serialization["hash_type"], "sha256", "hash_type")
    if serialization["allow_symlinks"] is not False:
        shape.refuse("allow_symlinks is not false")
    if not all(isinstance(path, str) for path in shape.array(serialization.get("ignore_paths", []), "ignore_paths")):
        shape.refuse("ignore_paths holds something other than text")


def _listed_files(resources: Any) -> dict[str, str]:
    """Digests by file name: portable, unique even where upper and lower case are one, in one of two orders.

    The specification sorts names by code point (`a-b/x` before `a/x`), model-signing 1.1.1 by path parts
    (`a/x` before `a-b/x`). Both are read. The root digest follows the listed order; what is signed does not
    depend on it.
    """
    shape = _Shape("SIGNATURE_STATEMENT", "the signed list of files")
    digests: dict[str, str] = {}
    for entry in shape.array(resources, "resources"):
        resource = shape.fields(entry, {"name", "algorithm", "digest"})
        shape.equal(resource["algorithm"], "sha256", "algorithm")
        name = _file_name(shape, resource["name"])
        if name in digests:
            shape.refuse(f"{name} is listed twice")
        digests[name] = shape.digest(resource["digest"], "file digest")
    if not digests:
        shape.refuse("no file is listed")
    if len({name.lower() for name in digests}) != len(digests):
        shape.refuse("two names differ only in upper and lower case")
    if list(digests) not in (sorted(digests), sorted(digests, key=lambda name: name.split("/"))):
        shape.refuse("the names are not sorted")
    return digests


def _file_name(shape: _Shape, name: Any) -> str:
    if not isinstance(name, str) or len(name) > MAX_NAME_CHARS or not _FILE_NAME.fullmatch(name):
        shape.refuse("a file name that is not portable")
    if name == SIGNATURE_FILE:
        shape.refuse(f"{SIGNATURE_FILE} lists itself")
    return name


def _model_name(name: Any) -> str:
    """The folder's name at signing time; only informative, so anything printable will do."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise RefusedError("SIGNATURE_STATEMENT", "the signed name is not printable text of at most 255 characters")
    return name


def _resource(name: str, digest: str) -> dict[str, str]:
    return {"name": name, "algorithm": "sha256", "digest": digest}


def _root_digest(digests: Iterable[str]) -> str:
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


# --- one document, several signatures: DSSE -------------------------------------------------------


def sign_envelope(payload: bytes, payload_type: str, signers: Sequence[Signer]) -> bytes:
    """A DSSE envelope around `payload` with one signature per signer.

    Raises: ValueError: for no signer, or for two signers with one key.
    """
    if not signers or len({signer.keyid for signer in signers}) != len(signers):
        raise ValueError("an envelope needs at least one signer, each with its own key")
    message = _pae(payload_type, payload)
    return _dump_envelope(payload, payload_type, {signer.keyid: signer.sign(message) for signer in signers})


def countersign_envelope(envelope: bytes, payload_type: str, signer: Signer) -> bytes:
    """The same document with one more signature, or a new one by a key that signed before; nothing is verified.

    Raises: RefusedError: `ENVELOPE_SHAPE`, `ENVELOPE_TYPE`.
    """
    payload, signatures = _read_envelope(envelope, payload_type)
    signature = signer.sign(_pae(payload_type, payload))
    return _dump_envelope(payload, payload_type, {**signatures, signer.keyid: signature})


def verify_envelope(envelope: bytes, payload_type: str, public_pems: Mapping[str, bytes]) -> VerifiedEnvelope:
    """The payload, and which of `public_pems` (by fingerprint) signed it.

    Signatures by keys that the caller does not name are ignored; a wrong signature by a key that it names is
    not.

    Raises: RefusedError: `ENVELOPE_SHAPE`, `ENVELOPE_TYPE` (a document of another kind), `ENVELOPE_KEY` (a
        key under another key's fingerprint, or no known key signed), `ENVELOPE_INVALID`, `KEY_UNUSABLE`.
    """
    payload, signatures = _read_envelope(envelope, payload_type)
    message = _pae(payload_type, payload)
    for keyid, public_pem in public_pems.items():
        if keyid_of(public_pem) != keyid:
            raise RefusedError("ENVELOPE_KEY", "a trusted key is listed under a fingerprint that is not its own")
    known = signatures.keys() & public_pems.keys()
    if not known:
        raise RefusedError(
            "ENVELOPE_KEY",
            "no trusted key signed this document",
            got=f"{len(signatures)} signatures by other keys",
        )
    for keyid in known:
        try:
            check_signature(public_pems[keyid], signatures[keyid], message)
        except RefusedError as error:
            if error.code != "SIGNATURE_INVALID":
                raise
            raise RefusedError("ENVELOPE_INVALID", error.what, expected=error.expected) from error
    return VerifiedEnvelope(payload, frozenset(known))


def read_envelope_unverified(envelope: bytes, payload_type: str) -> bytes:
    """The payload, its signatures unchecked: for documents that name the keys that must have signed them.

    Pass the same bytes to `verify_envelope` before believing a word of the payload.

    Raises: RefusedError: `ENVELOPE_SHAPE`, `ENVELOPE_TYPE`.
    """
    return _read_envelope(envelope, payload_type)[0]


def _read_envelope(envelope: bytes, payload_type: str) -> tuple[bytes, dict[str, bytes]]:
    shape = _Shape("ENVELOPE_SHAPE", "the signed document")
    document = shape.fields(shape.json(envelope), {"payload", "payloadType", "signatures"})
    if document["payloadType"] != payload_type:
        raise RefusedError(
            "ENVELOPE_TYPE", "a signed document of another kind", expected=payload_type,
            got=f"{str(document['payloadType'])[:80]!a}",
        )  # fmt: skip
    entries = shape.array(document["signatures"], "signatures")
    if not 0 < len(entries) <= MAX_ENVELOPE_SIGNATURES:
        shape.refuse(f"{len(entries)} signatures")
    signatures: dict[str, bytes] = {}
    for entry in entries:
        signature = shape.fields(entry, {"keyid", "sig"})
        keyid = shape.digest(signature["keyid"], "keyid")
        if keyid in signatures:
            shape.refuse("one key signed twice")
        signatures[keyid] = shape.base64(signature["sig"], "sig")
    return shape.base64(document["payload"], "payload"), signatures


def _dump_envelope(payload: bytes, payload_type: str, signatures: Mapping[str, bytes]) -> bytes:
    return _dump(
        {
            "payload": _encode(payload),
            "payloadType": payload_type,
            "signatures": [{"keyid": keyid, "sig": _encode(signature)} for keyid, signature in signatures.items()],
        }
    )


# --- bytes ----------------------------------------------------------------------------------------


def _pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: the bytes that are signed, which bind the payload's type too."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _dump(value: Any) -> bytes:
    """Compact JSON without a spare byte, so that every byte of a signed file carries meaning."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


@dataclass(frozen=True)
class _Shape:
    """Reads fields of one untrusted document and refuses, under one code, whatever does not fit."""

    code: str
    document: str

    def refuse(self, reason: str) -> NoReturn:
        raise RefusedError(self.code, f"{self.document} does not have the accepted shape", got=reason)

    def json(self, data: bytes) -> Any:
        try:
            return parse_json(data, self.document)
        except RefusedError as error:
            raise RefusedError(self.code, error.what, got=error.got) from error

    def fields(
        self, value: Any, required: AbstractSet[str], optional: AbstractSet[str] = frozenset()
    ) -> dict[str, Any]:
        if not isinstance(value, dict) or not required <= value.keys() <= required | optional:
            self.refuse(f"expected an object with exactly the fields {', '.join(sorted(required | optional))}")
        return value

    def array(self, value: Any, what: str) -> list[Any]:
        if not isinstance(value, list):
            self.refuse(f"{what} is not a list")
        return value

    def equal(self, value: Any, expected: Any, what: str) -> None:
        if value != expected:
            self.refuse(f"{what} is not {expected!r}")

    def digest(self, value: Any, what: str) -> str:
        if not isinstance(value, str) or not _DIGEST.fullmatch(value):
            self.refuse(f"{what} is not a SHA-256 in lower-case hex")
        return value

    def base64(self, value: Any, what: str) -> bytes:
        """Decode the one canonical base64 form, so that no two texts mean the same bytes."""
        try:
            data = base64.b64decode(value, validate=True) if isinstance(value, str) else b""
        except (binascii.Error, ValueError):
            data = b""
        if not data or _encode(data) != value:
            self.refuse(f"{what} is not base64 in canonical form")
        return data
