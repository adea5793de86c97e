"""Turn the numbers of a run into `report.json` and the page people look at, `report.html`.

Input: `evaluation.json`, perhaps `comparison.json`, what each site told about its training, sizes and provenance.
Sites are not trusted here: whatever they said is reduced to numbers in their ranges and to short visible text before
it is kept.
The page is made from `report.json` alone, so that both always say the same. Parts that are missing are left
out.

    training    site -> {domain, rewards: [..], validation: [[step, accuracy], ..], kept: "rlvr" | "warmup",
                seconds, accuracy: {base, warmup, rlvr: {value, low, high, n}}}
    sizes       {sites: {site: {adapter, traces}}, release: {file: bytes}, base: bytes}, all in bytes
    provenance  {federation: {id, version, threshold, roots: [keyid]}, base: {name, dirHash, licence},
                release: {signer, keyid, dirHash, signed, licence},
                contributions: [{site, domain, kind, keyid, dirHash, signed, records, licence}]}
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcompose.document import format_time
from fedcompose.files import read_json, write_atomic, write_json
from fedcompose.intervals import Interval, mean_interval, unpaired_difference
from fedcompose_coordinator.headline import headline, plain
from fedcompose_coordinator.markup import visible
from fedcompose_coordinator.report_page import comparison_page, page
from fedcompose_coordinator.results import markdown

if TYPE_CHECKING:
    from fedcompose.contribution import VerifiedContribution
    from fedcompose.release import VerifiedRelease

SCHEMA = "fedcompose/report/v1"
MAX_TEXT = 120  # characters of any name or identifier shown; a SHA-256 or a URN is well below
MAX_POINTS = 2000  # steps of a curve that are kept
MAX_ROWS = 1000  # sites, files or contributions listed
STAGES = ("base", "warmup", "rlvr")


def write_report(
    evaluation: Mapping[str, Any],
    training: Mapping[str, Any],
    sizes: Mapping[str, Any],
    provenance: Mapping[str, Any],
    out: Path,
    comparison: Mapping[str, Any] | None = None,
    evidence: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `report.json` and `report.html` into `out`, return the report; equal input gives equal bytes."""
    report = build_report(evaluation, training, sizes, provenance, comparison, evidence)
    write_json(out / "report.json", report)
    write_atomic(out / "report.html", page(report).encode())
    return report


def write_comparison(comparison: Mapping[str, Any], out: Path) -> None:
    """Write `comparison.json`, `comparison.html` and `comparison.md` into `out`."""
    write_json(out / "comparison.json", comparison)
    write_atomic(out / "comparison.html", comparison_page(comparison).encode())
    write_atomic(out / "comparison.md", markdown(comparison).encode())


def build_report(
    evaluation: Mapping[str, Any],
    training: Mapping[str, Any],
    sizes: Mapping[str, Any],
    provenance: Mapping[str, Any],
    comparison: Mapping[str, Any] | None = None,
    evidence: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All numbers: the coordinator's own as they are, the sites' only as far as they make sense."""
    report = {
        **evaluation,
        "schema": SCHEMA,
        "comparison": comparison,
        **({"evidence": evidence} if evidence else {}),
        "training": {_text(site): _training(log) for site, log in _items(training)},
        "sizes": _sizes(sizes),
        "provenance": _provenance(provenance),
    }
    report["rlvr_gain"], report["rlvr_gain_mean"] = _rlvr_gain(report["training"])
    report["headline"] = [plain(report, sentence) for sentence in headline(report)]
    return report


def describe_release(
    release: VerifiedRelease, contributions: Sequence[VerifiedContribution], base_folder: Path | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`sizes` and `provenance` of a verified release and of everything that was admitted for it.

    Licences are not part of any signed claim, so they are not here; a caller that knows them adds them.
    """
    sites: dict[str, dict[str, int]] = {}
    for each in contributions:
        sites.setdefault(each.site, {})[each.kind] = sum(folder_sizes(each.path).values())
    federation = release.federation
    sizes = {
        "sites": sites,
        "release": folder_sizes(release.path),
        "base": sum(folder_sizes(base_folder).values()) if base_folder else None,
    }
    base = release.composition["base"]
    provenance = {
        "federation": {
            "id": federation.id,
            "version": federation.version,
            "threshold": federation.threshold,
            "roots": [root.keyid for root in federation.roots],
        },
        "base": {"name": base["name"], "dirHash": base["dirHash"]},
        "release": {
            "signer": release.provenance.coordinator,
            "keyid": release.keyid,
            "dirHash": release.dir_hash,
            "signed": format_time(release.provenance.finished),
        },
        "contributions": [
            {
                "site": each.site,
                "domain": each.domain,
                "kind": each.kind,
                "keyid": each.keyid,
                "dirHash": each.dir_hash,
                "signed": format_time(each.provenance.finished),
                "records": sum(each.provenance.traces.classes.values()) if each.provenance.traces else None,
            }
            for each in contributions
        ],
    }
    return sizes, provenance


def training_logs(results: Sequence[Path]) -> dict[str, Any]:
    """`training` from the `result.json` files that site owners chose to share."""
    logs = {}
    for path in results:
        result = dict(_items(read_json(path)))
        validation, seconds = (dict(_items(result.get(name))) for name in ("validation", "seconds"))
        logs[_text(result.get("site"))] = {
            **result,
            "validation": validation.get("rlvr"),
            "seconds": sum(_quantity(part) or 0.0 for part in seconds.values()),
        }
    return logs


def folder_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below `folder`, by relative name; empty when there is no such folder."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
    }


def _training(log: Any) -> dict[str, Any]:
    log = log if isinstance(log, Mapping) else {}
    accuracies = log.get("accuracy") if isinstance(log.get("accuracy"), Mapping) else {}
    rewards = [_share(reward) for reward in _list(log.get("rewards"), MAX_POINTS)]
    return {
        "domain": _text(log.get("domain")),
        "rewards": [reward for reward in rewards if reward is not None],
        "validation": _curve(log.get("validation")),
        "accuracy": {stage: _interval(accuracies.get(stage)) for stage in STAGES},
        "kept": log.get("kept") if log.get("kept") in ("rlvr", "warmup") else None,
        "seconds": _quantity(log.get("seconds")),
    }


def _curve(points: Any) -> list[list[float]]:
    pairs = (
        (_quantity(point[0]), _share(point[1]))
        for point in _list(points, MAX_POINTS)
        if isinstance(point, Sequence) and len(point) == 2
    )
    return [[step, share] for step, share in pairs if step is not None and share is not None]


def _rlvr_gain(training: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What RLVR added to the warm-up at each site; unpaired, as a site tells no more than its intervals."""
    gains: dict[str, Interval] = {}
    for site, log in training.items():
        warmup, rlvr = log["accuracy"]["warmup"], log["accuracy"]["rlvr"]
        if warmup and rlvr:
            gains[site] = unpaired_difference(Interval(**rlvr), Interval(**warmup))
    mean = mean_interval(list(gains.values())).as_dict() if gains else None
    return {site: gain.as_dict() for site, gain in gains.items()}, mean


def _sizes(sizes: Mapping[str, Any]) -> dict[str, Any]:
    sites = {
        _text(site): {kind: _count(parts.get(kind)) or 0 for kind in ("adapter", "traces")}
        for site, parts in _items(sizes.get("sites"))
        if isinstance(parts, Mapping)
    }
    release = {_text(name): _count(size) or 0 for name, size in _items(sizes.get("release"))}
    return {
        "sites": {site: {**parts, "total": sum(parts.values())} for site, parts in sites.items()},
        "release": release,
        "release_total": sum(release.values()),
        "base": _count(sizes.get("base")),
    }


def _provenance(provenance: Mapping[str, Any]) -> dict[str, Any]:
    federation = provenance.get("federation") or {}
    return {
        "federation": {
            "id": _text(federation.get("id")),
            "version": _count(federation.get("version")),
            "threshold": _count(federation.get("threshold")),
            "roots": [_text(keyid) for keyid in _list(federation.get("roots"), MAX_ROWS)],
        },
        "base": _texts(provenance.get("base"), ("name", "dirHash", "licence")),
        "release": _texts(provenance.get("release"), ("signer", "keyid", "dirHash", "signed", "licence")),
        "contributions": [
            {
                **_texts(row, ("site", "domain", "kind", "keyid", "dirHash", "signed", "licence")),
                "records": _count(row.get("records")) if isinstance(row, Mapping) else None,
            }
            for row in _list(provenance.get("contributions"), MAX_ROWS)
        ],
    }


def _texts(row: Any, names: Sequence[str]) -> dict[str, str]:
    row = row if isinstance(row, Mapping) else {}
    return {name: _text(row.get(name)) for name in names}


def _text(value: Any) -> str:
    """Short, visible text on one line; empty when it is no text at all."""
    return visible(value[:MAX_TEXT]).replace("\n", "\ufffd") if isinstance(value, str) else ""


def _quantity(value: Any) -> float | None:
    """A finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and value >= 0 else None


def _count(value: Any) -> int | None:
    found = _quantity(value)
    return int(found) if found is not None else None


def _share(value: Any) -> float | None:
    found = _quantity(value)
    return found if found is not None and found <= 1 else None


def _interval(value: Any) -> dict[str, Any] | None:
    """A claimed accuracy with its limits, or None when the four numbers do not belong together."""
    if not isinstance(value, Mapping):
        return None
    low, middle, high = (_share(value.get(name)) for name in ("low", "value", "high"))
    n = _count(value.get("n"))
    if low is None or middle is None or high is None or not n or not low <= middle <= high:
        return None
    return {"value": middle, "low": low, "high": high, "n": n}


def _list(value: Any, limit: int) -> list[Any]:
    return list(value[:limit]) if isinstance(value, list | tuple) else []


def _items(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items())[:MAX_ROWS] if isinstance(value, Mapping) else []
