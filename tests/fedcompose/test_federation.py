"""The federation file: whom it believes, and whom it admits."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import Any

import pytest

from fedcompose.document import format_time, parse_time
from fedcompose.federation import Federation
from fedcompose.federation_file import read_federation, verify_federation
from fedcompose.revocations import RevokedKey, no_revocations, with_revocations
from fedcompose.signing import keyid_of
from tests.federation_files import (
    DAY,
    FIRST,
    HUB,
    NOW,
    ROOT,
    ROOT_2,
    ROOT_3,
    SITE,
    STRANGER,
    THIRD,
    URN,
    changed,
    code_of,
    payload_of,
    with_roots,
)


def verify(envelope: bytes, *roots: Any, now: datetime = NOW + DAY) -> Federation:
    return verify_federation(envelope, root_fingerprints=[root.keyid for root in roots or (ROOT,)], now=now)


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


@pytest.mark.parametrize("reason", ["rotated", "compromised"])
def test_a_revoked_key_counts_until_its_revocation(reason: str) -> None:
    federation = verify(changed(THIRD, *KEY, "revoked", {"at": format_time(NOW + DAY), "reason": reason}))
    assert federation.site_key(SITE.keyid, NOW)[0].id == "site-a"
    assert code_of(lambda: federation.site_key(SITE.keyid, NOW + DAY)) == "KEY_REVOKED"


def test_older_signatures_of_a_compromised_key_are_doubted_and_of_a_rotated_key_not() -> None:
    for reason, doubted in (("compromised", True), ("rotated", False)):
        federation = verify(changed(THIRD, *KEY, "revoked", {"at": format_time(NOW + DAY), "reason": reason}))
        assert bool(federation.doubts(SITE.keyid)) is doubted
        assert federation.doubts(HUB.keyid) is None


def listed(*entries: RevokedKey) -> Any:
    return no_revocations(URN).model_copy(update={"keys": entries})


def test_a_revocation_list_applies_to_every_key_that_it_names() -> None:
    entries = [RevokedKey(keyid=each.keyid, at=NOW, reason="compromised") for each in (SITE, HUB, STRANGER)]
    federation = with_revocations(verify(THIRD), listed(*entries))
    assert code_of(lambda: federation.site_key(SITE.keyid, NOW)) == "KEY_REVOKED"
    assert code_of(lambda: federation.coordinator_key(HUB.keyid, NOW + DAY)) == "KEY_REVOKED"
    assert federation.doubts(SITE.keyid)
    assert verify(THIRD).site_key(SITE.keyid, NOW)


@pytest.mark.parametrize(
    ("of_file", "of_list", "together"),
    [
        ((2, "rotated"), (1, "rotated"), (1, "rotated")),
        ((1, "rotated"), (2, "compromised"), (1, "compromised")),
        ((1, "compromised"), (2, "rotated"), (1, "compromised")),
        ((2, "compromised"), (1, "compromised"), (1, "compromised")),
    ],
)
def test_file_and_list_together_withdraw_what_either_withdraws(
    of_file: tuple[int, str], of_list: tuple[int, Any], together: tuple[int, str]
) -> None:
    revoked = {"at": format_time(NOW + of_file[0] * DAY), "reason": of_file[1]}
    entry = RevokedKey(keyid=SITE.keyid, at=NOW + of_list[0] * DAY, reason=of_list[1])
    federation = with_revocations(verify(changed(THIRD, *KEY, "revoked", revoked)), listed(entry))
    found = federation.site("site-a").keys[0].revoked
    assert found is not None
    assert (found.at, found.reason) == (NOW + together[0] * DAY, together[1])


def test_a_suspended_site_is_not_heard() -> None:
    federation = verify(changed(THIRD, "sites", 0, "status", "suspended"))
    assert code_of(lambda: federation.site_key(SITE.keyid, NOW)) == "SITE_SUSPENDED"


def test_reading_without_trust_says_who_signed() -> None:
    federation, signed = read_federation(THIRD)
    assert (federation.version, signed) == (3, {ROOT.keyid})


@pytest.mark.parametrize("text", ["2026-11-20T09:00:00Z", "1999-12-31T23:59:59Z"])
def test_times_survive_a_round_trip(text: str) -> None:
    assert format_time(parse_time(text)) == text
