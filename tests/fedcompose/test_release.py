from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import fedcompose
from fedcompose import release
from fedcompose.amendments import change_roots, revoke_keys, set_status
from fedcompose.cli import main
from fedcompose.contribution import CLOCK_SKEW
from fedcompose.document import format_time
from fedcompose.drafts import amend, sign_draft
from fedcompose.errors import RefusedError
from fedcompose.federation import Revocation
from fedcompose.files import folder_digests, sha256_hex, write_json
from fedcompose.keys import load_signer, new_key, read_enrolment
from fedcompose.release import ReceivedRelease, VerifiedRelease, verify_release
from fedcompose.revocations import RevokedKey, WithdrawnRelease, next_revocations, no_revocations
from fedcompose.signing import sign_files
from fedcompose.standing import cautions, judge_today, verify_for_use
from fedcompose.trust_state import accept_revocations, accepted_file, trusted_federation
from tests.federation_sim import FederationSim, make_federation

HOUR, DAY = timedelta(hours=1), timedelta(days=1)


@pytest.fixture(scope="module")
def made(tiny_base: Path, random_experts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> FederationSim:
    """A federation with a release, for tests that leave both as they are."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDCOMPOSE_HOME", str(folder / "home"))
        sim = make_federation(folder / "federation", tiny_base, random_experts)
        sim.released()
    return sim


def received(sim: FederationSim) -> ReceivedRelease:
    return ReceivedRelease(sim.coordinator_home / "release")


def verify(sim: FederationSim, path: Path, after: timedelta = timedelta(0)) -> VerifiedRelease:
    return verify_release(ReceivedRelease(path), [sim.root.keyid], sim.now + after)


def refusal_of(check: Callable[..., object], *arguments: Any) -> str | None:
    try:
        check(*arguments)
    except RefusedError as error:
        return error.code
    return None


def test_a_verified_release_says_who_made_it_from_what(sim: FederationSim) -> None:
    made = sim.released()
    found = verify(sim, made.path)
    assert found == made
    assert found.keyid == sim.coordinator.keyid
    assert [(expert.site, expert.domain) for expert in found.experts] == [("site-a", "clock"), ("site-b", "ordering")]
    assert found.composition["experts"][0]["dirHash"] == found.experts[0].dir_hash
    assert found.evaluation is None


def test_a_release_verifies_anywhere_and_years_later(made: FederationSim, tmp_path: Path) -> None:
    shutil.copytree(received(made).path, tmp_path / "copy")
    there = verify(made, tmp_path / "copy", timedelta(days=2000))
    assert there.dir_hash == verify(made, received(made).path).dir_hash


def test_claims_that_change_while_the_release_is_verified_are_refused(
    made: FederationSim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of the release decides which keys count, and it is read before the signature can be."""
    honest = release.read_file

    def exchanged(folder: Path, name: str, max_bytes: int) -> bytes:
        data = honest(folder, name, max_bytes)
        later = format_time(made.now + timedelta(seconds=1)).encode()
        return data.replace(format_time(made.now).encode(), later) if name == "provenance.json" else data

    assert refusal_of(verify, made, received(made).path) is None
    monkeypatch.setattr(release, "read_file", exchanged)  # what is compared with the signature is read elsewhere
    assert refusal_of(verify, made, received(made).path) == "FILE_CHANGED"


def test_a_release_from_later_than_now_is_refused(made: FederationSim) -> None:
    assert refusal_of(verify, made, received(made).path, -HOUR) == "RELEASE_FROM_FUTURE"
    assert refusal_of(verify, made, received(made).path, -CLOCK_SKEW) is None
    assert refusal_of(verify, made, received(made).path, -CLOCK_SKEW - timedelta(seconds=1)) == "RELEASE_FROM_FUTURE"


def test_a_release_is_judged_by_its_own_federation_and_coordinator(made: FederationSim) -> None:
    found, federation = verify(made, received(made).path), made.federation
    hub = federation.coordinators[0].model_copy(update={"id": "other"})
    others = {
        None: {},
        "FEDERATION_MISMATCH": {"id": "urn:uuid:00000000-0000-4000-8000-000000000009"},
        "FEDERATION_OLD": {"version": 1},
        "COORDINATOR_MISMATCH": {"coordinators": (hub,)},
    }
    for code, changed in others.items():
        assert refusal_of(judge_today, found, federation.model_copy(update=changed)) == code


def test_without_fingerprints_the_accepted_versions_decide(made: FederationSim) -> None:
    check = (verify_release, received(made), None, made.now)
    assert refusal_of(*check) == "TRUST_ROOT_UNKNOWN"
    trusted_federation(made.envelope, [made.root.keyid], made.now)
    assert refusal_of(*check) is None


def test_a_fingerprint_of_somebody_else_is_not_enough(made: FederationSim) -> None:
    assert refusal_of(verify_release, received(made), [made.coordinator.keyid], made.now) == "TRUST_ROOT_UNKNOWN"


def test_verifying_remembers_nothing(made: FederationSim, private_home: Path) -> None:
    verify(made, received(made).path)
    assert not list(private_home.iterdir())


def test_reading_later_notices_a_change(sim: FederationSim) -> None:
    made = sim.released()
    assert made.read("composition.json").startswith(b"{")
    (made.path / "composition.json").write_bytes(b"{}")
    with pytest.raises(RefusedError, match="not the file that was signed"):
        made.read("composition.json")


def test_experts_of_a_release_can_be_read_as_contributions(made: FederationSim) -> None:
    for expert in verify(made, received(made).path).experts:
        assert expert.path == received(made).path / "ingredients" / expert.site
        assert expert.read("adapter_config.json") == (expert.path / "adapter_config.json").read_bytes()


# --- what happened since --------------------------------------------------------------------------


def accept(sim: FederationSim, change: Callable[[dict[str, Any]], object]) -> None:
    """This machine accepts the release's version of the federation file, and a day later the next one."""
    trusted_federation(sim.envelope, [sim.root.keyid], sim.now)
    newer = amend(sim.envelope, lambda document: change(document) and None, sim.root, sim.now + DAY)
    trusted_federation(newer, None, sim.now + DAY)


def revoked(whose: str, reason: Any, after: timedelta) -> Callable[[FederationSim], None]:
    def happen(sim: FederationSim) -> None:
        keyid = sim.sites[whose].signer.keyid if whose in sim.sites else sim.coordinator.keyid
        revocation = Revocation(at=sim.now + after, reason=reason)
        accept(sim, lambda document: revoke_keys(document, [keyid], revocation))

    return happen


def listed(whose: str, reason: Any, after: timedelta) -> Callable[[FederationSim], None]:
    """The same by a revocation list."""

    def happen(sim: FederationSim) -> None:
        keyid = sim.sites[whose].signer.keyid if whose in sim.sites else sim.coordinator.keyid
        trusted_federation(sim.envelope, [sim.root.keyid], sim.now)
        entry = RevokedKey(keyid=keyid, at=sim.now + after, reason=reason)
        before = no_revocations(sim.federation.id)
        accept_revocations(next_revocations(before, [entry], [], sim.root, sim.now + DAY))

    return happen


def withdrawn(sim: FederationSim) -> None:
    trusted_federation(sim.envelope, [sim.root.keyid], sim.now)
    entry = WithdrawnRelease(dirHash=verify(sim, received(sim).path).dir_hash, at=sim.now + DAY)
    accept_revocations(next_revocations(no_revocations(sim.federation.id), [], [entry], sim.root, sim.now + DAY))


SINCE: dict[str, tuple[Callable[[FederationSim], None], str | None, str | None, str]] = {
    # what happened: how, refused when judged at composition, refused when about to be used, warned of
    "nothing": (lambda sim: accept(sim, lambda document: None), None, None, ""),
    "a site's key rotated": (revoked("site-a", "rotated", HOUR), None, None, ""),
    "a site's key rotated before": (revoked("site-a", "rotated", -HOUR), "KEY_REVOKED", "KEY_REVOKED", ""),
    "a site's key stolen": (revoked("site-a", "compromised", HOUR), None, None, "of site site-a is reported"),
    "a site's key stolen before": (revoked("site-a", "compromised", -HOUR), "KEY_REVOKED", "KEY_REVOKED", ""),
    "the hub's key rotated": (revoked("hub", "rotated", HOUR), None, None, ""),
    "the hub's key stolen": (revoked("hub", "compromised", HOUR), None, "KEY_REVOKED", "only its signer says when"),
    "the hub's key stolen before": (revoked("hub", "compromised", -HOUR), "KEY_REVOKED", "KEY_REVOKED", ""),
    "listed: a site's key rotated": (listed("site-a", "rotated", HOUR), None, None, ""),
    "listed: a site's key stolen": (listed("site-a", "compromised", HOUR), None, None, "of site site-a is reported"),
    "listed: a site's key stolen before": (
        listed("site-a", "compromised", -HOUR), "KEY_REVOKED", "KEY_REVOKED", ""
    ),
    "listed: the hub's key stolen": (
        listed("hub", "compromised", HOUR), None, "KEY_REVOKED", "only its signer says when"
    ),
    "the release withdrawn": (withdrawn, "RELEASE_WITHDRAWN", "RELEASE_WITHDRAWN", ""),
    "a site suspended": (
        lambda sim: accept(sim, lambda document: set_status(document, "site-b", "suspended")),
        None, "SITE_SUSPENDED", "(SITE_SUSPENDED)",
    ),
    "a site removed": (
        lambda sim: accept(sim, lambda document: document["sites"].pop()), None, "KEY_UNKNOWN", "(KEY_UNKNOWN)"
    ),
    "a site may send traces only": (
        lambda sim: accept(sim, lambda document: document["sites"][0].update(may=["traces"])),
        None, "NOT_PERMITTED", "(NOT_PERMITTED)",
    ),
    "another base": (
        lambda sim: accept(sim, lambda document: document["base_models"][0].update(dirHash="0" * 64)),
        None, "BASE_MISMATCH", "(BASE_MISMATCH)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SINCE)
def test_what_happened_since_is_judged_by_when_and_for_what(made: FederationSim, what: str) -> None:
    """`nothing` is the control: there both checks pass, without a warning."""
    happen, at_composition, in_use, warning = SINCE[what]
    then = made.now + 2 * DAY
    happen(made)
    assert refusal_of(verify_release, received(made), None, then) == at_composition
    assert refusal_of(verify_for_use, received(made), None, then) == in_use
    if at_composition is None:
        said = cautions(verify_release(received(made), None, then), then)
        assert bool(said) == bool(warning) and warning in " ".join(said)


def test_a_stolen_key_does_not_help_under_a_newer_file_than_the_accepted_one(
    made: FederationSim, tmp_path: Path
) -> None:
    folder = shutil.copytree(received(made).path, tmp_path / "release")
    newer = amend(made.envelope, lambda document: None, made.root, made.now)
    (folder / "federation.json").write_bytes(newer)
    statement = json.loads((folder / "provenance.json").read_bytes())
    subjects = {subject["name"]: subject["digest"] for subject in statement["subject"]}
    subjects["federation.json"]["sha256"] = sha256_hex(newer)
    write_json(folder / "provenance.json", statement)
    (folder / "model.sig").unlink()
    (folder / "model.sig").write_bytes(sign_files("release", folder_digests(folder), made.coordinator))
    trusted_federation(made.envelope, [made.root.keyid], made.now)
    assert refusal_of(verify_for_use, ReceivedRelease(folder), None, made.now) is None
    listed("hub", "compromised", HOUR)(made)
    assert refusal_of(verify_release, ReceivedRelease(folder), None, made.now) is None
    assert refusal_of(verify_for_use, ReceivedRelease(folder), None, made.now) == "KEY_REVOKED"


@pytest.mark.parametrize("command", ["serve", "chat", "load"])
def test_nobody_loads_a_withdrawn_release(
    made: FederationSim, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    withdrawn(made)
    monkeypatch.setattr("fedcompose.model.composed.load_base", lambda *_: pytest.fail("loaded"))
    if command == "load":
        assert refusal_of(fedcompose.load, received(made).path, None, made.base.path) == "RELEASE_WITHDRAWN"
        return
    with pytest.raises(SystemExit) as ended:
        main([command, str(received(made).path), "--base", str(made.base.path)])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("RELEASE_WITHDRAWN")


def test_an_expired_file_stops_no_model_in_use_but_is_mentioned(made: FederationSim) -> None:
    accept(made, lambda document: None)
    then = made.now + timedelta(days=200)
    release = verify_for_use(received(made), None, then)
    assert "what was withdrawn since is not known here" in " ".join(cautions(release, then))


def test_a_release_outlives_the_roots_that_were_there_when_it_was_made(made: FederationSim, tmp_path: Path) -> None:
    trusted_federation(made.envelope, [made.root.keyid], made.now)
    key = new_key(tmp_path / "keys", "ann", "root", None, None)
    ann, request = load_signer(key.private), read_enrolment(key.enrolment.read_bytes())
    draft = amend(
        made.envelope, lambda document: change_roots(document, add=[request], remove=["root"]), made.root, made.now
    )
    trusted_federation(sign_draft(draft, accepted_file(made.federation.id)[1], ann, made.now), None, made.now)  # type: ignore[index]
    assert refusal_of(verify_for_use, received(made), None, made.now) is None
