"""Whether a verified release may be used today: what was withdrawn, expired or changed since it was made.

`verify_release` judges trust as of the time the release was made. Here the newest federation file that this machine
knows is asked as well, and the sites' terms of use. Who is about to load a release asks `verify_for_use`.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime

from fedcompose.contribution import VerifiedContribution, check_base, check_claims, check_federation
from fedcompose.document import format_time
from fedcompose.errors import RefusedError
from fedcompose.federation import Federation
from fedcompose.provenance import check_use
from fedcompose.release import (
    ReceivedRelease,
    VerifiedRelease,
    check_coordinator,
    verify_release,
    with_known_revocations,
)
from fedcompose.trust_state import accepted_federation


def verify_for_use(
    received: ReceivedRelease,
    root_fingerprints: Collection[str] | None = None,
    now: datetime | None = None,
    without: Collection[str] = (),
) -> VerifiedRelease:
    """Check a release that is about to be loaded: in full, and by the newest federation file that is known here.

    That file may have expired: it is then the best that is known, and a model in use does not stop by the calendar.
    For `without` see `verify_release`.

    Raises: RefusedError: as `verify_release`, `judge_today` and `check_terms`.
    """
    now = now or datetime.now(UTC)
    release = verify_release(received, root_fingerprints, now, without)
    judge_today(release, newest_known(release), without)
    check_terms(release, now, without)
    return release


def withdrawn_experts(release: VerifiedRelease, now: datetime) -> dict[str, RefusedError]:
    """The sites of a release whose experts this machine would not use any more, each with the reason."""
    known = (with_known_revocations(release.federation), newest_known(release))
    withdrawn = {}
    for expert in release.experts:
        try:
            for federation in known:
                _check_site(expert, federation)
            check_use(expert.provenance.use, None, now)
        except RefusedError as refusal:
            withdrawn[expert.site] = refusal
    return withdrawn


def newest_known(release: VerifiedRelease) -> Federation:
    """The federation file that this machine accepted last or, if that is older or there is none, the release's own."""
    accepted = accepted_federation(release.federation.id)
    return accepted if accepted and accepted.version >= release.federation.version else release.federation


def judge_today(release: VerifiedRelease, today: Federation, without: Collection[str] = ()) -> None:
    """Whether the release would still be believed by `today`, the same or a later version of its federation's file.

    Coordinator, sites and base must still belong. Their keys must have counted when they were used, not now: a key that
    expired or was rotated since leaves what it signed good. The time of a release is its coordinator's word alone, so a
    coordinator's compromised key makes all its releases worthless; a site's key was seen by the coordinator in time.
    Of the sites in `without` nothing is asked.

    Raises: RefusedError: `KEY_UNKNOWN`, `KEY_EXPIRED`, `KEY_REVOKED`, `COORDINATOR_MISMATCH`, `SITE_SUSPENDED`, and as
        `contribution.check_claims`.
    """
    claims = release.provenance
    check_federation(claims.federation, claims.federation_version, today)
    coordinator, key = today.coordinator_key(release.keyid, claims.finished)
    check_coordinator(coordinator.id, claims)
    if key.revoked is not None and key.revoked.reason == "compromised":
        raise RefusedError(
            "KEY_REVOKED",
            "the release is signed with a key that is reported compromised, and only its signer says when",
            expected=f"a key of coordinator {coordinator.id} that nobody else may hold",
            got=f"key {release.keyid}, compromised since {format_time(key.revoked.at)}",
            fix="ask the coordinator to release again, with its new key",
        )
    check_base(claims.base, today)
    for expert in release.experts:
        if expert.site not in without:
            _check_site(expert, today)


def _check_site(expert: VerifiedContribution, today: Federation) -> None:
    site, _ = today.site_key(expert.keyid, expert.received_on)
    check_claims(expert.provenance, expert.kind, site, today, expert.received_on)


def check_terms(release: VerifiedRelease, now: datetime, without: Collection[str] = ()) -> None:
    """Every site, but those in `without`, still lets its expert be used.

    Raises: RefusedError: `USE_EXPIRED`.
    """
    for expert in release.experts:
        if expert.site not in without:
            check_use(expert.provenance.use, None, now)


def terms_of(release: VerifiedRelease) -> list[str]:
    """On which terms sites let their experts be used, a sentence for each that states some."""
    experts = [expert for expert in release.experts if expert.provenance.use]
    return [f"site {expert.site}: {expert.provenance.use}" for expert in experts]


def ends_of_terms(release: VerifiedRelease) -> list[datetime]:
    """When the time is over for which sites let their experts be used, of those that say so."""
    return [expert.provenance.use.expires for expert in release.experts if expert.provenance.use]


def cautions(release: VerifiedRelease, now: datetime) -> list[str]:
    """What somebody who is about to rely on the release should know, in sentences, although nothing was refused."""
    keyids = dict.fromkeys([release.keyid, *(expert.keyid for expert in release.experts)])
    sentences = [doubt for keyid in keyids if (doubt := release.federation.doubts(keyid))]
    today = newest_known(release)
    known = f"version {today.version} of the federation file, the newest known here,"
    try:
        judge_today(release, today)
    except RefusedError as refusal:
        sentences.append(f"{known} would not admit it any more: {refusal.what} ({refusal.code})")
    if now >= today.expires:
        sentences.append(f"{known} expired on {format_time(today.expires)}: what was withdrawn since is not known here")
    return sentences
