"""The chain of trust of something verified, in words: who vouches for what, from the roots down; and what nobody shows.

Input is verified already; nothing here decides anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from fedcompose.contribution import VerifiedContribution
from fedcompose.document import format_time
from fedcompose.federation import Key
from fedcompose.federation_file import OpenedFile, open_federation
from fedcompose.release import FEDERATION_FILE, VerifiedRelease
from fedcompose.standing import newest_known
from fedcompose.trust_state import pinned

SHORT = 12  # characters of a digest on a terminal; `--json` has the facts with whole ones

ONLY_CLAIMS = (
    "that training happened as stated (a signature shows who says so, not that it is so)",
    "that what was trained is harmless or right (evaluate it)",
)


class Link(NamedTuple):
    """One thing that was checked, who or what it is, and what was found."""

    check: str
    who: str
    details: str


@dataclass(frozen=True)
class Chain:
    """Links from the roots down; warnings; what is judged and as of when; what no signature shows."""

    title: str
    links: tuple[Link, ...]
    verdict: str
    not_shown: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "chain": [link._asdict() for link in self.links],
            **{key: value for key, value in asdict(self).items() if key not in ("links", "title")},
        }


def release_chain(release: VerifiedRelease, warnings: Sequence[str], judged: str) -> Chain:
    """A release: roots, federation file, coordinator, files, base, each expert, ledger."""
    known = newest_known(release).version
    made = format_time(release.provenance.finished)
    return Chain(
        title=f"Release {release.path}",
        links=tuple(_release_links(release)),
        verdict=f"Verified {f'as of {made}, when it was made' if judged == 'at composition' else 'as of now'}, "
        f"by version {release.federation.version if judged == 'at composition' else known} of the federation file. "
        f"dirHash {release.dir_hash}",
        not_shown=(
            *ONLY_CLAIMS,
            "when it was made, except by the coordinator's word",
            f"that it is the newest release, or what was withdrawn in later versions than {known} of the federation "
            "file (the newest known here)",
        ),
        warnings=tuple(warnings),
    )


def contribution_chain(found: VerifiedContribution) -> Chain:
    """A contribution, as a coordinator would judge it now."""
    return Chain(
        title=f"Contribution {found.path}",
        links=tuple(_contribution_links(found)),
        verdict=f"Verified as of now. dirHash {found.dir_hash}",
        not_shown=(*ONLY_CLAIMS, "that it is the site's newest (a coordinator remembers the sequence)"),
    )


def file_chain(opened: OpenedFile, path: Path) -> Chain:
    """A federation file that could be accepted now."""
    federation, pin = opened.federation, pinned(opened.federation.id)
    signers = [root.name for root in federation.roots if root.keyid in opened.signed]
    known = f"this machine has accepted version {pin.version}" if pin else "this machine has accepted none yet"
    members = (f"{len(federation.coordinators)} coordinators", f"{len(federation.sites)} sites")
    return Chain(
        title=f"Federation file {path}",
        links=(
            Link("roots", _roots(signers, len(federation.roots), federation.threshold), "signed this file"),
            Link(
                "federation file",
                f"{federation.name}, version {federation.version}",
                f"issued {format_time(federation.issued)}, counts until {format_time(federation.expires)}; {known}",
            ),
            Link("members", ", ".join(members), f"fedcompose federation show {path}"),
        ),
        verdict=f"Verified as of now. SHA-256 of what was signed: {opened.sha256}",
        not_shown=("that it is the newest version", "who the holders of the keys are (the roots asked them)"),
    )


def _release_links(release: VerifiedRelease) -> Iterator[Link]:
    federation, claims = release.federation, release.provenance
    opened = open_federation(release.read(FEDERATION_FILE))
    signers = [root.name for root in federation.roots if root.keyid in opened.signed]
    yield Link("roots", _roots(signers, len(federation.roots), federation.threshold), "signed the federation file")
    yield Link(
        "federation file",
        f"{federation.name}, version {federation.version}",
        f"issued {format_time(federation.issued)}, counted when the release was made, {format_time(claims.finished)}",
    )
    _, key = federation.coordinator_key(release.keyid, claims.finished)
    yield Link("coordinator", claims.coordinator, f"signed the release with {_key(key, claims.finished)}")
    yield Link("files", f"{len(release.digests)} files", "each as the coordinator signed it, and no others")
    yield Link("base", claims.base.name, f"dirHash {claims.base.dir_hash[:SHORT]}, one of the federation's")
    for row, expert in enumerate(release.experts):
        _, key = federation.site_key(expert.keyid, expert.received_on)
        yield Link(
            f"expert {row}",
            f"{expert.site} · {expert.domain}",
            f"signed by the site with {_key(key, expert.received_on)}; received {format_time(expert.received_on)}; "
            f"sequence {expert.provenance.sequence}; same base; dirHash {expert.dir_hash[:SHORT]}",
        )
    for expert in release.experts:
        if expert.provenance.use is not None:
            yield Link("terms", expert.site, str(expert.provenance.use))
    yield Link("router", f"{len(release.experts)} experts", "one row each, in this order")
    for site in release.composition.get("masked", ()):
        yield Link("masked", site, "its expert was there in training and is not here; the rest stayed as it was")
    if claims.ledger is not None:
        yield Link(
            "ledger",
            f"{claims.ledger.entries} entries",
            f"head {claims.ledger.head[:SHORT]}, by the coordinator's word",
        )


def _contribution_links(found: VerifiedContribution) -> Iterator[Link]:
    claims = found.provenance
    yield Link(
        "site",
        f"{found.site} · {found.domain}",
        f"signed with key {found.keyid[:SHORT]}, which belongs to this active site and counts now",
    )
    yield Link("files", f"{len(found.digests)} files", "each as the site signed it, and no others")
    yield Link(
        "provenance",
        f"sequence {claims.sequence}",
        f"this federation, own site and domain, to be received before {format_time(claims.expires)}",
    )
    yield Link("base", claims.base.name, f"dirHash {claims.base.dir_hash[:SHORT]}, one of the federation's")
    if claims.use is not None:
        yield Link("terms", found.site, str(claims.use))
    if claims.lora is not None:
        targets = ", ".join(claims.lora.targets)
        yield Link(
            "adapter", f"LoRA of rank {claims.lora.r}", f"exactly the tensors that {targets} imply, finite and bounded"
        )
    if claims.traces is not None:
        counts = ", ".join(f"{count} of class {name}" for name, count in sorted(claims.traces.classes.items()))
        yield Link("traces", counts, "no chat markers or hidden characters")


def _roots(signers: Sequence[str], count: int, threshold: int) -> str:
    return f"{', '.join(signers)} ({len(signers)} of {count}, {threshold} needed)"


def _key(key: Key, at: datetime) -> str:
    """A key that counted when it was used, and whether it has been replaced since."""
    text = f"key {key.keyid[:SHORT]}, which counted then (from {_day(key.not_before)} to {_day(key.not_after)})"
    if key.revoked is not None and key.revoked.reason == "rotated" and at < key.revoked.at:
        text += f" and has a successor since {_day(key.revoked.at)}, which takes nothing away from it"
    return text


def _day(moment: datetime) -> str:
    return format_time(moment)[:10]
