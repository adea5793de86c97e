"""What `fedcompose inspect` shows, and what `--json` of `verify` and `inspect` prints: the facts of a signed folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedcompose.adapter import WEIGHTS_FILE
from fedcompose.bases import ALIASES, describe_base, resolve_base
from fedcompose.composition import COMPOSITION_FILE, parse_composition
from fedcompose.console import out
from fedcompose.contribution import VerifiedContribution, kind_of
from fedcompose.document import format_time
from fedcompose.errors import FedcomposeError
from fedcompose.files import MAX_JSON_BYTES
from fedcompose.folder import list_files, read_file
from fedcompose.provenance import (
    PROVENANCE_FILE,
    BaseReference,
    Provenance,
    ReleaseProvenance,
)
from fedcompose.release import INGREDIENTS_FOLDER, VerifiedRelease
from fedcompose.statement import parse_provenance, parse_release_provenance

MAX_SHOWN = 64  # rows of a table of numbers that somebody else wrote
MAX_DOMAINS = 15


@dataclass(frozen=True)
class Facts:
    """Everything worth saying about one signed folder, as plain values; `verified` says whether to believe it."""

    verified: bool
    kind: str
    path: str
    signer: str
    keyid: str | None
    dir_hash: str | None
    federation: str
    federation_version: int
    base: Mapping[str, str]
    made: str
    size_bytes: int
    files: int
    licences: Mapping[str, str]
    versions: Mapping[str, str]
    numbers: Mapping[str, float]
    experts: tuple[Mapping[str, Any], ...]
    details: Mapping[str, Any]
    accuracy: Mapping[str, Mapping[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def contribution_facts(found: VerifiedContribution) -> Facts:
    return _contribution(found.path, found.provenance, found.keyid, found.dir_hash)


def release_facts(found: VerifiedRelease) -> Facts:
    experts = tuple(
        {
            "site": expert.site,
            "domain": expert.domain,
            "dir_hash": expert.dir_hash,
            "keyid": expert.keyid,
            "received_on": format_time(expert.received_on),
            "numbers": expert.provenance.metrics,
        }
        for expert in found.experts
    )
    accuracy = (found.evaluation or {}).get("accuracy")
    return _release(found.path, found.provenance, experts, found.composition, accuracy, found.keyid, found.dir_hash)


def unverified_facts(folder: Path) -> Facts:
    """What a folder says of itself. The strict parsers ran, so it can be printed; none of it need be true."""
    names = list_files(folder)
    provenance = read_file(folder, PROVENANCE_FILE, MAX_JSON_BYTES)
    if COMPOSITION_FILE not in names:
        kind_of(names)
        return _contribution(folder, parse_provenance(provenance), None, None)
    claims = parse_release_provenance(provenance)
    composition = parse_composition(read_file(folder, COMPOSITION_FILE, MAX_JSON_BYTES))
    domains = {expert.site: expert.domain for expert in composition.experts}
    experts = tuple(
        {
            "site": entry.site,
            "domain": domains.get(entry.site, "?"),
            "dir_hash": entry.dir_hash,
            "keyid": entry.keyid,
            "received_on": format_time(entry.received_on),
            "numbers": {},
        }
        for entry in claims.ingredients
    )
    return _release(folder, claims, experts, composition.model_dump(mode="json", by_alias=True), None, None, None)


def show(facts: Facts) -> None:
    """Print the facts for people."""
    out.print(f"{facts.kind.capitalize()} {facts.path}", markup=False)
    if not facts.verified:
        out.print("UNVERIFIED: nothing below was checked", style="bold red")
    tables: list[list[tuple[str, ...]]] = [list(_lines(facts))]
    if facts.experts:
        heading = "experts, in the order of the router's rows; the numbers are the sites' own"
        tables.append([(heading,), *_expert_rows(facts)])
    if facts.accuracy:
        tables.append([("accuracy, as the coordinator measured it",), *_accuracy_rows(facts.accuracy)])
    for rows in tables:
        for line in aligned(rows):
            out.print(line, markup=False)
    out.print()


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines whose columns line up; nothing is ever shortened, because half a digest proves nothing.

    A row of one cell is a heading.
    """
    table = [row for row in rows if len(row) > 1]
    widths = [max((len(row[index]) for row in table if index < len(row)), default=0) for index in range(16)]
    return [
        "  ".join(cell.ljust(widths[index]) if len(row) > 1 else cell for index, cell in enumerate(row)).rstrip()
        for row in rows
    ]


def _contribution(folder: Path, claims: Provenance, keyid: str | None, digest: str | None) -> Facts:
    details: dict[str, Any] = {
        "sequence": claims.sequence,
        "expires": format_time(claims.expires),
        "call": claims.call.id if claims.call else None,
    }
    if claims.lora is not None:
        details |= {"rank": claims.lora.r, "alpha": claims.lora.alpha, "targets": ", ".join(claims.lora.targets)}
    if claims.traces is not None:
        details |= {f"traces of class {name}": count for name, count in sorted(claims.traces.classes.items())}
        details |= {"declared non-private": claims.traces.declared_non_private}
    return Facts(
        kind=claims.kind,
        signer=f"site {claims.site} ({claims.domain})",
        experts=(),
        details=details,
        accuracy={},
        **_common(folder, claims, keyid, digest),
    )


def _release(
    folder: Path,
    claims: ReleaseProvenance,
    experts: tuple[Mapping[str, Any], ...],
    composition: Mapping[str, Any],
    accuracy: Any,
    keyid: str | None,
    digest: str | None,
) -> Facts:
    sizes = list_files(folder)
    weights = (sizes.get(f"{INGREDIENTS_FOLDER}/{expert['site']}/{WEIGHTS_FILE}", 0) for expert in experts)
    attention = composition["attention"]
    return Facts(
        kind="release",
        signer=f"coordinator {claims.coordinator}",
        experts=tuple({**expert, "size_bytes": size} for expert, size in zip(experts, weights, strict=True)),
        details={
            "method": claims.method,
            "targets": ", ".join(composition["targets"]),
            "attention LoRA": f"rank {attention['r']}" if attention else "none",
            "masked": ", ".join(composition.get("masked", ())) or "none",
        },
        accuracy=_accuracy(accuracy),
        **_common(folder, claims, keyid, digest),
    )


def _common(
    folder: Path, claims: Provenance | ReleaseProvenance, keyid: str | None, digest: str | None
) -> dict[str, Any]:
    sizes = list_files(folder)
    return {
        "verified": keyid is not None,
        "path": str(folder),
        "keyid": keyid,
        "dir_hash": digest,
        "federation": claims.federation,
        "federation_version": claims.federation_version,
        "base": {"name": claims.base.name, "dir_hash": claims.base.dir_hash},
        "made": format_time(claims.finished),
        "size_bytes": sum(sizes.values()),
        "files": len(sizes),
        "licences": {"base": _base_licence(claims.base)},
        "versions": claims.versions,
        "numbers": claims.metrics,
    }


def _base_licence(base: BaseReference) -> str:
    """The base's licence, where this machine knows it; a release carries no copy of the base."""
    pinned = ALIASES.get(base.name)
    if pinned is not None and pinned.dir_hash == base.dir_hash:
        return pinned.licence
    try:
        found = resolve_base(base.name)
        return describe_base(found).licence if found.digest == base.dir_hash else "unknown here"
    except FedcomposeError:
        return "unknown here"


def _accuracy(document: Any) -> dict[str, dict[str, Any]]:
    """accuracy[method][domain] = {value, low, high, n}: whatever of an evaluation has that form."""
    table: dict[str, dict[str, Any]] = {}
    for method, row in list(document.items())[:MAX_SHOWN] if isinstance(document, Mapping) else ():
        cells = row if isinstance(row, Mapping) else {}
        table[method] = {
            domain: cell
            for domain, cell in list(cells.items())[:MAX_DOMAINS]
            if isinstance(cell, Mapping) and isinstance(cell.get("value"), float | int) and 0 <= cell["value"] <= 1
        }
    return {method: row for method, row in table.items() if row}


def _lines(facts: Facts) -> Iterable[tuple[str, str]]:
    yield "signed by", facts.signer + (f", key {facts.keyid}" if facts.keyid else "")
    yield "made on", facts.made
    yield "federation", f"{facts.federation}, version {facts.federation_version}"
    yield "base", f"{facts.base['name']} (dirHash {facts.base['dir_hash']}), licence {facts.licences['base']}"
    yield "size", f"{_size(facts.size_bytes)} in {facts.files} files"
    for label, value in facts.details.items():
        if value is not None:
            yield label, str(value)
    yield "made with", ", ".join(f"{name} {number}" for name, number in facts.versions.items())
    if facts.numbers:
        yield "numbers", _numbers(facts.numbers)
    if facts.dir_hash:
        yield "dirHash", facts.dir_hash


def _expert_rows(facts: Facts) -> Iterable[tuple[str, ...]]:
    yield "site", "domain", "weights", "received", "key", "dirHash", "numbers"
    for expert in facts.experts:
        yield (
            expert["site"],
            expert["domain"],
            _size(expert["size_bytes"]),
            expert["received_on"][:10],
            expert["keyid"][:12],
            expert["dir_hash"][:12],
            _numbers(expert["numbers"]),
        )


def _accuracy_rows(accuracy: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, ...]]:
    domains = list(dict.fromkeys(domain for row in accuracy.values() for domain in row))[:MAX_DOMAINS]
    yield ("method", *map(_plain, domains))
    for method, row in accuracy.items():
        yield (_plain(method), *(_cell(row.get(domain)) for domain in domains))


def _cell(cell: Any) -> str:
    if cell is None:
        return ""
    low, high = cell.get("low"), cell.get("high")
    bounds = f" ({low:.2f}-{high:.2f})" if isinstance(low, float) and isinstance(high, float) else ""
    return f"{cell['value']:.3f}{bounds}"


def _numbers(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in numbers.items())


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


def _plain(text: str) -> str:
    """Text from a document, safe to print."""
    return text[:40] if text.isprintable() else ascii(text[:40])
