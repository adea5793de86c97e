"""What a machine believes: first trust, new versions, and every way back that is barred."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedcompose.amendments import change_roots, replace_key
from fedcompose.drafts import amend, create_federation, enrol, sign_draft
from fedcompose.federation import Federation
from fedcompose.federation_file import open_federation
from fedcompose.keys import read_enrolment
from fedcompose.revocations import RevokedKey, WithdrawnRelease, next_revocations, no_revocations, parse_revocations
from fedcompose.trust_state import (
    accept_federation,
    accept_revocations,
    accepted_federation,
    accepted_file,
    accepted_revocations,
    pinned,
    remembered_federation,
    trusted_federation,
)
from tests.federation_files import (
    BASES,
    DAY,
    HUB,
    NOW,
    ROOT,
    ROOT_2,
    ROOT_3,
    SECOND,
    SITE,
    STRANGER,
    THIRD,
    URN,
    MemorySigner,
    changed,
    code_of,
    following,
    payload_of,
    request,
    roots_entry,
    shared,
    signer,
    with_roots,
)

KEPT = f"{URN.removeprefix('urn:uuid:')}.json"


def trust(envelope: bytes, *roots: MemorySigner, now: datetime = NOW + DAY) -> Federation:
    return trusted_federation(envelope, [root.keyid for root in roots] or None, now)


# --- the first time, and afterwards ---------------------------------------------------------------


def test_the_first_trust_needs_a_fingerprint_and_later_ones_do_not() -> None:
    assert code_of(lambda: trust(SECOND)) == "TRUST_ROOT_UNKNOWN"
    assert pinned(URN) is None
    trust(SECOND, ROOT)
    assert trust(SECOND).version == 2
    assert trust(THIRD).version == 3


def test_a_wrong_fingerprint_is_refused_even_when_the_roots_are_known() -> None:
    trust(THIRD, ROOT)
    assert code_of(lambda: trust(THIRD, STRANGER)) == "TRUST_ROOT_UNKNOWN"


def test_a_draft_is_believed_by_nobody() -> None:
    draft = shared(2, ROOT, ROOT_2)
    assert code_of(lambda: trust(draft, ROOT)) == "FEDERATION_THRESHOLD"
    first = sign_draft(draft, None, ROOT_2, NOW)
    trust(first, ROOT, ROOT_2)
    assert code_of(lambda: trust(enrol(first, request(SITE, "site-a"), ROOT, NOW))) == "FEDERATION_THRESHOLD"


def test_what_is_accepted_is_kept_and_read_again() -> None:
    assert accepted_federation(URN) is None
    trust(THIRD, ROOT)
    found = accepted_file(URN)
    assert found is not None
    assert found[0] == THIRD
    assert accepted_federation(URN) == trust(THIRD)


def test_two_federations_are_remembered_apart() -> None:
    other = create_federation("Other", STRANGER, "root", BASES, URN[:-1] + "1", NOW)
    trust(THIRD, ROOT)
    assert code_of(lambda: trust(other)) == "TRUST_ROOT_UNKNOWN"
    trust(other, STRANGER)
    assert trust(THIRD).id != trust(other).id


# --- no way back ----------------------------------------------------------------------------------


def test_versions_never_go_back() -> None:
    trust(THIRD, ROOT)
    assert code_of(lambda: trust(SECOND)) == "FEDERATION_ROLLBACK"
    assert code_of(lambda: trust(SECOND, ROOT)) == "FEDERATION_ROLLBACK"


def test_one_version_has_one_content() -> None:
    trust(SECOND, ROOT)
    assert code_of(lambda: trust(changed(SECOND, "name", "Other"))) == "FEDERATION_FORK"
    assert code_of(lambda: trust(changed(THIRD, "previous", "0" * 64))) == "FEDERATION_FORK"


def test_an_old_file_that_is_shown_again_and_again_stops_counting() -> None:
    trust(THIRD, ROOT)
    assert code_of(lambda: trust(THIRD, now=NOW + 91 * DAY)) == "FEDERATION_EXPIRED"
    renewed = amend(THIRD, lambda document: None, ROOT, NOW + 91 * DAY)
    assert trust(renewed, now=NOW + 91 * DAY).version == 4


def test_setting_the_clock_back_does_not_bring_an_old_file_back() -> None:
    trust(THIRD, ROOT, now=NOW + 60 * DAY)
    assert code_of(lambda: trust(THIRD, now=NOW + 50 * DAY)) == "CLOCK_BEHIND"
    assert trust(THIRD, now=NOW + 60 * DAY - timedelta(hours=12))
    assert code_of(lambda: trust(THIRD, now=NOW + 58 * DAY)) == "CLOCK_BEHIND"  # nor in small steps


def test_a_clock_before_the_files_own_date_is_behind() -> None:
    assert code_of(lambda: trust(THIRD, ROOT, now=NOW - DAY)) == "CLOCK_BEHIND"
    assert trust(THIRD, ROOT, now=NOW + DAY - timedelta(hours=12))


def test_a_key_does_not_change_hands() -> None:
    trust(SECOND, ROOT)
    sites = json.loads(payload_of(SECOND))["sites"]
    assert trust(following(SECOND, (ROOT,), sites=sites)).version == 3
    sites[0]["id"] = "site-b"
    moved = following(following(SECOND, (ROOT,)), (ROOT,), sites=sites)
    assert code_of(lambda: trust(moved)) == "FEDERATION_KEY_MOVED"


def test_two_sites_do_not_swap_keys() -> None:
    other = signer(202)
    both = enrol(SECOND, request(other, "site-b"), ROOT, NOW)
    trust(both, ROOT)
    sites = json.loads(payload_of(both))["sites"]
    sites[0]["keys"], sites[1]["keys"] = sites[1]["keys"], sites[0]["keys"]
    assert code_of(lambda: trust(following(both, (ROOT,), sites=sites))) == "FEDERATION_KEY_MOVED"


def test_a_refused_file_pins_nothing() -> None:
    trust(SECOND, ROOT)
    before = pinned(URN)
    assert code_of(lambda: trust(THIRD, now=NOW + 200 * DAY)) == "FEDERATION_EXPIRED"
    assert pinned(URN) == before
    assert accepted_federation(URN) == trust(SECOND)


@pytest.mark.parametrize("content", [b"{}", b"", b"[1"])
def test_a_damaged_memory_is_not_taken_for_an_empty_one(private_home: Path, content: bytes) -> None:
    trust(THIRD, ROOT)
    (private_home / "trust-state.json").write_bytes(content)
    assert code_of(lambda: trust(THIRD, ROOT)) == "TRUST_STATE_INVALID"


@pytest.mark.parametrize("content", [SECOND, changed(THIRD, "name", "Other"), b"", None])
def test_the_kept_file_is_compared_with_the_pin_and_mended_by_accepting_again(
    private_home: Path, content: bytes | None
) -> None:
    trust(THIRD, ROOT)
    kept = private_home / "federations" / KEPT
    kept.unlink() if content is None else kept.write_bytes(content)
    assert code_of(lambda: accepted_federation(URN)) == "TRUST_STATE_INVALID"
    trust(THIRD)
    assert accepted_federation(URN)


# --- new roots ------------------------------------------------------------------------------------


def test_a_new_version_needs_the_old_roots() -> None:
    trust(SECOND, ROOT)
    foreign = with_roots(THIRD, 1, STRANGER, by=(STRANGER,))
    assert code_of(lambda: trust(foreign)) == "TRUST_ROOT_UNKNOWN"
    assert code_of(lambda: trust(foreign, STRANGER)) == "TRUST_ROOT_UNKNOWN"
    handed_over = with_roots(THIRD, 1, ROOT, STRANGER, by=(ROOT, STRANGER))
    assert trust(handed_over).version == 3


def test_a_new_version_needs_its_own_roots() -> None:
    trust(THIRD, ROOT)
    for_two = {"roots": roots_entry(ROOT_2, ROOT_3), "threshold": 2}
    assert code_of(lambda: trust(following(THIRD, (ROOT, ROOT_2), **for_two))) == "FEDERATION_THRESHOLD"
    assert trust(following(THIRD, (ROOT, ROOT_2, ROOT_3), **for_two)).version == 4


def test_as_many_old_roots_sign_as_had_to_until_then() -> None:
    first = sign_draft(shared(2, ROOT, ROOT_2, ROOT_3), None, ROOT_2, NOW)
    trust(first, ROOT, ROOT_2)
    alone = {"roots": roots_entry(ROOT), "threshold": 1}
    assert code_of(lambda: trust(following(first, (ROOT,), **alone))) == "TRUST_ROOT_UNKNOWN"
    assert code_of(lambda: trust(following(first, (ROOT, STRANGER), **alone))) == "TRUST_ROOT_UNKNOWN"
    assert trust(following(first, (ROOT, ROOT_3), **alone)).threshold == 1


def succession() -> tuple[bytes, bytes]:
    """Version 4, in which ROOT hands over to ROOT_2 alone, and version 5, which ROOT_2 makes."""
    eve = read_enrolment(request(ROOT_2, "eve", "root", None))
    draft = amend(THIRD, lambda document: change_roots(document, add=[eve], remove=["root"]), ROOT, NOW + DAY)
    fourth = sign_draft(draft, open_federation(THIRD), ROOT_2, NOW + DAY)
    return fourth, enrol(fourth, request(signer(202), "site-b"), ROOT_2, NOW + DAY)


def test_roots_that_left_sign_no_more() -> None:
    fourth, _ = succession()
    trust(THIRD, ROOT)
    assert trust(fourth).version == 4
    assert code_of(lambda: trust(following(fourth, (ROOT,)))) == "ENVELOPE_KEY"


def test_a_replaced_root_key_signs_no_more() -> None:
    new = signer(301)
    rotation = request(new, "root", "root", None, old=ROOT)
    draft = amend(THIRD, lambda document: replace_key(document, rotation, NOW), ROOT, NOW + DAY)
    trust(THIRD, ROOT)
    assert code_of(lambda: trust(draft)) == "FEDERATION_THRESHOLD"
    fourth = sign_draft(draft, open_federation(THIRD), new, NOW + DAY)
    assert trust(fourth).version == 4
    assert trust(following(fourth, (new,))).version == 5


def test_a_chain_of_versions_is_accepted_one_by_one() -> None:
    fourth, fifth = succession()
    trust(THIRD, ROOT)
    assert code_of(lambda: trust(fifth)) == "TRUST_ROOT_UNKNOWN"
    assert accept_federation([fourth, fifth], None, NOW + DAY).version == 5
    assert code_of(lambda: trust(fourth)) == "FEDERATION_ROLLBACK"


def test_only_the_last_of_a_chain_must_be_in_its_time_and_all_are_signed() -> None:
    fourth, fifth = succession()
    late = NOW + 100 * DAY
    renewed = amend(fifth, lambda document: None, ROOT_2, late)
    trust(THIRD, ROOT)
    assert code_of(lambda: accept_federation([fourth, fifth], None, late)) == "FEDERATION_EXPIRED"
    forged = following(THIRD, (ROOT_2,), roots=roots_entry(ROOT_2))
    assert code_of(lambda: accept_federation([forged, following(forged, (ROOT_2,))], None, NOW + DAY)) == (
        "TRUST_ROOT_UNKNOWN"
    )
    assert code_of(lambda: accept_federation([fourth, renewed, fifth], None, late)) == "FEDERATION_ROLLBACK"
    other = create_federation("Other", ROOT, "root", BASES, URN[:-1] + "1", NOW)
    assert code_of(lambda: accept_federation([fourth, other], None, NOW + DAY)) == "FEDERATION_MISMATCH"
    assert pinned(URN).version == 3  # type: ignore[union-attr]
    assert accept_federation([fourth, fifth, renewed], None, late).version == 6


def test_an_old_file_is_remembered_as_it_was_accepted_and_no_other() -> None:
    fourth, fifth = succession()
    trust(THIRD, ROOT)
    accept_federation([fourth, fifth], None, NOW + DAY)
    for envelope, version in ((THIRD, 3), (fourth, 4), (fifth, 5)):
        assert remembered_federation(envelope, NOW + DAY).version == version
    assert code_of(lambda: remembered_federation(changed(THIRD, "name", "Other"), NOW + DAY)) == "FEDERATION_FORK"
    assert code_of(lambda: remembered_federation(SECOND, NOW + DAY)) == "TRUST_ROOT_UNKNOWN"
    assert code_of(lambda: remembered_federation(THIRD, NOW + 100 * DAY)) == "FEDERATION_EXPIRED"
    assert pinned(URN).version == 5  # type: ignore[union-attr]


def test_a_version_that_was_never_accepted_is_believed_because_of_its_roots() -> None:
    assert code_of(lambda: remembered_federation(SECOND, NOW)) == "TRUST_ROOT_UNKNOWN"
    trust(THIRD, ROOT)
    assert remembered_federation(SECOND, NOW).version == 2
    assert remembered_federation(following(THIRD, (ROOT,)), NOW + DAY).version == 4
    assert pinned(URN).version == 3  # type: ignore[union-attr]


# --- revocation lists -----------------------------------------------------------------------------

SITE_ENTRY = RevokedKey(keyid=SITE.keyid, at=NOW + DAY, reason="compromised")
HUB_ENTRY = RevokedKey(keyid=HUB.keyid, at=NOW + DAY, reason="rotated")
RELEASE = WithdrawnRelease(dirHash="d" * 64, at=NOW)


def listing(*keys: RevokedKey, after: bytes | None = None, releases: Any = (), by: MemorySigner = ROOT) -> bytes:
    """The list after `after` (or the first) with these entries added."""
    older = parse_revocations(payload_of(after)) if after else no_revocations(URN)
    return next_revocations(older, keys, releases, by, NOW)


def test_a_list_is_applied_wherever_the_federation_is_believed() -> None:
    trust(THIRD, ROOT)
    accept_revocations(listing(SITE_ENTRY, releases=[RELEASE]))
    accepted = accepted_federation(URN)
    assert accepted is not None
    for federation in (trust(THIRD), accepted, remembered_federation(THIRD, NOW + DAY)):
        assert federation.site_key(SITE.keyid, NOW)
        assert code_of(lambda found=federation: found.site_key(SITE.keyid, NOW + DAY)) == "KEY_REVOKED"  # type: ignore[misc]
        assert federation.doubts(SITE.keyid)
    assert code_of(lambda: accepted_revocations(URN).check_release("d" * 64)) == "RELEASE_WITHDRAWN"
    accepted_revocations(URN).check_release("e" * 64)


def test_a_list_stays_in_force_when_the_next_version_does_not_repeat_it() -> None:
    trust(SECOND, ROOT)
    accept_revocations(listing(SITE_ENTRY))
    assert code_of(lambda: trust(THIRD).site_key(SITE.keyid, NOW + DAY)) == "KEY_REVOKED"


def test_without_a_list_nothing_is_withdrawn() -> None:
    trust(THIRD, ROOT)
    assert accepted_revocations(URN) == no_revocations(URN)
    assert trust(THIRD).site_key(SITE.keyid, NOW + DAY)


def test_one_root_is_enough_to_withdraw_and_nobody_else() -> None:
    first = sign_draft(shared(2, ROOT, ROOT_2, ROOT_3), None, ROOT_2, NOW)
    trust(first, ROOT, ROOT_2)
    for who in (STRANGER, SITE, HUB):
        assert code_of(lambda who=who: accept_revocations(listing(SITE_ENTRY, by=who))) == "ENVELOPE_KEY"  # type: ignore[misc]
    assert accept_revocations(listing(SITE_ENTRY, by=ROOT_3)).number == 1


def test_a_list_of_an_unknown_or_another_federation_is_refused() -> None:
    assert code_of(lambda: accept_revocations(listing(SITE_ENTRY))) == "TRUST_ROOT_UNKNOWN"
    other = create_federation("Other", STRANGER, "root", BASES, URN[:-1] + "1", NOW)
    trust(other, STRANGER)
    assert code_of(lambda: accept_revocations(listing(SITE_ENTRY, by=STRANGER))) == "TRUST_ROOT_UNKNOWN"
    trust(THIRD, ROOT)
    assert code_of(lambda: accept_revocations(listing(SITE_ENTRY, by=STRANGER))) == "ENVELOPE_KEY"


def test_an_older_list_is_a_replay() -> None:
    trust(THIRD, ROOT)
    first = listing(SITE_ENTRY)
    second = listing(HUB_ENTRY, after=first)
    accept_revocations(first)
    accept_revocations(second)
    assert code_of(lambda: accept_revocations(first)) == "REVOCATIONS_ROLLBACK"
    with_more = listing(SITE_ENTRY, HUB_ENTRY, releases=[RELEASE])
    assert code_of(lambda: accept_revocations(with_more)) == "REVOCATIONS_ROLLBACK"
    assert accept_revocations(second).number == 2
    assert {entry.keyid for entry in accepted_revocations(URN).keys} == {SITE.keyid, HUB.keyid}


def test_one_number_has_one_list() -> None:
    trust(THIRD, ROOT)
    accept_revocations(listing(SITE_ENTRY))
    assert code_of(lambda: accept_revocations(listing(HUB_ENTRY))) == "REVOCATIONS_FORK"


def test_one_root_gives_nothing_back() -> None:
    trust(THIRD, ROOT)
    first = listing(SITE_ENTRY, releases=[RELEASE])
    accept_revocations(first)
    milder = RevokedKey(keyid=SITE.keyid, at=NOW + 9 * DAY, reason="rotated")
    for taken_back in (
        listing(HUB_ENTRY, after=listing(releases=[RELEASE])),  # the key is gone
        listing(HUB_ENTRY, after=listing(SITE_ENTRY)),  # the release is gone
        listing(HUB_ENTRY, after=listing(milder, releases=[RELEASE])),  # the key counts for longer
    ):
        assert code_of(lambda envelope=taken_back: accept_revocations(envelope)) == "REVOCATIONS_ROLLBACK"  # type: ignore[misc]
    assert accept_revocations(listing(HUB_ENTRY, after=first)).number == 2


def test_a_lost_list_is_not_taken_for_none(private_home: Path) -> None:
    trust(THIRD, ROOT)
    envelope = listing(SITE_ENTRY)
    accept_revocations(envelope)
    kept = private_home / "revocations" / KEPT
    for content in (b"", listing(HUB_ENTRY)):
        kept.write_bytes(content)
        assert code_of(lambda: accepted_revocations(URN)) == "TRUST_STATE_INVALID"
        assert code_of(lambda: trust(THIRD)) == "TRUST_STATE_INVALID"
    kept.unlink()
    assert code_of(lambda: accepted_revocations(URN)) == "TRUST_STATE_INVALID"
    accept_revocations(envelope)
    assert accepted_revocations(URN).number == 1


def test_a_list_is_accepted_while_the_federation_file_is_out_of_date() -> None:
    """Withdrawing must not wait for a renewal: accepting looks at no clock."""
    trust(THIRD, ROOT)
    accept_revocations(listing(SITE_ENTRY))
    assert code_of(lambda: trust(THIRD, now=NOW + 400 * DAY)) == "FEDERATION_EXPIRED"
    assert accepted_federation(URN)
