"""The evidence pack of a release, `evidence.json`: what a data protection officer asks, answered from signed facts.

Everything is taken from the verified release, the store, the receipts and the ledger; where nothing is known, it says
so. What a site claims about itself is its own signed word and is called that. Times are those of the documents, so the
same folder gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcompose import ledger
from fedcompose.contribution import VerifiedContribution
from fedcompose.delivery import Receipt
from fedcompose.document import format_time
from fedcompose.errors import FedcomposeError
from fedcompose.federation import Federation
from fedcompose.files import read_json
from fedcompose.gates import GATES_FILE
from fedcompose.release import VerifiedRelease
from fedcompose_coordinator.approvals import Rule
from fedcompose_coordinator.decisions import LEDGER_FILE, held_heads
from fedcompose_coordinator.receipts import receipts

SCHEMA = "fedcompose/evidence/v1"
STATEMENT = (
    "No raw records are transmitted. Adapters are functions of private data and may leak membership or content. What "
    "was measured of that, and what is guaranteed, is listed per site below; where nothing is listed, nothing was."
)
REDERIVED = {"A", "B"}  # classes of traces whose problems intake makes again
LIMITS = (
    "A signature shows who says something, not that it is so: training, audit and differential privacy are claims.",
    "A pass of an audit means that its strongest attack found nothing above chance, on a twin of the adapter.",
    "Differential privacy covers the stated unit and steps only; what is listed as not counted is not in epsilon.",
    "The trace firewall finds copied words and known patterns; it is no privacy guarantee.",
    "Screening finds odd experts among few; it does not find every backdoor.",
    "Nothing here shows how well a site's machine is guarded, or what left it by other ways than this program.",
)
REMOVAL = (
    (
        "mask",
        "takes the site's expert and its row of the router out at once; what was trained beside it stays",
        "fedcompose coordinator remove --site SITE --level mask",
    ),
    (
        "recompose",
        "makes the composition again as if the site had never been there",
        "fedcompose coordinator remove --site SITE --level recompose",
    ),
    (
        "withdraw the release",
        "machines that know of it refuse to load the release",
        "fedcompose federation withdraw",
    ),
    ("none", "copies that were handed on cannot be recalled, and masking is not unlearning", ""),
)


def build_evidence(
    home: Path, release: VerifiedRelease, admitted: Sequence[VerifiedContribution], federation: Federation, rule: Rule
) -> dict[str, Any]:
    """Everything that the folder of a coordinator shows about one release.

    Raises: RefusedError: `LEDGER_BROKEN`, `LEDGER_TRUNCATED`, `LEDGER_FORKED`, and as `read_receipt`.
    """
    entries = ledger.verify(home / LEDGER_FILE, held_heads(home))
    signed = receipts(home, federation)
    sites = [_site(expert, admitted, signed) for expert in release.experts]
    claims = release.provenance
    return {
        "schema": SCHEMA,
        "statement": STATEMENT,
        "release": {
            "dirHash": release.dir_hash,
            "coordinator": claims.coordinator,
            "keyid": release.keyid,
            "made": format_time(claims.finished),
            "method": claims.method,
            "masked": list(release.composition.get("masked", ())),
            "base": {"name": claims.base.name, "dirHash": claims.base.dir_hash},
            "federation": {"id": release.federation.id, "version": release.federation.version},
        },
        "sites": sites,
        "egress": _totals(sites),
        "ledger": {"entries": len(entries), "head": entries[-1].sha256 if entries else ledger.EMPTY.head},
        "screening": _screening(home),
        "guards": _guards(home, sites, rule),
        "removal": [dict(zip(("remedy", "does", "command"), each, strict=True)) for each in REMOVAL],
        "limits": list(LIMITS),
    }


def _site(
    expert: VerifiedContribution, admitted: Sequence[VerifiedContribution], signed: Sequence[Receipt]
) -> dict[str, Any]:
    """The privacy card of one expert."""
    claims, traces = expert.provenance, _traces_of(expert.site, admitted)
    return {
        "site": expert.site,
        "domain": expert.domain,
        "adapter": {"dirHash": expert.dir_hash, "keyid": expert.keyid, "sequence": claims.sequence},
        "received": format_time(expert.received_on),
        "call": claims.call.id if claims.call else None,
        "differential_privacy": _dumped(claims.dp),
        "audit": _dumped(claims.audit),
        "own_limits": _dumped(claims.limits),
        "terms": _dumped(claims.use),
        "numbers": dict(claims.metrics),
        "gates": GATES_FILE in expert.digests,
        "traces": None if traces is None else {"dirHash": traces.dir_hash, **(_dumped(traces.provenance.traces) or {})},
        "bytes": sum(path.stat().st_size for each in (expert, traces) if each for path in each.path.iterdir()),
        "receipts": [
            {"call": each.call, "offer": each.offer, "bytes": each.bytes, "site_ledger": each.ledger.model_dump()}
            for each in signed
            if each.site == expert.site
        ],
    }


def _dumped(record: Any) -> dict[str, Any] | None:
    return None if record is None else dict(record.model_dump(mode="json", exclude_none=True))


def _traces_of(site: str, admitted: Sequence[VerifiedContribution]) -> VerifiedContribution | None:
    return next((each for each in admitted if each.site == site and each.kind == "traces"), None)


def _totals(sites: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """What the coordinator holds of the sites of this release, and for how much of it sites have a receipt."""
    return {
        "sites": len(sites),
        "bytes_held": sum(site["bytes"] for site in sites),
        "bytes_receipted": sum(receipt["bytes"] for site in sites for receipt in site["receipts"]),
    }


def _screening(home: Path) -> dict[str, Any] | None:
    try:
        found = read_json(home / "screening.json")
        return {name: found[name] for name in ("checks", "findings", "experts")}
    except (FedcomposeError, KeyError, TypeError):
        return None


def _guards(home: Path, sites: Sequence[Mapping[str, Any]], rule: Rule) -> list[dict[str, Any]]:
    """What was enforced for this release, what was not, and what cannot be seen from here (`None`)."""
    screening, own = _screening(home), {site["site"]: site["adapter"]["dirHash"] for site in sites}
    classes = {each for site in sites if site["traces"] for each in site["traces"]["classes"]}
    facts: tuple[tuple[str, bool | None], ...] = (
        ("every file is the one that its site signed", True),
        ("adapters hold only the listed tensors, finite and bounded", True),
        ("traces answer problems of public generators, made again at intake", classes <= REDERIVED),
        ("the site's own limits on audit and epsilon were checked", True),
        ("the site's terms of use were checked when this was composed and released", True),
        ("every site trained with differential privacy", all(site["differential_privacy"] for site in sites)),
        ("every site audited what its training memorises", all(site["audit"] for site in sites)),
        ("every site states terms of use", all(site["terms"] for site in sites)),
        ("every site has a signed receipt for what was fetched", all(site["receipts"] for site in sites)),
        ("experts were screened for poison", screening is not None and own.items() <= screening["experts"].items()),
        ("named people approve what is admitted, besides the checks", rule.needed > 0),
        ("the site's owner looked at what was to leave before it left", None),
        ("the site's trainer had no network", None),
    )  # fmt: skip
    return [{"guard": guard, "enforced": enforced} for guard, enforced in facts]
