"""The federation file: whom it admits, whom it believes, and that it never goes back."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.numpy import save_file
from typer.testing import CliRunner

from fedcompose.cli import app, main
from fedcompose.errors import FedcomposeError
from fedcompose.federation import (
    FEDERATION_TYPE,
    Federation,
    create_federation,
    enrol,
    format_time,
    parse_time,
    pinned,
    read_federation,
    sign_federation,
    trusted_federation,
    verify_federation,
)
from fedcompose.files import dump_json, sha256_hex
from fedcompose.keys import ENROLMENT_TYPE, load_signer, new_key
from fedcompose.signing import keyid_of, public_pem_of, sign_envelope

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


def request(member: MemorySigner, name: str, role: str = "site", domain: str | None = "math") -> bytes:
    document = {"schema": "fedcompose/enrolment/v1", "id": name, "role": role, "domain": domain}
    document["public_key"] = member.public_pem.decode()
    return sign_envelope(dump_json({k: v for k, v in document.items() if v is not None}), ENROLMENT_TYPE, [member])


FIRST = create_federation("Demo", ROOT, "root", BASES, URN, NOW)
SECOND = enrol(FIRST, request(SITE, "site-a"), ROOT, NOW)
THIRD = enrol(SECOND, request(HUB, "hub", "coordinator", None), ROOT, NOW + DAY)


def payload_of(envelope: bytes) -> bytes:
    return base64.b64decode(json.loads(envelope)["payload"])


def changed(envelope: bytes, *path: Any, by: tuple[MemorySigner, ...] = (ROOT,)) -> bytes:
    """The same file with one place changed, validly signed: what a hostile or careless root could sign."""
    *place, value = path
    document = item = json.loads(payload_of(envelope))
    for step in place[:-1]:
        item = item[step]
    item[place[-1]] = value
    return sign_envelope(json.dumps(document).encode(), FEDERATION_TYPE, by)


def verify(envelope: bytes, *roots: MemorySigner, now: datetime = NOW + DAY) -> Federation:
    return verify_federation(envelope, root_fingerprints=[root.keyid for root in roots or (ROOT,)], now=now)


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(FedcomposeError) as caught:
        call()
    return caught.value.code


def roots_entry(*roots: MemorySigner) -> list[dict[str, str]]:
    return [
        {"keyid": root.keyid, "name": f"root {number}", "public_key": root.public_pem.decode()}
        for number, root in enumerate(roots)
    ]


def with_roots(envelope: bytes, threshold: int, *roots: MemorySigner, by: tuple[MemorySigner, ...]) -> bytes:
    document = json.loads(payload_of(envelope)) | {"threshold": threshold, "roots": roots_entry(*roots)}
    return sign_envelope(json.dumps(document).encode(), FEDERATION_TYPE, by)


# --- making ---------------------------------------------------------------------------------------


def test_a_federation_begins_with_its_root_and_bases() -> None:
    federation = verify(FIRST)
    assert (federation.version, federation.previous, federation.threshold) == (1, None, 1)
    assert [(base.name, base.dir_hash) for base in federation.base_models] == [("tiny", "b" * 64)]
    assert federation.expires == NOW + 90 * DAY


def test_an_enrolment_makes_the_next_version() -> None:
    federation = verify(THIRD)
    assert federation.version == 3
    assert federation.previous == sha256_hex(payload_of(SECOND))
    assert [site.domain for site in federation.sites] == ["math"]
    assert [coordinator.id for coordinator in federation.coordinators] == ["hub"]


def test_documents_spell_fields_and_times_as_designed() -> None:
    document = json.loads(payload_of(THIRD))
    fields = (
        "schema federation name version previous issued expires threshold roots coordinators sites base_models policy"
    )
    assert set(document) == set(fields.split())
    assert document["issued"] == "2026-11-21T09:30:00Z"
    assert document["base_models"] == [{"name": "tiny", "dirHash": "b" * 64}]
    assert document["sites"][0]["keys"][0] == {
        "keyid": SITE.keyid,
        "public_key": SITE.public_pem.decode(),
        "not_before": "2026-11-20T00:00:00Z",
        "not_after": "2027-11-20T00:00:00Z",
        "revoked": None,
    }


@pytest.mark.parametrize(
    ("enrolment", "code"),
    [
        (request(SITE, "site-b"), "FEDERATION_INPUT"),
        (request(STRANGER, "site-a"), "FEDERATION_INPUT"),
        (request(ROOT, "site-c"), "FEDERATION_INPUT"),
        (request(STRANGER, "root-2", "root", None), "ENROLMENT_ROLE"),
        (FIRST, "ENVELOPE_TYPE"),
        (b"", "ENVELOPE_SHAPE"),
    ],
    ids=["key twice", "id twice", "root as site", "root", "another document", "nothing"],
)
def test_refuses_to_enrol(enrolment: bytes, code: str) -> None:
    assert code_of(lambda: enrol(THIRD, enrolment, ROOT, NOW)) == code


def test_only_a_root_enrols() -> None:
    assert code_of(lambda: enrol(FIRST, request(SITE, "site-a"), STRANGER, NOW)) == "FEDERATION_SIGNERS"
    forged = changed(FIRST, "name", "Other", by=(STRANGER,))
    assert code_of(lambda: enrol(forged, request(SITE, "site-a"), ROOT, NOW)) == "ENVELOPE_KEY"


def test_a_root_does_not_continue_a_file_in_which_a_stranger_calls_itself_a_root() -> None:
    forged = with_roots(FIRST, 1, STRANGER, ROOT, by=(STRANGER,))
    assert code_of(lambda: enrol(forged, request(SITE, "site-a"), ROOT, NOW)) == "FEDERATION_SIGNERS"


def test_one_root_alone_makes_no_version_for_two() -> None:
    shared = with_roots(FIRST, 2, ROOT, ROOT_2, by=(ROOT, ROOT_2))
    assert code_of(lambda: enrol(shared, request(SITE, "site-a"), ROOT, NOW)) == "FEDERATION_SIGNERS"
    document = json.loads(payload_of(shared))
    assert code_of(lambda: sign_federation(document, [ROOT, STRANGER])) == "FEDERATION_SIGNERS"
    assert verify(sign_federation(document, [ROOT, ROOT_2]), ROOT, ROOT_2).threshold == 2


# --- believing ------------------------------------------------------------------------------------


def test_believes_only_the_roots_that_a_person_named() -> None:
    assert verify(THIRD, ROOT).version == 3
    assert code_of(lambda: verify(THIRD, STRANGER)) == "TRUST_ROOT_UNKNOWN"
    assert code_of(lambda: verify(THIRD, ROOT, STRANGER)) == "TRUST_ROOT_UNKNOWN"
    assert code_of(lambda: verify_federation(THIRD, root_fingerprints=[], now=NOW)) == "TRUST_ROOT_UNKNOWN"


def test_a_threshold_counts_distinct_roots_that_signed() -> None:
    two_of_three = with_roots(FIRST, 2, ROOT, ROOT_2, ROOT_3, by=(ROOT, ROOT_2))
    assert verify(two_of_three, ROOT, ROOT_2).threshold == 2
    one_signed = with_roots(FIRST, 2, ROOT, ROOT_2, ROOT_3, by=(ROOT, STRANGER))
    assert code_of(lambda: verify(one_signed, ROOT)) == "FEDERATION_THRESHOLD"
    assert code_of(lambda: verify(two_of_three, ROOT)) == "TRUST_ROOT_UNKNOWN"
    assert code_of(lambda: verify(two_of_three, ROOT, ROOT)) == "TRUST_ROOT_UNKNOWN"
    assert code_of(lambda: verify(two_of_three, ROOT, ROOT_3)) == "TRUST_ROOT_UNKNOWN"


def test_one_dishonest_root_cannot_lower_the_threshold_for_a_newcomer() -> None:
    lowered = with_roots(FIRST, 1, ROOT, ROOT_2, ROOT_3, by=(ROOT,))
    assert code_of(lambda: verify(lowered, ROOT, ROOT_2)) == "TRUST_ROOT_UNKNOWN"


@pytest.mark.parametrize("threshold", [0, 3, -1, True, "1", 1.5])
def test_refuses_impossible_thresholds(threshold: Any) -> None:
    envelope = with_roots(FIRST, threshold, ROOT, ROOT_2, by=(ROOT, ROOT_2))
    assert code_of(lambda: verify(envelope, ROOT, ROOT_2)) == "FEDERATION_INVALID"


def test_refuses_an_expired_file() -> None:
    end = NOW + 91 * DAY
    assert verify(THIRD, now=end - timedelta(seconds=1)).version == 3
    assert code_of(lambda: verify(THIRD, now=end)) == "FEDERATION_EXPIRED"


KEY = ("sites", 0, "keys", 0)
INVALID: dict[str, tuple[Any, ...]] = {
    "other schema": ("schema", "fedcompose/federation/v2"),
    "extra field": ("sites", 0, "extra", 1),
    "version zero": ("version", 0),
    "version as text": ("version", "3"),
    "no previous": ("previous", None),
    "time without zone": ("issued", "2026-11-20T09:00:00"),
    "time with another zone": ("issued", "2026-11-20T09:00:00+01:00"),
    "time as number": ("issued", 1795000000),
    "time that does not exist": ("issued", "2026-02-30T09:00:00Z"),
    "time in other digits": ("issued", "２026-11-20T09:00:00Z"),
    "expires before issued": ("expires", "2026-11-20T08:00:00Z"),
    "key ends before it begins": (*KEY, "not_after", "2026-11-20T00:00:00Z"),
    "another key's fingerprint": (*KEY, "keyid", "0" * 64),
    "a coordinator's key": (
        "sites",
        0,
        "keys",
        [json.loads(payload_of(THIRD))["coordinators"][0]["keys"][0]],
    ),
    "status": ("sites", 0, "status", "trusted"),
    "right": ("sites", 0, "may", ["weights"]),
    "site id": ("sites", 0, "id", "../site-a"),
    "site id with a line end": ("sites", 0, "id", "site-a\n"),
    "federation id": ("federation", "urn:uuid:x"),
    "name with an escape": ("name", "\x1b]0;x"),
    "revocation": (*KEY, "revoked", {"at": "2026-11-20T09:00:00Z", "reason": "forgotten"}),
    "base digest": ("base_models", 0, "dirHash", "B" * 64),
    "base twice": ("base_models", [{"name": "tiny", "dirHash": "b" * 64}] * 2),
    "sites as object": ("sites", {}),
}


@pytest.mark.parametrize("path", INVALID.values(), ids=INVALID.keys())
def test_refuses_a_validly_signed_file_of_another_form(path: tuple[Any, ...]) -> None:
    assert code_of(lambda: verify(changed(THIRD, *path))) == "FEDERATION_INVALID"


def test_refuses_one_key_under_two_spellings() -> None:
    spelled = SITE.public_pem.decode().replace("\n", "\r\n")
    twin = {"keyid": keyid_of(spelled.encode()), "public_key": spelled, "not_before": "2026-11-20T00:00:00Z"}
    twin["not_after"] = "2027-11-20T00:00:00Z"
    assert code_of(lambda: verify(changed(THIRD, "sites", 0, "keys", 0, twin))) == "KEY_UNUSABLE"


def test_refuses_every_changed_byte_of_the_file() -> None:
    for position in range(0, len(FIRST), 3):
        other = FIRST[:position] + bytes([FIRST[position] ^ 1]) + FIRST[position + 1 :]
        code = code_of(lambda other=other: verify(other))  # type: ignore[misc]
        assert code.startswith("ENVELOPE_") or code in ("FEDERATION_INVALID", "JSON_INVALID", "KEY_UNUSABLE")


# --- looking up -----------------------------------------------------------------------------------


def test_finds_members_by_key() -> None:
    federation = verify(THIRD)
    assert federation.site_key(SITE.keyid, NOW)[0].id == "site-a"
    assert federation.coordinator_key(HUB.keyid, NOW + DAY)[0].id == "hub"
    assert federation.site("site-a").domain == "math"


def test_a_key_counts_in_its_role_only() -> None:
    federation = verify(THIRD)
    assert code_of(lambda: federation.site_key(HUB.keyid, NOW)) == "KEY_UNKNOWN"
    assert code_of(lambda: federation.coordinator_key(SITE.keyid, NOW)) == "KEY_UNKNOWN"
    assert code_of(lambda: federation.site_key(ROOT.keyid, NOW)) == "KEY_UNKNOWN"
    assert code_of(lambda: federation.site_key(STRANGER.keyid, NOW)) == "KEY_UNKNOWN"
    assert code_of(lambda: federation.site("site-b")) == "SITE_UNKNOWN"


def test_a_key_counts_in_its_time_only() -> None:
    federation = verify(THIRD)
    start = NOW.replace(hour=0, minute=0)
    assert federation.site_key(SITE.keyid, start)[0].id == "site-a"
    assert code_of(lambda: federation.site_key(SITE.keyid, start - timedelta(seconds=1))) == "KEY_EXPIRED"
    assert code_of(lambda: federation.site_key(SITE.keyid, start + 365 * DAY)) == "KEY_EXPIRED"
    assert code_of(lambda: federation.coordinator_key(HUB.keyid, NOW - DAY)) == "KEY_EXPIRED"


def test_a_revoked_key_counts_until_its_revocation() -> None:
    revocation = {"at": format_time(NOW + DAY), "reason": "compromised"}
    federation = verify(changed(THIRD, *KEY, "revoked", revocation))
    assert federation.site_key(SITE.keyid, NOW)[0].id == "site-a"
    assert code_of(lambda: federation.site_key(SITE.keyid, NOW + DAY)) == "KEY_REVOKED"


def test_a_suspended_site_is_not_heard() -> None:
    federation = verify(changed(THIRD, "sites", 0, "status", "suspended"))
    assert code_of(lambda: federation.site_key(SITE.keyid, NOW)) == "SITE_SUSPENDED"


# --- remembering ----------------------------------------------------------------------------------


def trust(envelope: bytes, *roots: MemorySigner, now: datetime = NOW + DAY) -> Federation:
    return trusted_federation(envelope, [root.keyid for root in roots] or None, now)


def test_the_first_trust_needs_a_fingerprint_and_later_ones_do_not() -> None:
    assert code_of(lambda: trust(SECOND)) == "TRUST_ROOT_UNKNOWN"
    assert pinned(URN) is None
    trust(SECOND, ROOT)
    assert trust(SECOND).version == 2
    assert trust(THIRD).version == 3


def test_a_wrong_fingerprint_is_refused_even_when_the_roots_are_known() -> None:
    trust(THIRD, ROOT)
    assert code_of(lambda: trust(THIRD, STRANGER)) == "TRUST_ROOT_UNKNOWN"


def test_versions_never_go_back() -> None:
    trust(THIRD, ROOT)
    assert code_of(lambda: trust(SECOND)) == "FEDERATION_ROLLBACK"
    assert code_of(lambda: trust(SECOND, ROOT)) == "FEDERATION_ROLLBACK"


def test_one_version_has_one_content() -> None:
    trust(SECOND, ROOT)
    assert code_of(lambda: trust(changed(SECOND, "name", "Other"))) == "FEDERATION_FORK"
    assert code_of(lambda: trust(changed(THIRD, "previous", "0" * 64))) == "FEDERATION_FORK"


def test_a_new_version_needs_the_old_roots() -> None:
    trust(SECOND, ROOT)
    foreign = with_roots(THIRD, 1, STRANGER, by=(STRANGER,))
    assert code_of(lambda: trust(foreign)) == "TRUST_ROOT_UNKNOWN"
    assert code_of(lambda: trust(foreign, STRANGER)) == "TRUST_ROOT_UNKNOWN"
    handed_over = with_roots(THIRD, 1, ROOT, STRANGER, by=(ROOT, STRANGER))
    assert trust(handed_over).version == 3


def test_a_refused_file_pins_nothing() -> None:
    trust(SECOND, ROOT)
    before = pinned(URN)
    assert code_of(lambda: trust(THIRD, now=NOW + 200 * DAY)) == "FEDERATION_EXPIRED"
    assert pinned(URN) == before


def test_two_federations_are_remembered_apart() -> None:
    other = create_federation("Other", STRANGER, "root", BASES, URN[:-1] + "1", NOW)
    trust(THIRD, ROOT)
    assert code_of(lambda: trust(other)) == "TRUST_ROOT_UNKNOWN"
    trust(other, STRANGER)
    assert trust(THIRD).id != trust(other).id


@pytest.mark.parametrize("content", [b"{}", b"", b"[1"])
def test_a_damaged_memory_is_not_taken_for_an_empty_one(private_home: Path, content: bytes) -> None:
    trust(THIRD, ROOT)
    (private_home / "trust-state.json").write_bytes(content)
    assert code_of(lambda: trust(THIRD, ROOT)) == "TRUST_STATE_INVALID"


def test_reading_without_trust_says_who_signed() -> None:
    federation, signed = read_federation(THIRD)
    assert (federation.version, signed) == (3, {ROOT.keyid})
    assert pinned(URN) is None


@pytest.mark.parametrize("text", ["2026-11-20T09:00:00Z", "1999-12-31T23:59:59Z"])
def test_times_survive_a_round_trip(text: str) -> None:
    assert format_time(parse_time(text)) == text


# --- commands -------------------------------------------------------------------------------------


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A root's folder with a fresh federation and a site that wants to join."""
    monkeypatch.chdir(tmp_path)
    new_key(Path("keys"), "root", "root", None, None)
    new_key(Path("keys"), "site-a", "site", "math", None)
    run(
        "federation",
        "init",
        "--name",
        "Demo [1]",
        "--root-key",
        "keys/root.key",
        "--base",
        f"tiny={'b' * 64}",
    )
    yield tmp_path


def test_the_commands_begin_enrol_and_show(folder: Path) -> None:
    said = run("federation", "enroll", "keys/site-a.enroll.json", "--root-key", "keys/root.key")
    assert "version 2" in said
    shown = run("federation", "show")
    for text in ("Demo [1]", load_signer(Path("keys/root.key")).keyid, "site-a", "math", "b" * 64, "expires"):
        assert text in shown
    assert "signed by roots that this machine knows" in shown
    assert json.loads(run("federation", "show", "--json"))["version"] == 2


def test_show_warns_where_nothing_is_known(folder: Path, private_home: Path) -> None:
    (private_home / "trust-state.json").unlink()
    assert "compare the root fingerprints" in run("federation", "show")


def test_init_does_not_overwrite(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "federation.json").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        main(["federation", "init", "--name", "X", "--root-key", "keys/root.key", "--base", f"tiny={'b' * 64}"])
    assert stopped.value.code == 2
    assert (folder / "federation.json").read_bytes() == before


def test_enrolling_into_an_old_copy_leaves_it_as_it_was(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "federation.json"
    old = file.read_bytes()
    run("federation", "enroll", "keys/site-a.enroll.json", "--root-key", "keys/root.key")
    new_key(Path("keys"), "site-b", "site", "code", None)
    file.write_bytes(old)
    with pytest.raises(SystemExit) as stopped:
        main(["federation", "enroll", "keys/site-b.enroll.json", "--root-key", "keys/root.key"])
    assert stopped.value.code == 1
    assert "FEDERATION_FORK" in capsys.readouterr().err
    assert file.read_bytes() == old


def test_a_base_may_be_a_folder(folder: Path) -> None:
    base = folder / "own-base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "llama"}')
    save_file({"weight": np.zeros(2, dtype=np.float32)}, base / "model.safetensors")
    arguments = ["--name", "X", "--root-key", "keys/root.key", "--base", str(base), "--out", "second.json"]
    listed = json.loads(run("federation", "init", *arguments, "--json"))["base_models"]
    assert [(entry["name"], len(entry["dirHash"])) for entry in listed] == [("own-base", 64)]
