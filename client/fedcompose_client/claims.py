"""What a finished run may say about privacy: its differential privacy, its audit, and the site's own limits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedcompose.adapter import WEIGHTS_FILE
from fedcompose.files import dir_hash, read_json, sha256_file
from fedcompose.provenance import AuditNumbers, AuditStatement, DpStatement, SiteLimits, Uncounted, check_limits
from fedcompose.traces import TRACES_FILE
from fedcompose_client.config import Privacy
from fedcompose_client.own_rows import SETTINGS_FILE


def privacy_claims(run: Path, privacy: Privacy) -> dict[str, Any]:
    """`dp`, `audit` and `limits` of the provenance of the run's adapter; the limits hold.

    With differential privacy no numbers of an audit leave, and that there was one is listed as uncounted.

    Raises: RefusedError: `AUDIT_BELOW_LIMIT`, `EPSILON_ABOVE_LIMIT`.
    """
    dp = dp_statement(run)
    audit = audit_statement(run, privacy.audit_numbers and dp is None)
    if dp is not None:
        dp = dp.model_copy(update={"uncounted": (*dp.uncounted, *_looked_too(run, audit))})
    asked = privacy.require_audit != "none" or privacy.max_epsilon is not None
    limits = SiteLimits(require_audit=privacy.require_audit, max_epsilon=privacy.max_epsilon) if asked else None
    check_limits(dp, audit, limits)
    return {"dp": dp, "audit": audit, "limits": limits}


def _looked_too(run: Path, audit: AuditStatement | None) -> Iterator[Uncounted]:
    """What has looked at the data besides training."""
    if audit is not None:
        yield "audit"
    if (run / TRACES_FILE).exists():
        yield "trace-selection"


def dp_statement(run: Path) -> DpStatement | None:
    path = run / "result.json"
    found = read_json(path).get("dp") if path.is_file() else None
    return DpStatement.model_validate_json(json.dumps(found)) if found else None


def audit_statement(run: Path, numbers: bool) -> AuditStatement | None:
    """How the audit of the adapter that is in `run` now ended; None if it has not been audited."""
    path = run / "audit" / "audit.json"
    result = read_json(path) if path.is_file() else None
    if result is None or result["made_from"] != run_digest(run):
        return None
    return AuditStatement(verdict=result["verdict"], target="twin", numbers=_numbers(result) if numbers else None)


def run_digest(run: Path) -> str:
    """Names the adapter of a run and what it was made from; an audit is of that and of nothing else."""
    return dir_hash({name: sha256_file(run / name) for name in (SETTINGS_FILE, f"expert/{WEIGHTS_FILE}")})


def _numbers(result: Mapping[str, Any]) -> AuditNumbers:
    attack, twin = result["attack"], result["twin"]
    found = twin["attacks"][attack]
    return AuditNumbers(
        canaries=result["canaries"],
        rewarded=round(twin["rewarded"], 2),
        auc=round(found["auc"]["value"], 3),
        auc_high=round(found["auc"]["high"], 3),
        tpr_high=round(found["tpr_0.01"]["high"], 3) if found["tpr_0.01"] else 1.0,
        power_auc=round(result["overfitted"]["attacks"][attack]["auc"]["value"], 3),
        epsilon_low=round(result["epsilon"]["low"], 2),
        epsilon_cap=round(result["epsilon"]["cap"], 2),
    )
