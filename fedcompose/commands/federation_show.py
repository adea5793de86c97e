"""How `fedcompose federation` shows a file, a draft, what changes in it, and a revocation list.

No line is longer than a narrow terminal but for a person's own long names: fingerprints stand on lines of their own,
whole, because people compare them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fedcompose.console import next_steps, out
from fedcompose.document import format_time
from fedcompose.drafts import Difference, differences
from fedcompose.federation import Federation, Key
from fedcompose.federation_file import OpenedFile
from fedcompose.files import sha256_file
from fedcompose.revocations import Revocations

WIDTH = 78
MAX_POLICY_BYTES = 64 << 20  # documents beside the federation file that are compared with the policy's digest


def print_federation(
    file: Path, federation: Federation, signed: frozenset[str], trust: str, withdrawn: Revocations, now: datetime
) -> None:
    """Everything that a version says."""
    expired = " (EXPIRED)" if now >= federation.expires else ""
    policy = _policy(file, federation)
    _print([
        federation.name,
        f"  id       {federation.id}",
        f"  version  {federation.version}, issued {format_time(federation.issued)}",
        f"  expires  {format_time(federation.expires)}{expired}",
        f"  trust    {trust}",
        *(f"  {line}" for line in policy),
    ])  # fmt: skip
    _print(["", f"Roots ({federation.threshold} of {len(federation.roots)} must sign)"])
    for root in federation.roots:
        _print([f"  {root.name}, {'signed' if root.keyid in signed else 'has not signed'}", f"    {root.keyid}"])
    _print(["", "Members", *_members(federation, now)])
    _print(["", "Base models"])
    for base in federation.base_models:
        _print([f"  {base.name}, dirHash", f"    {base.dir_hash}"])
    if withdrawn.number:
        _print(["", *revocation_lines(withdrawn)])


def print_differences(found: Sequence[Difference], heading: str) -> None:
    """What is new (+), gone (-) or different (~)."""
    _print(["", heading])
    for mark, what, value in found:
        line = f"  {mark} {what}: {value}"
        _print([line] if len(line) <= WIDTH else [f"  {mark} {what}", *_wrapped(value, "      ")])


def print_state(written: Path, federation: Federation, missing: Sequence[str]) -> None:
    """What has become of a version that a root just signed, and who signs next."""
    if missing:
        _print(
            [
                "",
                f"{written} is a DRAFT of version {federation.version}. It needs the signature of",
                *(f"  {line}" for line in missing),
            ]
        )
        next_steps(
            f"send {written} to them; each reads and signs it:",
            f"fedcompose federation sign {written} --root-key KEY",
        )
        return
    _print(
        [
            "",
            f"{written} is now version {federation.version}, good until {format_time(federation.expires)}.",
            f"Members: {', '.join(member_ids(federation)) or 'none yet'}",
        ]
    )


def proposal_as_dict(
    written: Path, opened: OpenedFile, older: Federation | None, missing: Sequence[str]
) -> dict[str, Any]:
    """The same for machines: the document itself, and beside it what is known of it."""
    found = differences(older, opened.federation)
    return as_dict(opened.federation) | {
        "file": str(written),
        "signed_by": sorted(opened.signed),
        "missing": list(missing),
        "changes": [each._asdict() for each in found],
    }


def as_dict(federation: Federation) -> dict[str, Any]:
    return federation.model_dump(mode="json", by_alias=True)


def member_ids(federation: Federation) -> list[str]:
    return [each.id for each in federation.coordinators] + [each.id for each in federation.sites]


def revocation_lines(listed: Revocations) -> Iterator[str]:
    """What a revocation list withdraws."""
    yield f"Withdrawn by revocation list {listed.number}, issued {format_time(listed.issued)}"
    for entry in listed.keys:
        yield f"  key, {entry.reason}, not believed from {format_time(entry.at)} on"
        yield f"    {entry.keyid}"
    for release in listed.releases:
        yield f"  release, withdrawn {format_time(release.at)}, dirHash"
        yield f"    {release.dir_hash}"


def _members(federation: Federation, now: datetime) -> Iterator[str]:
    for coordinator in federation.coordinators:
        yield f"  {coordinator.id}, coordinator"
        yield from _keys(coordinator.keys, now)
    for site in federation.sites:
        suspended = ", SUSPENDED" if site.status != "active" else ""
        may = " and ".join(site.may) or "nothing"
        yield f"  {site.id}, site, domain {site.domain}, may send {may}{suspended}"
        yield from _keys(site.keys, now)


def _keys(keys: Iterable[Key], now: datetime) -> Iterator[str]:
    for key in keys:
        yield f"    {key.keyid}"
        yield f"      {_state(key, now)}"


def _state(key: Key, now: datetime) -> str:
    time = f"{format_time(key.not_before)} to {format_time(key.not_after)}"
    if key.revoked is None:
        return f"{'counts' if key.not_before <= now < key.not_after else 'NOT IN ITS TIME'}, {time}"
    revoked = f"({key.revoked.reason}) from {format_time(key.revoked.at)}"
    return f"REVOKED {revoked}" if now >= key.revoked.at else f"counts until it is revoked {revoked}"


def _policy(file: Path, federation: Federation) -> list[str]:
    """The data-use policy, and whether its document lies beside the federation file."""
    if federation.policy is None:
        return ["policy   none"]
    beside = [path for path in file.absolute().parent.iterdir() if path.is_file() and not path.is_symlink()]
    small = [path for path in beside if path.stat().st_size <= MAX_POLICY_BYTES]
    same = [path.name for path in small if sha256_file(path) == federation.policy.sha256]
    where = f"is {same[0]!a}, here" if same else "its document is not in this folder"
    return [f"policy   {where}; sha256", f"    {federation.policy.sha256}"]


def _wrapped(value: str, indent: str) -> Iterator[str]:
    """Break after commas, so that no digest is ever broken."""
    line = indent
    for part in value.replace(", ", ",\0").split("\0"):
        if len(line) + len(part) >= WIDTH and line != indent:
            yield line
            line = indent
        line += part + (" " if part.endswith(",") else "")
    yield line


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        out.print(line.rstrip(), markup=False)
