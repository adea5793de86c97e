"""The signed forms: what is accepted, and that nothing else is."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, utils
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fedcompose.errors import RefusedError
from fedcompose.files import MAX_JSON_BYTES
from fedcompose.signing import (
    check_signature,
    keyid_of,
    load_public_key,
    read_hint,
    sign_envelope,
    sign_files,
    verify_envelope,
    verify_files,
)
from tests.vectors import vectors

DIGESTS = {
    "adapter_config.json": "1" * 64,
    "adapter_model.safetensors": "2" * 64,
    "ingredients/site-a-b/provenance.json": "3" * 64,
    "ingredients/site-a/provenance.json": "4" * 64,
    "provenance.json": "5" * 64,
}


class MemorySigner:
    """A key that lives in memory; P-256 unless told otherwise."""

    def __init__(self, seed: int, curve: ec.EllipticCurve | None = None) -> None:
        self.key = ec.derive_private_key(seed, curve or ec.SECP256R1())
        self.public_pem = pem_of(self.key.public_key())
        self.keyid = keyid_of(self.public_pem)

    def sign(self, data: bytes) -> bytes:
        hash_ = hashes.SHA384() if self.key.curve.name == "secp384r1" else hashes.SHA256()
        return self.key.sign(data, ec.ECDSA(hash_, deterministic_signing=True))


def pem_of(key: Any) -> bytes:
    pem: bytes = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return pem


SIGNER, OTHER = MemorySigner(1001), MemorySigner(1002)
BUNDLE = sign_files("adapter", DIGESTS, SIGNER)
TYPE = "application/vnd.fedcompose.test.v1+json"


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(RefusedError) as caught:
        call()
    return caught.value.code


def signed_statement(change: Callable[[dict[str, Any]], None]) -> bytes:
    """A bundle with a valid signature over a changed statement: a hostile signer, not a hostile courier."""
    bundle = json.loads(BUNDLE)
    envelope = bundle["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    change(statement)
    return signed_payload(json.dumps(statement).encode())


def signed_payload(payload: bytes) -> bytes:
    bundle = json.loads(BUNDLE)
    kind = b"application/vnd.in-toto+json"
    message = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(SIGNER.sign(message)).decode()
    return json.dumps(bundle).encode()


# --- folders ----------------------------------------------------------------------------------------


def test_verifies_what_it_signed() -> None:
    signed = verify_files(BUNDLE, SIGNER.public_pem)
    assert (signed.name, dict(signed.digests), signed.keyid) == ("adapter", DIGESTS, SIGNER.keyid)
    assert read_hint(BUNDLE) == SIGNER.keyid


def test_signs_the_same_bytes_twice_alike() -> None:
    assert sign_files("adapter", dict(reversed(DIGESTS.items())), SIGNER) == BUNDLE


def test_verifies_p384() -> None:
    signer = MemorySigner(7, ec.SECP384R1())
    assert verify_files(sign_files("m", {"a": "0" * 64}, signer), signer.public_pem).keyid == signer.keyid


def test_refuses_every_changed_byte() -> None:
    """Compact JSON leaves no byte without meaning, so one changed byte anywhere is noticed."""
    bundle = sign_files("m", {"a": "0" * 64}, SIGNER)
    for position in range(len(bundle)):
        for replacement in {b" ", b"0", bytes([bundle[position] ^ 0x20])}:
            changed = bundle[:position] + replacement + bundle[position + 1 :]
            if changed != bundle:
                assert refusal(lambda changed=changed: verify_files(changed, SIGNER.public_pem)).startswith(
                    "SIGNATURE_"
                )  # type: ignore[misc]


def test_a_changed_signature_over_the_same_files_is_not_another_identity() -> None:
    """ECDSA accepts (r, n - s) as well; only the signed statement identifies what was signed."""
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    bundle = json.loads(BUNDLE)
    signature = bundle["dsseEnvelope"]["signatures"][0]
    r, s = utils.decode_dss_signature(base64.b64decode(signature["sig"]))
    signature["sig"] = base64.b64encode(utils.encode_dss_signature(r, order - s)).decode()
    twin = json.dumps(bundle).encode()
    assert twin != BUNDLE
    assert verify_files(twin, SIGNER.public_pem) == verify_files(BUNDLE, SIGNER.public_pem)


def test_refuses_another_key_and_a_swapped_hint() -> None:
    assert refusal(lambda: verify_files(BUNDLE, OTHER.public_pem)) == "SIGNATURE_KEY"
    swapped = BUNDLE.replace(SIGNER.keyid.encode(), OTHER.keyid.encode())
    assert refusal(lambda: verify_files(swapped, SIGNER.public_pem)) == "SIGNATURE_KEY"
    assert refusal(lambda: verify_files(swapped, OTHER.public_pem)) == "SIGNATURE_INVALID"


def put(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Set a place deep in a document: the last item is the value, and DELETE removes the place."""
    *place, value = path

    def change(document: Any) -> None:
        for step in place[:-1]:
            document = document[step]
        if value is DELETE:
            del document[place[-1]]
        elif isinstance(document, list) and place[-1] == len(document):
            document.append(value)
        else:
            document[place[-1]] = value

    return change


DELETE = object()
ENVELOPE = "dsseEnvelope"
MATERIAL = "verificationMaterial"
JUNK = {"sig": "AAAA", "keyid": ""}

COURIER = {
    "no signature": ((ENVELOPE, "signatures", []), "SIGNATURE_MISSING"),
    "two signatures": ((ENVELOPE, "signatures", 1, JUNK), "SIGNATURE_SHAPE"),
    "signatures is an object": ((ENVELOPE, "signatures", {}), "SIGNATURE_SHAPE"),
    "a keyid beside the signature": ((ENVELOPE, "signatures", 0, "keyid", "x"), "SIGNATURE_SHAPE"),
    "an extra field in the signature": ((ENVELOPE, "signatures", 0, "extra", 1), "SIGNATURE_SHAPE"),
    "empty sig": ((ENVELOPE, "signatures", 0, "sig", ""), "SIGNATURE_SHAPE"),
    "sig is a number": ((ENVELOPE, "signatures", 0, "sig", 3), "SIGNATURE_SHAPE"),
    "sig with a line break": ((ENVELOPE, "signatures", 0, "sig", "AA\nAA"), "SIGNATURE_SHAPE"),
    "sig with loose padding bits": ((ENVELOPE, "signatures", 0, "sig", "AB=="), "SIGNATURE_SHAPE"),
    "sig outside ASCII": ((ENVELOPE, "signatures", 0, "sig", "ÄAAA"), "SIGNATURE_SHAPE"),
    "other media type": (("mediaType", "application/vnd.dev.sigstore.bundle.v0.2+json"), "SIGNATURE_SHAPE"),
    "other payload type": ((ENVELOPE, "payloadType", "application/json"), "SIGNATURE_SHAPE"),
    "payload swapped": ((ENVELOPE, "payload", base64.b64encode(b"{}").decode()), "SIGNATURE_INVALID"),
    "no hint": ((MATERIAL, "publicKey", {}), "SIGNATURE_SHAPE"),
    "empty hint": ((MATERIAL, "publicKey", "hint", ""), "SIGNATURE_SHAPE"),
    "null hint": ((MATERIAL, "publicKey", "hint", None), "SIGNATURE_SHAPE"),
    "hint in capitals": ((MATERIAL, "publicKey", "hint", "A" * 64), "SIGNATURE_SHAPE"),
    "raw key bytes": ((MATERIAL, "publicKey", "rawBytes", "AAAA"), "SIGNATURE_SHAPE"),
    "x509 chain instead": ((MATERIAL, {"x509CertificateChain": {"certificates": []}}), "SIGNATURE_SHAPE"),
    "x509 chain besides": ((MATERIAL, "x509CertificateChain", {"certificates": []}), "SIGNATURE_SHAPE"),
    "log entry": ((MATERIAL, "tlogEntries", [{}]), "SIGNATURE_SHAPE"),
    "timestamps": ((MATERIAL, "timestampVerificationData", {}), "SIGNATURE_SHAPE"),
    "message signature": (("messageSignature", {}), "SIGNATURE_SHAPE"),
    "no envelope": ((ENVELOPE, DELETE), "SIGNATURE_SHAPE"),
    "null envelope": ((ENVELOPE, None), "SIGNATURE_SHAPE"),
}  # fmt: skip


@pytest.mark.parametrize(("path", "code"), COURIER.values(), ids=COURIER.keys())
def test_refuses_what_a_courier_changed(path: tuple[Any, ...], code: str) -> None:
    bundle = json.loads(BUNDLE)
    put(*path)(bundle)
    assert refusal(lambda: verify_files(json.dumps(bundle).encode(), SIGNER.public_pem)) == code


SERIALIZATION = ("predicate", "serialization")
FIRST = ("predicate", "resources", 0)
SIGNED = {
    "older predicate": ("predicateType", "https://model_signing/Digests/v0.1"),
    "provenance predicate": ("predicateType", "https://slsa.dev/provenance/v1"),
    "other statement": ("_type", "https://in-toto.io/Statement/v0.1"),
    "extra field": ("extra", 1),
    "extra field in the predicate": ("predicate", "claims", {}),
    "no subject": ("subject", []),
    "two subjects": ("subject", 1, {"name": "b", "digest": {"sha256": "0" * 64}}),
    "empty name": ("subject", 0, "name", ""),
    "name that is a number": ("subject", 0, "name", 1),
    "name too long": ("subject", 0, "name", "a" * 256),
    "name with an escape": ("subject", 0, "name", "\x1b[31m"),
    "name with half a surrogate": ("subject", 0, "name", "\ud800"),
    "wrong root digest": ("subject", 0, "digest", {"sha256": "0" * 64}),
    "root digest of another kind": ("subject", 0, "digest", {"sha512": "0" * 64}),
    "shards": (*SERIALIZATION, "method", "shards"),
    "other hash": (*SERIALIZATION, "hash_type", "blake2b"),
    "symlinks": (*SERIALIZATION, "allow_symlinks", True),
    "symlinks as zero": (*SERIALIZATION, "allow_symlinks", 0),
    "shard size": (*SERIALIZATION, "shard_size", 1),
    "ignore_paths is text": (*SERIALIZATION, "ignore_paths", "model.sig"),
    "ignore_paths holds a number": (*SERIALIZATION, "ignore_paths", [1]),
    "no files": ("predicate", "resources", []),
    "algorithm": (*FIRST, "algorithm", "sha512"),
    "short digest": (*FIRST, "digest", "1" * 63),
    "digest in capitals": (*FIRST, "digest", "A" * 64),
    "digest with a line end": (*FIRST, "digest", "1" * 64 + "\n"),
    "traversal": (*FIRST, "name", "../adapter_config.json"),
    "inner traversal": (*FIRST, "name", "a/../b"),
    "absolute": (*FIRST, "name", "/etc/passwd"),
    "backslash": (*FIRST, "name", "a\\b"),
    "drive": (*FIRST, "name", "C:a"),
    "hidden": (*FIRST, "name", ".gitignore"),
    "empty part": (*FIRST, "name", "a//b"),
    "trailing slash": (*FIRST, "name", "a/"),
    "empty file name": (*FIRST, "name", ""),
    "line end": (*FIRST, "name", "adapter_config.json\n"),
    "look-alike letter": (*FIRST, "name", "аdapter_config.json"),
    "NUL": (*FIRST, "name", "a\0"),
    "too long": (*FIRST, "name", "a" * 256),
    "number": (*FIRST, "name", 1),
    "lists itself": ("predicate", "resources", 3, "name", "model.sig"),
}  # fmt: skip


@pytest.mark.parametrize("path", SIGNED.values(), ids=SIGNED.keys())
def test_refuses_a_hostile_statement_with_a_valid_signature(path: tuple[Any, ...]) -> None:
    bundle = signed_statement(put(*path))
    assert refusal(lambda: verify_files(bundle, SIGNER.public_pem)) == "SIGNATURE_STATEMENT"


@pytest.mark.parametrize("path", [("subject", 0, "name", "é" * 255), (*FIRST, "name", "a" * 255)])
def test_the_longest_names_are_accepted(path: tuple[Any, ...]) -> None:
    assert verify_files(signed_statement(put(*path)), SIGNER.public_pem)


def list_files(names: list[str]) -> Callable[[dict[str, Any]], None]:
    """List these files, with a root digest that fits."""

    def change(statement: dict[str, Any]) -> None:
        digests = [f"{number:064x}" for number in range(len(names))]
        statement["predicate"]["resources"] = [
            {"name": name, "algorithm": "sha256", "digest": digest} for name, digest in zip(names, digests, strict=True)
        ]
        root = hashes.Hash(hashes.SHA256())
        root.update(bytes.fromhex("".join(digests)))
        statement["subject"][0]["digest"] = {"sha256": root.finalize().hex()}

    return change


@pytest.mark.parametrize(
    "names", [["a", "a"], ["A", "a"], ["b", "a"], ["a", "b", "a/c"]], ids=["twice", "case", "order", "mixed"]
)
def test_refuses_lists_that_two_readers_could_take_differently(names: list[str]) -> None:
    bundle = signed_statement(list_files(names))
    assert refusal(lambda: verify_files(bundle, SIGNER.public_pem)) == "SIGNATURE_STATEMENT"


def test_refuses_a_name_listed_twice_even_if_the_root_digest_counts_it_once() -> None:
    """Readers that keep the first, and readers that keep the last, would check different bytes."""

    def change(statement: dict[str, Any]) -> None:
        list_files(["a"])(statement)
        shadowed = {"name": "a", "algorithm": "sha256", "digest": "f" * 64}
        statement["predicate"]["resources"].insert(0, shadowed)

    assert refusal(lambda: verify_files(signed_statement(change), SIGNER.public_pem)) == "SIGNATURE_STATEMENT"


@pytest.mark.parametrize("names", [["a-b/x", "a/x"], ["a/x", "a-b/x"]], ids=["code points", "path parts"])
def test_reads_both_orders_that_are_in_use(names: list[str]) -> None:
    signed = verify_files(signed_statement(list_files(names)), SIGNER.public_pem)
    assert list(signed.digests) == names


def test_does_not_honour_ignore_paths() -> None:
    """A file that the signer asks to ignore is just not among the signed names: the caller refuses it."""
    bundle = signed_statement(put(*SERIALIZATION, "ignore_paths", ["adapter_model.bin"]))
    assert "adapter_model.bin" not in verify_files(bundle, SIGNER.public_pem).digests


NOT_ONE_READING = {
    "duplicate key": BUNDLE.replace(b'"hint":', b'"hint":"' + b"0" * 64 + b'","hint":'),
    "byte order mark": b"\xef\xbb\xbf" + BUNDLE,
    "NaN": BUNDLE.replace(b'"tlogEntries":[]', b'"tlogEntries":[NaN]'),
    "deep": BUNDLE.replace(b'"tlogEntries":[]', b'"tlogEntries":' + b"[" * 5000 + b"]" * 5000),
    "huge number": BUNDLE.replace(b'"tlogEntries":[]', b'"tlogEntries":' + b"9" * 5000),
    "not UTF-8": BUNDLE + b"\xff",
    "two documents": BUNDLE + BUNDLE,
    "too large": BUNDLE + b" " * MAX_JSON_BYTES,
    "text": b'"text"',
    "null": b"null",
}


@pytest.mark.parametrize("bundle", NOT_ONE_READING.values(), ids=NOT_ONE_READING.keys())
def test_refuses_json_that_readers_could_take_differently(bundle: bytes) -> None:
    assert refusal(lambda: verify_files(bundle, SIGNER.public_pem)) == "SIGNATURE_SHAPE"
    assert refusal(lambda: read_hint(bundle)) == "SIGNATURE_SHAPE"


def test_refuses_an_empty_file_and_a_signed_nothing() -> None:
    assert refusal(lambda: verify_files(b"", SIGNER.public_pem)) == "SIGNATURE_MISSING"
    assert refusal(lambda: verify_files(signed_payload(b"\xff"), SIGNER.public_pem)) == "SIGNATURE_STATEMENT"


@pytest.mark.parametrize("digests", [{}, {"../a": "0" * 64}, {"a": "0"}, {"A": "0" * 64, "a": "0" * 64}])
def test_does_not_sign_what_it_would_refuse(digests: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="signed"):
        sign_files("m", digests, SIGNER)


# --- any input at all -------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON document."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    found = []
    for step, child in items:
        found.append((*path, step))
        if isinstance(child, dict | list):
            found += places(child, (*path, step))
    return found


BUNDLE_PLACES = places(json.loads(BUNDLE))
STATEMENT_PLACES = places(json.loads(base64.b64decode(json.loads(BUNDLE)["dsseEnvelope"]["payload"])))
QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def same_or_refused(bundle: bytes) -> None:
    """Whatever happened on the way, the result is the same statement or a refusal, and no other exception."""
    try:
        assert verify_files(bundle, SIGNER.public_pem) == verify_files(BUNDLE, SIGNER.public_pem)
    except RefusedError as error:
        assert error.code.startswith("SIGNATURE_")


@QUICK
@given(st.sampled_from(BUNDLE_PLACES), JSON)
def test_any_value_anywhere_in_a_bundle_changes_nothing_or_is_refused(place: tuple[Any, ...], value: Any) -> None:
    bundle = json.loads(BUNDLE)
    put(*place, value)(bundle)
    same_or_refused(json.dumps(bundle).encode())


@QUICK
@given(st.sampled_from(STATEMENT_PLACES), JSON)
def test_any_value_in_a_signed_statement_is_read_or_refused(place: tuple[Any, ...], value: Any) -> None:
    """The signer is hostile, so another statement may be accepted; but only a refusal is ever raised."""
    bundle = signed_statement(put(*place, value))
    try:
        signed = verify_files(bundle, SIGNER.public_pem)
    except RefusedError as error:
        assert error.code == "SIGNATURE_STATEMENT"
    else:
        assert len(signed.digests) == len(DIGESTS) and signed.keyid == SIGNER.keyid


@QUICK
@given(st.data())
def test_any_bytes_spliced_in_change_nothing_or_are_refused(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(BUNDLE)))
    stop = data.draw(st.integers(start, min(start + 8, len(BUNDLE))))
    same_or_refused(BUNDLE[:start] + data.draw(st.binary(max_size=8)) + BUNDLE[stop:])


@QUICK
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
@example(b"{}")
def test_any_other_input_is_refused(junk: bytes) -> None:
    assert refusal(lambda: verify_files(junk, SIGNER.public_pem)).startswith("SIGNATURE_")
    assert refusal(lambda: verify_envelope(junk, TYPE, {SIGNER.keyid: SIGNER.public_pem})).startswith("ENVELOPE_")
    assert refusal(lambda: load_public_key(junk)) == "KEY_UNUSABLE"


# --- keys -------------------------------------------------------------------------------------------


def test_accepts_one_spelling_of_a_key_only() -> None:
    """Were two spellings accepted, one key would have two fingerprints and could sign for two."""
    pem = SIGNER.public_pem
    body = pem.replace(b"-----BEGIN PUBLIC KEY-----\n", b"").replace(b"\n-----END PUBLIC KEY-----\n", b"")
    others = [
        pem.replace(b"\n", b"\r\n"),
        pem.rstrip(b"\n"),
        b"comment\n" + pem,
        pem + OTHER.public_pem,
        b"-----BEGIN PUBLIC KEY-----\n" + body.replace(b"\n", b"") + b"\n-----END PUBLIC KEY-----\n",
    ]
    for other in others:
        assert refusal(lambda other=other: load_public_key(other)) == "KEY_UNUSABLE"  # type: ignore[misc]


@pytest.mark.parametrize(
    "key",
    [
        ec.derive_private_key(5, ec.SECP521R1()),
        ec.derive_private_key(5, ec.SECP256K1()),
        ed25519.Ed25519PrivateKey.from_private_bytes(b"5" * 32),
    ],
    ids=["P-521", "secp256k1", "Ed25519"],
)
def test_refuses_keys_of_other_kinds(key: Any) -> None:
    assert refusal(lambda: load_public_key(pem_of(key.public_key()))) == "KEY_UNUSABLE"


# --- single documents -------------------------------------------------------------------------------

KEYS = {signer.keyid: signer.public_pem for signer in (SIGNER, OTHER)}


def test_counts_each_key_that_signed_a_document() -> None:
    envelope = sign_envelope(b"payload", TYPE, [SIGNER, OTHER, MemorySigner(1003)])
    verified = verify_envelope(envelope, TYPE, KEYS)
    assert verified.payload == b"payload"
    assert verified.keyids == frozenset(KEYS)


def test_a_key_that_cannot_be_used_is_not_blamed_on_the_document() -> None:
    pem = pem_of(ed25519.Ed25519PrivateKey.from_private_bytes(b"5" * 32).public_key())
    envelope = sign_envelope(b"{}", TYPE, [SIGNER]).replace(SIGNER.keyid.encode(), keyid_of(pem).encode())
    assert refusal(lambda: verify_envelope(envelope, TYPE, {keyid_of(pem): pem})) == "KEY_UNUSABLE"


@pytest.mark.parametrize("signers", [[], [SIGNER, OTHER, SIGNER]], ids=["nobody", "one key twice"])
def test_makes_no_envelope_that_nobody_would_accept(signers: list[MemorySigner]) -> None:
    with pytest.raises(ValueError, match="at least one signer"):
        sign_envelope(b"{}", TYPE, signers)


def test_refuses_a_document_of_another_kind_even_if_the_label_is_changed() -> None:
    envelope = sign_envelope(b"{}", TYPE, [SIGNER])
    other = "application/vnd.fedcompose.other.v1+json"
    assert refusal(lambda: verify_envelope(envelope, other, KEYS)) == "ENVELOPE_TYPE"
    relabelled = envelope.replace(TYPE.encode(), other.encode())
    assert refusal(lambda: verify_envelope(relabelled, other, KEYS)) == "ENVELOPE_INVALID"


def test_refuses_a_document_that_no_known_key_signed() -> None:
    envelope = sign_envelope(b"{}", TYPE, [MemorySigner(1003)])
    assert refusal(lambda: verify_envelope(envelope, TYPE, KEYS)) == "ENVELOPE_KEY"


def test_refuses_a_document_with_one_wrong_signature_among_good_ones() -> None:
    good, bad = (json.loads(sign_envelope(data, TYPE, [SIGNER, OTHER])) for data in (b"a", b"b"))
    good["signatures"][1] = bad["signatures"][1]
    assert refusal(lambda: verify_envelope(json.dumps(good).encode(), TYPE, KEYS)) == "ENVELOPE_INVALID"


def test_does_not_count_a_key_twice() -> None:
    envelope = json.loads(sign_envelope(b"{}", TYPE, [SIGNER]))
    envelope["signatures"] *= 2
    assert refusal(lambda: verify_envelope(json.dumps(envelope).encode(), TYPE, KEYS)) == "ENVELOPE_SHAPE"
    alias = {SIGNER.keyid: SIGNER.public_pem, "0" * 64: SIGNER.public_pem}
    assert refusal(lambda: verify_envelope(sign_envelope(b"{}", TYPE, [SIGNER]), TYPE, alias)) == "ENVELOPE_KEY"


def test_a_folder_signature_is_no_document_and_the_other_way_round() -> None:
    inner = json.dumps(json.loads(BUNDLE)["dsseEnvelope"]).encode()
    assert refusal(lambda: verify_envelope(BUNDLE, TYPE, KEYS)) == "ENVELOPE_SHAPE"
    assert refusal(lambda: verify_envelope(inner, TYPE, KEYS)) == "ENVELOPE_TYPE"
    assert refusal(lambda: verify_files(sign_envelope(b"{}", TYPE, [SIGNER]), SIGNER.public_pem)) == "SIGNATURE_SHAPE"


@QUICK
@given(st.data())
def test_any_change_to_a_document_is_refused_or_leaves_its_payload(data: st.DataObject) -> None:
    envelope = json.loads(sign_envelope(b"payload", TYPE, [SIGNER, OTHER]))
    put(*data.draw(st.sampled_from(places(envelope))), data.draw(JSON))(envelope)
    try:
        assert verify_envelope(json.dumps(envelope).encode(), TYPE, KEYS).payload == b"payload"
    except RefusedError as error:
        assert error.code.startswith("ENVELOPE_")


# --- public vectors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["ecdsa_secp256r1_sha256_test", "ecdsa_secp384r1_sha384_test", "ecdsa_secp256r1_sha256_p1363_test"],
)
def test_agrees_with_wycheproof(name: str) -> None:
    """P1363 is another encoding of signatures, so none of those counts.

    Source: https://github.com/C2SP/wycheproof.
    """
    document = vectors(f"wycheproof/{name}.json")
    checked = 0
    for group in document["testGroups"]:
        pem = pem_of(serialization.load_pem_public_key(group["publicKeyPem"].encode()))
        for case in group["tests"]:
            valid = case["result"] == "valid" and "p1363" not in name
            assert accepts(pem, bytes.fromhex(case["sig"]), bytes.fromhex(case["msg"])) == valid, case
            checked += 1
    assert checked == document["numberOfTests"] > 200


def accepts(pem: bytes, signature: bytes, message: bytes) -> bool:
    try:
        check_signature(pem, signature, message)
    except RefusedError as error:
        assert error.code == "SIGNATURE_INVALID"
        return False
    return True


@pytest.fixture
def fits() -> Callable[[str, Any], bool]:
    """Whether a document fits one of the four JSON Schemas of v1.0.

    Source: https://github.com/ossf/model-signing-spec.
    """
    jsonschema = pytest.importorskip("jsonschema")
    referencing = pytest.importorskip("referencing")
    names = ("bundle", "envelope", "statement", "predicate")
    schemas = {name: vectors(f"oms-schemas/{name}.schema.json") for name in names}
    registry = referencing.Registry().with_resources(
        [(schema["$id"], referencing.Resource.from_contents(schema)) for schema in schemas.values()]
    )
    return lambda name, document: jsonschema.Draft202012Validator(schemas[name], registry=registry).is_valid(document)


def documents(bundle: bytes) -> dict[str, Any]:
    """A bundle and what is inside it, by the name of the schema."""
    document = json.loads(bundle)
    statement = json.loads(base64.b64decode(document[ENVELOPE]["payload"]))
    return {
        "bundle": document,
        "envelope": document[ENVELOPE],
        "statement": statement,
        "predicate": statement["predicate"],
    }


def test_fits_the_schemas_of_the_specification(fits: Callable[[str, Any], bool]) -> None:
    for signer in (SIGNER, MemorySigner(7, ec.SECP384R1())):
        bundle = sign_files("adapter", DIGESTS, signer)
        assert all(fits(name, document) for name, document in documents(bundle).items())
    statement = documents(BUNDLE)["statement"]
    assert not fits("statement", statement | {"predicate": statement["predicate"] | {"claims": {}}})


@pytest.mark.parametrize(
    "path",
    [
        (ENVELOPE, "signatures", 0, "keyid", DELETE),
        (ENVELOPE, "signatures", 0, "keyid", None),
        (MATERIAL, "tlogEntries", DELETE),
    ],
    ids=["no keyid", "null as keyid", "no log entries"],
)
def test_the_other_spellings_that_are_accepted_fit_them_too(
    fits: Callable[[str, Any], bool], path: tuple[Any, ...]
) -> None:
    bundle = json.loads(BUNDLE)
    put(*path)(bundle)
    verify_files(json.dumps(bundle).encode(), SIGNER.public_pem)
    assert fits("bundle", bundle)
