"""The revocation list as a document: what it says, and that it only ever says more."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedcompose.federation_file import read_federation
from fedcompose.revocations import (
    REVOCATIONS_TYPE,
    Revocations,
    RevokedKey,
    WithdrawnRelease,
    next_revocations,
    no_revocations,
    verify_revocations,
)
from fedcompose.signing import sign_envelope
from tests.federation_files import DAY, HUB, NOW, ROOT, SITE, THIRD, URN, code_of, payload_of

FEDERATION = read_federation(THIRD)[0]
ENTRY = RevokedKey(keyid=SITE.keyid, at=NOW, reason="rotated")
RELEASE = WithdrawnRelease(dirHash="d" * 64, at=NOW)
LIST = next_revocations(no_revocations(URN), [ENTRY], [RELEASE], ROOT, NOW)


def verified(envelope: bytes = LIST) -> Revocations:
    return verify_revocations(envelope, FEDERATION)


def test_a_list_says_which_keys_and_releases_are_not_believed() -> None:
    listed = verified()
    listed.check_key(SITE.keyid, NOW - DAY)
    assert code_of(lambda: listed.check_key(SITE.keyid, NOW)) == "KEY_REVOKED"
    listed.check_key(HUB.keyid, NOW)
    assert code_of(lambda: listed.check_release("d" * 64)) == "RELEASE_WITHDRAWN"
    listed.check_release("e" * 64)


def test_documents_spell_fields_and_times_as_designed() -> None:
    assert json.loads(payload_of(LIST)) == {
        "schema": "fedcompose/revocations/v1",
        "federation": URN,
        "number": 1,
        "issued": "2026-11-20T09:30:00Z",
        "keys": [{"keyid": SITE.keyid, "at": "2026-11-20T09:30:00Z", "reason": "rotated"}],
        "releases": [{"dirHash": "d" * 64, "at": "2026-11-20T09:30:00Z"}],
    }


def test_the_next_list_holds_all_of_the_one_before_and_says_more() -> None:
    worse = RevokedKey(keyid=SITE.keyid, at=NOW - DAY, reason="compromised")
    second = verified(next_revocations(verified(), [worse], [], ROOT, NOW + DAY))
    assert (second.number, second.keys, second.releases) == (2, (worse,), (RELEASE,))


def test_a_list_that_says_nothing_more_is_not_made() -> None:
    milder = RevokedKey(keyid=SITE.keyid, at=NOW + DAY, reason="rotated")
    for keys, releases in (([], []), ([ENTRY], [RELEASE]), ([milder], [])):
        assert code_of(lambda k=keys, r=releases: next_revocations(verified(), k, r, ROOT, NOW)) == (  # type: ignore[misc]
            "REVOCATIONS_INPUT"
        )


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"schema": "fedcompose/revocations/v2"}, "REVOCATIONS_INVALID"),
        ({"extra": 1}, "REVOCATIONS_INVALID"),
        ({"number": -1}, "REVOCATIONS_INVALID"),
        ({"number": "1"}, "REVOCATIONS_INVALID"),
        ({"keys": [{"keyid": SITE.keyid, "at": "2026-11-20T09:30:00Z", "reason": "lost"}]}, "REVOCATIONS_INVALID"),
        ({"keys": json.loads(payload_of(LIST))["keys"] * 2}, "REVOCATIONS_INVALID"),
        ({"releases": [{"dirHash": "D" * 64, "at": "2026-11-20T09:30:00Z"}]}, "REVOCATIONS_INVALID"),
        ({"federation": URN[:-1] + "1"}, "FEDERATION_MISMATCH"),
    ],
)
def test_refuses_a_validly_signed_list_of_another_form(changes: dict[str, Any], code: str) -> None:
    document = json.loads(payload_of(LIST)) | changes
    envelope = sign_envelope(json.dumps(document).encode(), REVOCATIONS_TYPE, [ROOT])
    assert code_of(lambda: verified(envelope)) == code


def test_a_list_is_no_federation_file_and_the_other_way_round() -> None:
    assert code_of(lambda: verified(THIRD)) == "ENVELOPE_TYPE"
    assert code_of(lambda: read_federation(LIST)) == "ENVELOPE_TYPE"


def test_refuses_every_changed_byte_of_the_list() -> None:
    for position in range(0, len(LIST), 5):
        other = LIST[:position] + bytes([LIST[position] ^ 1]) + LIST[position + 1 :]
        code = code_of(lambda envelope=other: verified(envelope))  # type: ignore[misc]
        assert code.startswith("ENVELOPE_") or code == "REVOCATIONS_INVALID"
