"""Making the next version of a federation file: what roots may change, and how a draft becomes a version."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from fedcompose.amendments import (
    OVERLAP,
    add_member,
    change_bases,
    change_roots,
    keys_of,
    leave,
    replace_key,
    revoke_keys,
    set_policy,
    set_status,
)
from fedcompose.document import format_time, parse_time
from fedcompose.drafts import Change, amend, differences, enrol, missing_signatures, sign_draft
from fedcompose.federation import BaseModelEntry, Coordinator, Federation, Policy, Revocation, Root, Site
from fedcompose.federation_file import OpenedFile, open_federation, read_federation, verify_federation
from fedcompose.keys import ENROLMENT_TYPE, read_enrolment
from fedcompose.signing import sign_envelope
from tests.federation_files import (
    DAY,
    FIRST,
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
    changed,
    code_of,
    digest_of,
    following,
    node_key,
    payload_of,
    request,
    roots_entry,
    shared,
    signer,
    with_roots,
)

NEW_SITE_KEY, SITE_B = signer(201), signer(202)
TWO_OF_THREE = sign_draft(shared(2, ROOT, ROOT_2, ROOT_3), None, ROOT_2, NOW)


def amended(change: Change, envelope: bytes = THIRD) -> Federation:
    """The next version after one change, as everybody would read it."""
    return read_federation(amend(envelope, change, ROOT, NOW + DAY))[0]


def opened(envelope: bytes, older: bytes | None = None) -> OpenedFile:
    return open_federation(envelope, open_federation(older).federation if older else None)


# --- the first version ----------------------------------------------------------------------------


def test_a_federation_begins_with_its_root_and_bases() -> None:
    federation = verify_federation(FIRST, root_fingerprints=[ROOT.keyid], now=NOW)
    assert (federation.version, federation.previous, federation.threshold) == (1, None, 1)
    assert [(base.name, base.dir_hash) for base in federation.base_models] == [("tiny", "b" * 64)]
    assert federation.expires == NOW + 90 * DAY


def test_several_roots_begin_a_federation_together() -> None:
    draft = shared(2, ROOT, ROOT_2, ROOT_3)
    assert code_of(lambda: read_federation(draft)) == "FEDERATION_THRESHOLD"
    assert missing_signatures(opened(draft), None) == ["1 more: root-2, root-3"]
    complete = sign_draft(draft, None, ROOT_3, NOW)
    assert missing_signatures(opened(complete), None) == []
    federation, signed = read_federation(complete)
    assert signed == {ROOT.keyid, ROOT_3.keyid}
    assert [root.name for root in federation.roots] == ["root", "root-2", "root-3"]


@pytest.mark.parametrize("threshold", [0, 4])
def test_an_impossible_threshold_is_refused(threshold: int) -> None:
    assert code_of(lambda: shared(threshold, ROOT, ROOT_2, ROOT_3)) == "FEDERATION_INPUT"


def test_one_root_cannot_be_two() -> None:
    assert code_of(lambda: shared(2, ROOT, ROOT)) == "FEDERATION_INPUT"


# --- enrolling ------------------------------------------------------------------------------------


def test_an_enrolment_makes_the_next_version() -> None:
    federation, _ = read_federation(THIRD)
    assert federation.version == 3
    assert federation.previous == digest_of(SECOND)
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
        (request(NEW_SITE_KEY, "site-a", old=SITE), "ENROLMENT_REPLACES"),
        (FIRST, "ENVELOPE_TYPE"),
        (b"", "ENVELOPE_SHAPE"),
    ],
    ids=["key twice", "id twice", "root as site", "root", "a rotation", "another document", "nothing"],
)
def test_refuses_to_enrol(enrolment: bytes, code: str) -> None:
    assert code_of(lambda: enrol(THIRD, enrolment, ROOT, NOW)) == code


def test_a_key_may_count_for_another_time_than_a_year() -> None:
    enrolment = read_enrolment(request(SITE_B, "site-b"))
    federation = amended(lambda document: add_member(document, enrolment, NOW, timedelta(days=30)))
    key = federation.site("site-b").keys[0]
    assert key.not_after - key.not_before == timedelta(days=30)


def test_who_lost_every_key_is_enrolled_again_with_a_new_one_in_the_same_domain() -> None:
    lost = Revocation(at=NOW, reason="compromised")
    revoked = amend(THIRD, lambda document: revoke_keys(document, [SITE.keyid], lost), ROOT, NOW)
    federation, _ = read_federation(enrol(revoked, request(NEW_SITE_KEY, "site-a"), ROOT, NOW + DAY))
    assert federation.site_key(NEW_SITE_KEY.keyid, NOW + DAY)[0].id == "site-a"
    assert code_of(lambda: federation.site_key(SITE.keyid, NOW + DAY)) == "KEY_REVOKED"
    other_domain = request(NEW_SITE_KEY, "site-a", domain="law")
    assert code_of(lambda: enrol(revoked, other_domain, ROOT, NOW)) == "FEDERATION_INPUT"


# --- who may change -------------------------------------------------------------------------------


def test_only_a_root_changes_anything() -> None:
    assert code_of(lambda: enrol(FIRST, request(SITE, "site-a"), STRANGER, NOW)) == "FEDERATION_SIGNERS"
    forged = changed(FIRST, "name", "Other", by=(STRANGER,))
    assert code_of(lambda: enrol(forged, request(SITE, "site-a"), ROOT, NOW)) == "ENVELOPE_KEY"


def test_a_root_does_not_continue_a_file_in_which_a_stranger_calls_itself_a_root() -> None:
    forged = with_roots(FIRST, 1, STRANGER, ROOT, by=(STRANGER,))
    assert code_of(lambda: enrol(forged, request(SITE, "site-a"), ROOT, NOW)) == "FEDERATION_SIGNERS"


def test_a_root_continues_a_file_that_others_signed_if_its_machine_accepted_it() -> None:
    assert code_of(lambda: amend(TWO_OF_THREE, leave, ROOT_3, NOW)) == "FEDERATION_SIGNERS"
    draft = amend(TWO_OF_THREE, leave, ROOT_3, NOW, accepted=digest_of(TWO_OF_THREE))
    assert opened(draft).signed == {ROOT_3.keyid}


def test_nobody_continues_a_draft_as_if_it_were_a_version() -> None:
    assert code_of(lambda: amend(shared(2, ROOT, ROOT_2), leave, ROOT, NOW)) == "FEDERATION_THRESHOLD"


def test_an_expired_file_can_be_renewed() -> None:
    late = NOW + 400 * DAY
    federation, _ = read_federation(amend(THIRD, leave, ROOT, late))
    assert (federation.version, federation.expires) == (4, late + 90 * DAY)
    assert differences(read_federation(THIRD)[0], federation)[0].what == "good until"


# --- handing a draft over -------------------------------------------------------------------------


def test_one_root_alone_makes_only_a_draft_for_two() -> None:
    draft = enrol(TWO_OF_THREE, request(SITE, "site-a"), ROOT, NOW)
    assert code_of(lambda: read_federation(draft)) == "FEDERATION_THRESHOLD"
    complete = sign_draft(draft, opened(TWO_OF_THREE), ROOT_3, NOW)
    assert read_federation(complete)[0].site("site-a")


def test_signing_twice_with_one_key_is_one_signature() -> None:
    draft = enrol(TWO_OF_THREE, request(SITE, "site-a"), ROOT, NOW)
    again = sign_draft(draft, opened(TWO_OF_THREE), ROOT, NOW)
    assert missing_signatures(opened(again, TWO_OF_THREE), opened(TWO_OF_THREE).federation)


def test_only_roots_sign_a_draft() -> None:
    draft = enrol(TWO_OF_THREE, request(SITE, "site-a"), ROOT, NOW)
    for stranger in (STRANGER, SITE):
        assert code_of(lambda who=stranger: sign_draft(draft, opened(TWO_OF_THREE), who, NOW)) == "FEDERATION_SIGNERS"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("draft", "code"),
    [
        (following(THIRD, (ROOT,), previous="0" * 64), "FEDERATION_FORK"),
        (changed(THIRD, "name", "Other"), "FEDERATION_FORK"),
        (SECOND, "FEDERATION_ROLLBACK"),
        (following(THIRD, (ROOT,), version=5), "FEDERATION_GAP"),
        (
            following(THIRD, (ROOT,), expires="2026-11-20T09:31:00Z", issued="2026-11-20T09:00:00Z"),
            "FEDERATION_EXPIRED",
        ),
        (following(THIRD, (STRANGER,)), "ENVELOPE_KEY"),
    ],
    ids=["other parent", "same version", "older", "a version left out", "expired", "signed by nobody known"],
)
def test_refuses_to_sign(draft: bytes, code: str) -> None:
    assert code_of(lambda: sign_draft(draft, opened(THIRD), ROOT, NOW + DAY)) == code


def test_without_the_version_before_nothing_but_a_beginning_is_signed() -> None:
    draft = enrol(TWO_OF_THREE, request(SITE, "site-a"), ROOT, NOW)
    assert code_of(lambda: sign_draft(draft, None, ROOT_2, NOW)) == "FEDERATION_GAP"


def test_a_change_is_added_to_the_draft_that_waits_and_earlier_signatures_end() -> None:
    begun = enrol(TWO_OF_THREE, request(SITE, "site-a"), ROOT, NOW)
    both = amend(TWO_OF_THREE, lambda document: set_policy(document, "c" * 64), ROOT, NOW, draft=begun)
    found = opened(both).federation
    assert (found.version, found.sites[0].id, found.policy and found.policy.sha256) == (2, "site-a", "c" * 64)
    signed_by_two = sign_draft(begun, opened(TWO_OF_THREE), ROOT_2, NOW)
    again = amend(TWO_OF_THREE, leave, ROOT, NOW, draft=signed_by_two)
    assert opened(again).signed == {ROOT.keyid}


def test_a_draft_by_somebody_else_is_not_built_upon() -> None:
    begun = enrol(TWO_OF_THREE, request(SITE, "site-a"), ROOT, NOW)
    accepted = digest_of(TWO_OF_THREE)
    assert code_of(lambda: amend(TWO_OF_THREE, leave, ROOT_2, NOW, accepted=accepted, draft=begun)) == "DRAFT_OTHER"
    elsewhere = following(TWO_OF_THREE, (ROOT,), previous="0" * 64)
    assert code_of(lambda: amend(TWO_OF_THREE, leave, ROOT, NOW, draft=elsewhere)) == "DRAFT_OTHER"


def test_a_draft_that_became_a_version_is_not_built_upon() -> None:
    begun = enrol(TWO_OF_THREE, request(SITE, "site-a"), ROOT, NOW)
    complete = sign_draft(begun, opened(TWO_OF_THREE), ROOT_2, NOW)
    assert opened(amend(complete, leave, ROOT, NOW, draft=begun)).federation.version == 3


# --- keys -----------------------------------------------------------------------------------------


def test_a_rotated_key_and_the_new_one_count_side_by_side_for_a_while() -> None:
    rotation = request(NEW_SITE_KEY, "site-a", old=SITE)
    now = NOW + DAY
    federation = amended(lambda document: replace_key(document, rotation, now))
    for key in (SITE, NEW_SITE_KEY):
        assert federation.site_key(key.keyid, now + OVERLAP - timedelta(seconds=1))[0].id == "site-a"
    assert federation.site_key(NEW_SITE_KEY.keyid, now + OVERLAP)
    assert code_of(lambda: federation.site_key(SITE.keyid, now + OVERLAP)) == "KEY_REVOKED"
    assert federation.doubts(SITE.keyid) is None


def half_signed(*signers: Any) -> bytes:
    """A rotation request of site-a that not both keys signed."""
    whole = request(NEW_SITE_KEY, "site-a", old=SITE)
    return sign_envelope(payload_of(whole), ENROLMENT_TYPE, signers)


@pytest.mark.parametrize(
    ("rotation", "code"),
    [
        (half_signed(NEW_SITE_KEY), "ENVELOPE_KEY"),
        (half_signed(SITE), "ENVELOPE_KEY"),
        (half_signed(NEW_SITE_KEY, STRANGER), "ENVELOPE_KEY"),
        (request(NEW_SITE_KEY, "site-a", old=HUB), "ENROLMENT_REPLACES"),
        (request(NEW_SITE_KEY, "site-b", old=SITE), "ENROLMENT_REPLACES"),
        (request(NEW_SITE_KEY, "hub", "coordinator", None, old=SITE), "ENROLMENT_REPLACES"),
        (request(NEW_SITE_KEY, "site-a", domain="law", old=SITE), "FEDERATION_INPUT"),
        (request(NEW_SITE_KEY, "site-a"), "ENROLMENT_REPLACES"),
        (request(HUB, "site-a", old=SITE), "FEDERATION_INPUT"),
    ],
    ids=[
        "old key did not sign",
        "new key did not sign",
        "a stranger in the place of the old key",
        "another member's key",
        "another site",
        "another role",
        "another domain",
        "not a rotation",
        "a key in use",
    ],
)
def test_refuses_to_rotate(rotation: bytes, code: str) -> None:
    assert code_of(lambda: amended(lambda document: replace_key(document, rotation, NOW))) == code


def test_a_key_that_no_longer_counts_hands_nothing_over() -> None:
    lost = Revocation(at=NOW, reason="compromised")
    revoked = amend(THIRD, lambda document: revoke_keys(document, [SITE.keyid], lost), ROOT, NOW)
    rotation = request(NEW_SITE_KEY, "site-a", old=SITE)
    assert code_of(lambda: amended(lambda document: replace_key(document, rotation, NOW), revoked)) == (
        "ENROLMENT_REPLACES"
    )


def test_a_revocation_is_never_weakened() -> None:
    def revoke(envelope: bytes, days: int, reason: Any) -> Any:
        entry = Revocation(at=NOW + days * DAY, reason=reason)
        found = amended(lambda document: revoke_keys(document, [SITE.keyid], entry), envelope)
        return found.site("site-a").keys[0].revoked

    first = Revocation(at=NOW, reason="compromised")
    revoked = amend(THIRD, lambda document: revoke_keys(document, [SITE.keyid], first), ROOT, NOW)
    for weaker in ((0, "rotated"), (1, "compromised"), (0, "compromised")):
        assert code_of(lambda it=weaker: revoke(revoked, *it)) == "FEDERATION_INPUT"  # type: ignore[misc]
    assert revoke(revoked, -1, "rotated") == Revocation(at=NOW - DAY, reason="compromised")


def test_keys_are_named_by_fingerprint_or_by_their_holder() -> None:
    federation, now = read_federation(THIRD)[0], Revocation(at=NOW, reason="compromised")
    assert keys_of(federation, "site-a", now) == keys_of(federation, SITE.keyid, now) == [SITE.keyid]
    for nothing in ("site-b", "0" * 64, "root", ROOT.keyid):
        assert code_of(lambda target=nothing: keys_of(federation, target, now)) == "FEDERATION_INPUT"  # type: ignore[misc]


def test_only_members_keys_are_revoked() -> None:
    entry = Revocation(at=NOW, reason="compromised")
    assert code_of(lambda: amended(lambda d: revoke_keys(d, [ROOT.keyid], entry))) == "FEDERATION_INPUT"


# --- everything else ------------------------------------------------------------------------------


def test_a_site_is_suspended_and_reinstated() -> None:
    suspended = amend(THIRD, lambda document: set_status(document, "site-a", "suspended"), ROOT, NOW)
    assert code_of(lambda: read_federation(suspended)[0].site_key(SITE.keyid, NOW)) == "SITE_SUSPENDED"
    back = amended(lambda document: set_status(document, "site-a", "active"), suspended)
    assert back.site_key(SITE.keyid, NOW)
    assert code_of(lambda: amended(lambda d: set_status(d, "site-b", "suspended"))) == "FEDERATION_INPUT"
    assert code_of(lambda: amended(lambda d: set_status(d, "site-a", "active"))) == "FEDERATION_INPUT"


def test_bases_come_and_go() -> None:
    federation = amended(lambda document: change_bases(document, add={"other": "c" * 64}, remove=["tiny"]))
    assert [(base.name, base.dir_hash) for base in federation.base_models] == [("other", "c" * 64)]
    assert code_of(lambda: amended(lambda d: change_bases(d, add={"tiny": "c" * 64}))) == "FEDERATION_INPUT"
    assert code_of(lambda: amended(lambda d: change_bases(d, add={}, remove=["no"]))) == "FEDERATION_INPUT"


def eve() -> Any:
    return read_enrolment(request(ROOT_2, "eve", "root", None))


def test_new_roots_need_the_old_roots_and_themselves() -> None:
    draft = amend(THIRD, lambda document: change_roots(document, add=[eve()], threshold=2), ROOT, NOW)
    assert missing_signatures(opened(draft, THIRD), opened(THIRD).federation) == ["1 more of the new roots: eve"]
    complete = sign_draft(draft, opened(THIRD), ROOT_2, NOW)
    assert not missing_signatures(opened(complete, THIRD), opened(THIRD).federation)


def test_a_root_hands_over_to_another_that_must_sign_as_well() -> None:
    draft = amend(THIRD, lambda d: change_roots(d, add=[eve()], remove=["root"]), ROOT, NOW)
    older = opened(THIRD).federation
    assert missing_signatures(opened(draft, THIRD), older) == ["1 more of the new roots: eve"]
    alone = following(THIRD, (ROOT_2,), roots=roots_entry(ROOT_2))
    assert missing_signatures(opened(alone, THIRD), older) == ["1 more of the roots until now: root"]
    assert not missing_signatures(opened(sign_draft(draft, opened(THIRD), ROOT_2, NOW), THIRD), older)


def test_a_roots_key_is_replaced_by_one_that_both_keys_ask_for() -> None:
    new = signer(301)
    rotation = request(new, "root", "root", None, old=ROOT)
    draft = amend(THIRD, lambda document: replace_key(document, rotation, NOW), ROOT, NOW)
    assert missing_signatures(opened(draft, THIRD), opened(THIRD).federation) == ["1 more of the new roots: root"]
    complete = sign_draft(draft, opened(THIRD), new, NOW)
    assert [root.keyid for root in read_federation(complete)[0].roots] == [new.keyid]
    stolen = request(new, "root", "root", None, old=STRANGER)
    assert code_of(lambda: amended(lambda d: replace_key(d, stolen, NOW))) == "ENROLMENT_REPLACES"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"remove": ["nobody"]}, "FEDERATION_INPUT"),
        ({"remove": ["root"]}, "FEDERATION_INPUT"),
        ({"threshold": 2}, "FEDERATION_INPUT"),
        ({"add": [read_enrolment(request(SITE_B, "x"))]}, "ENROLMENT_ROLE"),
    ],
    ids=["no such root", "the last root", "too few roots", "a site"],
)
def test_refuses_roots(changes: dict[str, Any], code: str) -> None:
    assert code_of(lambda: amended(lambda document: change_roots(document, **changes))) == code


def test_a_key_does_not_change_hands() -> None:
    def give_away(document: dict[str, Any]) -> None:
        document["sites"][0]["id"] = "site-b"

    assert code_of(lambda: amended(give_away)) == "FEDERATION_KEY_MOVED"


# --- reading what changes -------------------------------------------------------------------------


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every single value in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inside = [place for key, item in items for place in leaves(item, (*path, key))]
    yield from inside or [path]


FULL = json.loads(payload_of(THIRD)) | {"policy": {"sha256": "a" * 64}}
FULL["sites"][0]["node_key"] = node_key(1)
for member in (*FULL["sites"], *FULL["coordinators"]):
    member["keys"][0]["revoked"] = {"at": format_time(NOW), "reason": "rotated"}
# Version, date and link are the next version's own; a key's text has the fingerprint that is shown.
UNSAID = ("schema", "version", "previous", "issued", "public_key")
OTHER = {
    node_key(1): node_key(2),
    "active": "suspended",
    "rotated": "compromised",
    "adapter": "traces",
    "traces": "adapter",
    1: 2,
    URN: f"{URN}1",
}


def other(value: Any) -> Any:
    """Another value that could stand in the same place."""
    if value in OTHER:
        return OTHER[value]
    if re.fullmatch(r"[0-9a-f]{64}", value):
        return "9" * 64
    return value.replace(":00Z", ":07Z") if value.endswith(":00Z") else f"{value}x"


def facts_only(document: dict[str, Any]) -> Federation:
    """The document without the checks of whole files: most single changes would not survive them."""
    parts = {
        field: tuple(model.model_validate(entry) for entry in document[field])
        for field, model in (("roots", Root), ("coordinators", Coordinator), ("sites", Site))
    }
    return open_federation(THIRD).federation.model_copy(
        update={
            **parts,
            "base_models": tuple(BaseModelEntry.model_validate(entry) for entry in document["base_models"]),
            "policy": Policy.model_validate(document["policy"]),
            "expires": parse_time(document["expires"]),
            "id": document["federation"],
            "name": document["name"],
            "threshold": document["threshold"],
        }
    )


@pytest.mark.parametrize(
    "place",
    [place for place in leaves(FULL) if place[-1] not in UNSAID],
    ids=lambda place: ".".join(map(str, place)),
)
def test_no_change_hides_from_whoever_reads_the_differences(place: tuple[Any, ...]) -> None:
    """A root that signs what it read signs nothing else: each single value that changes is told."""
    document = item = copy.deepcopy(FULL)
    for step in place[:-1]:
        item = item[step]
    item[place[-1]] = other(item[place[-1]])
    assert differences(facts_only(FULL), facts_only(document))
    assert not differences(facts_only(FULL), facts_only(FULL))


def test_differences_are_new_gone_or_other() -> None:
    before = read_federation(THIRD)[0]
    after = amended(lambda document: change_bases(document, add={"other": "c" * 64}, remove=["tiny"]))
    marks = {(each.mark, each.what) for each in differences(before, after)}
    assert marks == {("-", "base tiny"), ("+", "base other")}
    assert {each.mark for each in differences(None, after)} == {"+"}


# --- node keys ------------------------------------------------------------------------------------


def test_a_site_is_enrolled_with_the_key_of_its_connection() -> None:
    version = enrol(FIRST, request(SITE, "site-a", node=node_key(1)), ROOT, NOW)
    assert read_federation(version)[0].site("site-a").node_key == node_key(1)


def test_a_rotation_replaces_the_key_of_the_connection_at_once() -> None:
    version = enrol(FIRST, request(SITE, "site-a", node=node_key(1)), ROOT, NOW)
    handed_over = request(STRANGER, "site-a", old=SITE, node=node_key(2))
    version = amend(version, lambda document: replace_key(document, handed_over, NOW), ROOT, NOW)
    assert read_federation(version)[0].site("site-a").node_key == node_key(2)


def test_no_other_site_gets_the_key_of_a_connection() -> None:
    version = enrol(FIRST, request(SITE, "site-a", node=node_key(1)), ROOT, NOW)
    assert code_of(lambda: enrol(version, request(STRANGER, "site-b", node=node_key(1)), ROOT, NOW)) == (
        "FEDERATION_INPUT"
    )
