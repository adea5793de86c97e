"""Receipts without a server: what is signed adds up, and nothing else is believed."""

from __future__ import annotations

import json
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fedcompose.errors import RefusedError
from fedcompose.files import dump_json
from fedcompose.receipt import (
    RECEIPT_TYPE,
    check_answer,
    check_release,
    make_receipt,
    server_key,
    sign_receipt,
    verify_receipt,
)
from fedcompose.release import VerifiedRelease
from fedcompose.signing import Signer, sign_envelope

NOW = datetime(2026, 11, 20, 9, 0, 0, 5, UTC)


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    return server_key(tmp_path / "server")


def signed(release: VerifiedRelease, signer: Signer, **counts: int) -> bytes:
    named = {name.replace("_", "-"): count for name, count in counts.items()}
    return sign_receipt(make_receipt(release, "chatcmpl-1", "auto", "Hello", named, NOW), signer)


def altered(envelope: bytes, signer: Signer, **changes: Any) -> bytes:
    """A receipt that says something else, signed by the right key."""
    receipt = verify_receipt(envelope, [signer.public_pem]).model_dump(mode="json", by_alias=True)
    return sign_envelope(dump_json({**receipt, **changes}), RECEIPT_TYPE, [signer])


def test_what_was_signed_is_read_back(release: VerifiedRelease, signer: Signer) -> None:
    receipt = verify_receipt(signed(release, signer, site_a=3, site_b=4, base=2, merged=1), [signer.public_pem])

    assert [(each.site, each.tokens) for each in receipt.experts] == [("site-a", 3), ("site-b", 4)]
    assert [each.dir_hash for each in receipt.experts] == [each.dir_hash for each in release.experts]
    assert (receipt.base_tokens, receipt.merged_tokens, receipt.tokens) == (2, 1, 10)
    assert receipt.written == NOW.replace(microsecond=0)
    check_answer(receipt, "Hello")
    check_release(receipt, release)


def test_a_writer_who_is_not_in_the_release_is_never_signed_for(release: VerifiedRelease) -> None:
    with pytest.raises(ValueError, match="not in the release"):
        make_receipt(release, "chatcmpl-1", "auto", "Hello", {"site-z": 1}, NOW)


@pytest.mark.parametrize(
    "changes", [{"tokens": 8}, {"baseTokens": -1}, {"more": 1}, {"schema": "fedcompose/receipt/v2"}, {"experts": []}]
)
def test_a_signed_receipt_that_does_not_add_up_is_refused(
    release: VerifiedRelease, signer: Signer, changes: dict[str, Any]
) -> None:
    with pytest.raises(RefusedError) as caught:
        verify_receipt(altered(signed(release, signer, site_a=3, site_b=4), signer, **changes), [signer.public_pem])
    assert caught.value.code == "RECEIPT_INVALID"


def test_every_byte_counts(release: VerifiedRelease, signer: Signer) -> None:
    envelope = signed(release, signer, site_a=3)
    for place in range(0, len(envelope), 7):
        changed = bytearray(envelope)
        changed[place] ^= 1
        if json.loads(envelope) != _parsed(bytes(changed)):
            with pytest.raises(RefusedError):
                verify_receipt(bytes(changed), [signer.public_pem])


def test_another_key_answer_or_release_is_noticed(release: VerifiedRelease, signer: Signer, tmp_path: Path) -> None:
    envelope = signed(release, signer, site_a=3)
    with pytest.raises(RefusedError) as caught:
        verify_receipt(envelope, [server_key(tmp_path / "other").public_pem])
    assert caught.value.code == "ENVELOPE_KEY"
    with pytest.raises(RefusedError) as caught:
        check_answer(verify_receipt(envelope, [signer.public_pem]), "hello")
    assert caught.value.code == "RECEIPT_OTHER_ANSWER"
    for changes in ({"release": "0" * 64}, {"experts": []}):
        receipt = verify_receipt(envelope, [signer.public_pem]).model_copy(update=changes)
        with pytest.raises(RefusedError) as caught:
            check_release(receipt, release)
        assert caught.value.code == "RECEIPT_OTHER_RELEASE"


def test_the_servers_key_is_made_once_and_nobody_else_reads_it(tmp_path: Path) -> None:
    first, second = server_key(tmp_path), server_key(tmp_path)
    assert first.keyid == second.keyid
    assert stat.S_IMODE((tmp_path / "server.key").stat().st_mode) == 0o600
    assert (tmp_path / "server.pub").read_bytes() == first.public_pem


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None
