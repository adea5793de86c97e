"""Step 5: rebuild a domain's frozen files in canonical form, state where they come from, and sign them.

Input: of `runs/<domain>/`, `expert/` (a PEFT folder) and its gates, `traces.jsonl` with the firewall's `review.json`,
`result.json`.
Output: `outbox/<domain>/adapter/` and `outbox/<domain>/traces/`, signed, and verified as a coordinator would.

Nothing is copied: weights and configuration are written anew from checked values, traces are decoded and
encoded again, and of the result only a fixed list of numbers is taken. So no path, no name of a machine or
user, no README of PEFT's and no training argument leaves this way. Nothing is sent; that is another step.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedcompose.adapter import WEIGHTS_FILE, read_adapter, write_adapter
from fedcompose.bases import Base, base_shapes, control_tokens
from fedcompose.call import COLLECTION_PERIOD, Call, check_answer
from fedcompose.contribution import KINDS, ReceivedContribution, VerifiedContribution, verify_contribution
from fedcompose.document import first_problem, format_time
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.federation import Federation, Site
from fedcompose.files import folder_digests, new_folder, read_json, read_limited, sha256_file, write_atomic, write_json
from fedcompose.gates import GATES_FILE, MAX_GATES_BYTES, read_gates, write_gates
from fedcompose.provenance import (
    PROVENANCE_FILE,
    BaseReference,
    CallReference,
    LoraSummary,
    Provenance,
    TraceSummary,
    UseTerms,
    installed_versions,
)
from fedcompose.signing import SIGNATURE_FILE, Signer, sign_files
from fedcompose.statement import build_provenance
from fedcompose.traces import PRIVATE_CLASSES, TRACES_FILE, Trace, check_tokens, decode, encode
from fedcompose_client.claims import privacy_claims
from fedcompose_client.config import Privacy, Use
from fedcompose_client.firewall import read_passed

STATE_FILE = "contribute-state.json"  # the last sequence number this site used
VALIDITY = timedelta(days=30)  # how long a contribution that answers no call may travel
REPORTED = ("base", "warmup", "rlvr")  # whose test accuracy leaves the site, as value and number of problems


def contribute(
    site_folder: Path,
    domain: str,
    signer: Signer,
    federation: Federation,
    now: datetime,
    *,
    call: Call | None = None,
    base: Base | None = None,
    traces: bool = False,
    non_private: bool = False,
    privacy: Privacy = Privacy(),
    use: Use | None = None,
) -> list[VerifiedContribution]:
    """Sign what the domain's run made and the call, if any, wants: its adapter, and its traces if it has some.

    With SOURCE_DATE_EPOCH in the environment that is the time it states, and the same run gives the same bytes.

    With `base` the adapter is checked against the base's own layers, and traces against its control tokens.
    Traces leave only where the site's settings ask for `traces`, and only those that the trace firewall let through.
    `non_private` is the site's declaration that the domain's questions may be shown to anyone; only then may
    traces of class E or F leave. Nothing leaves of a run that is beyond the site's own limits in `privacy`.

    Raises: ConfigError: `RUN_MISSING`, `DOMAIN_NOT_ENROLLED`, `BASE_AMBIGUOUS`. RefusedError: `TRACES_CLASS`,
        `AUDIT_BELOW_LIMIT`, `EPSILON_ABOVE_LIMIT`,
        `TRACES_UNREVIEWED`, `TRACES_CONTROL_TOKENS`, `BASE_MISMATCH`, and whatever a coordinator would refuse.
    """
    site, _ = federation.site_key(signer.keyid, now)
    if site.domain != domain:
        raise ConfigError(
            "DOMAIN_NOT_ENROLLED", f"site {site.id} is enrolled for another domain", expected=site.domain, got=domain
        )
    run = site_folder / "runs" / domain
    wanted = _wanted(run, site, call, traces)
    stated = privacy_claims(run, privacy)
    shapes = base_shapes(base) if base is not None else None
    made_at = _given_time() or now
    claims = _claims(site, federation, call, base, made_at, run) | {"use": use_terms(use)}
    made = []
    for kind in wanted:
        target = site_folder / "outbox" / domain / kind
        with new_folder(target) as folder:
            summary = (
                _rebuild_adapter(run, folder, shapes) | stated
                if kind == "adapter"
                else _rebuild_traces(run, folder, base, non_private)
            )
            claimed = claims | summary | {"sequence": _next_sequence(site_folder, made_at)}
            _sign(folder, claimed, signer)
            found = verify_contribution(ReceivedContribution(folder), federation, now=now, base_shapes=shapes)
            if call is not None:
                check_answer(call, found)
        made.append(replace(found, path=target))
    for kind in set(KINDS) - set(wanted):  # of an earlier signing: what is offered is what is signed now
        shutil.rmtree(site_folder / "outbox" / domain / kind, ignore_errors=True)
    return made


def _wanted(run: Path, site: Site, call: Call | None, traces: bool) -> Sequence[str]:
    """What the run made, the site may contribute and the call, if any, wants.

    Raises: ConfigError: `RUN_MISSING`.
    """
    kinds = [kind for kind, file in (("adapter", "expert"), ("traces", TRACES_FILE)) if (run / file).exists()]
    allowed = {kind for kind in site.may if kind != "traces" or traces}
    wanted = [kind for kind in kinds if kind in allowed and (call is None or kind in call.want)]
    if not wanted:
        raise ConfigError(
            "RUN_MISSING",
            f"{run} holds nothing that this site may contribute",
            fix=f"fedcompose client train --domain {site.domain}",
        )
    return wanted


def _rebuild_adapter(run: Path, folder: Path, shapes: Mapping[str, tuple[int, int]] | None) -> dict[str, Any]:
    adapter = read_adapter(run / "expert", shapes)
    write_adapter(folder, adapter)
    gates = run / gates_name(run)
    if gates.is_file():
        found = read_gates(read_limited(gates, MAX_GATES_BYTES), adapter.config, shapes)
        write_atomic(folder / GATES_FILE, write_gates(found))
    config = adapter.config
    lora = LoraSummary(r=config.r, alpha=config.lora_alpha, targets=tuple(sorted(set(config.target_modules))))
    return {"kind": "adapter", "lora": lora}


def use_terms(use: Use | None) -> UseTerms | None:
    """The site's terms, as they stand in what it signs; `until` ends with the beginning of its day, UTC.

    Raises: ConfigError: `USE_INVALID`.
    """
    if use is None:
        return None
    expires = datetime.combine(use.until, time(), UTC)
    try:
        return UseTerms(purpose=use.purpose, recipients=use.recipients, expires=expires, contact=use.contact)
    except ValidationError as error:
        raise ConfigError(
            "USE_INVALID",
            "the section [use] of site.toml cannot be signed",
            got=first_problem(error),
            expected="a purpose and a contact of up to 200 characters, at least one coordinator, a date",
        ) from error


def gates_name(run: Path) -> str:
    """What the gates of the run's present expert are called; those of an earlier one are called otherwise."""
    return f"gates-{sha256_file(run / 'expert' / WEIGHTS_FILE)[:16]}.safetensors"


def _rebuild_traces(run: Path, folder: Path, base: Base | None, non_private: bool) -> dict[str, Any]:
    traces = decode(read_passed(run))
    check_trace_classes(traces, non_private)
    check_tokens(traces, control_tokens(base) if base is not None else ())
    write_atomic(folder / TRACES_FILE, encode(traces))
    classes = Counter(trace.provenance_class for trace in traces)
    return {"kind": "traces", "traces": TraceSummary(classes=dict(classes), declared_non_private=non_private)}


def check_trace_classes(traces: list[Trace], non_private: bool) -> None:
    """Nothing made from private questions leaves, unless they are declared to be none.

    Raises: RefusedError: `TRACES_CLASS`.
    """
    private = sorted({trace.provenance_class for trace in traces} & PRIVATE_CLASSES)
    if private and not non_private:
        raise RefusedError(
            "TRACES_CLASS",
            f"traces of class {' and '.join(private)} come from private questions and do not leave",
            fix="distill on a declared generator, or declare the domain's data non-private in site.toml",
        )


def _claims(
    site: Site, federation: Federation, call: Call | None, base: Base | None, now: datetime, run: Path
) -> dict[str, Any]:
    """What an adapter and a trace set of this run both claim."""
    return {
        "federation": federation.id,
        "federation_version": federation.version,
        "site": site.id,
        "domain": site.domain,
        "base": _base(federation, call, base),
        "call": None if call is None else CallReference(id=call.id, nonce=call.nonce, sha256=call.digest),
        "expires": now + VALIDITY if call is None else call.deadline + COLLECTION_PERIOD,
        "finished": now,
        "invocation": f"urn:uuid:{_invocation(site, call, now)}",
        "metrics": _metrics(run / "result.json"),
        "versions": installed_versions(),
    }


def _given_time() -> datetime | None:
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    return datetime.fromtimestamp(int(epoch), UTC) if epoch.isdecimal() else None


def _invocation(site: Site, call: Call | None, now: datetime) -> uuid.UUID:
    """A name for this signing; the same one again where the environment gives the time."""
    if _given_time() is None:
        return uuid.uuid4()
    return uuid.uuid5(uuid.NAMESPACE_URL, f"{site.id} {call.digest if call else ''} {format_time(now)}")


def _base(federation: Federation, call: Call | None, base: Base | None) -> BaseReference:
    """The federation's name and digest of the base: the one given, the call's, or the only one there is."""
    known = {entry.dir_hash: entry.name for entry in federation.base_models}
    digests = [base.digest] if base else [call.base.dir_hash] if call else list(known)
    if len(digests) != 1:
        raise ConfigError("BASE_AMBIGUOUS", "the federation has several bases", fix="name the one you trained on")
    if digests[0] not in known:
        raise RefusedError(
            "BASE_MISMATCH",
            "this site's base is not one of the federation's",
            expected=" or ".join(known),
            got=digests[0],
        )
    return BaseReference(name=known[digests[0]], dir_hash=digests[0])


def _metrics(path: Path) -> dict[str, float]:
    """The few numbers that leave: test accuracies, to four places, and how many problems they are from.

    With differential privacy none: they are of private rows, and the stated ε does not count them.
    """
    result = read_json(path) if path.is_file() else {}
    accuracies = {} if result.get("dp") else result.get("accuracy", {})
    metrics: dict[str, float] = {}
    for name in REPORTED:
        if name in accuracies:
            metrics[f"{name}_accuracy"] = round(float(accuracies[name]["value"]), 4)
            metrics["test_count"] = int(accuracies[name]["n"])
    return metrics


def _next_sequence(site_folder: Path, now: datetime) -> int:
    """A number above every earlier one of this site, also when the state file was lost: seconds since 1970."""
    path = site_folder / STATE_FILE
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        last = int(read_json(path)["sequence"]) if path.is_file() else 0
        sequence = max(last + 1, int(now.timestamp()))
        write_json(path, {"sequence": sequence})
    return sequence


def _sign(folder: Path, claimed: Mapping[str, Any], signer: Signer) -> None:
    """Write provenance and signature over the files that are in `folder`."""
    provenance = Provenance(**claimed, subjects=folder_digests(folder))
    write_json(folder / PROVENANCE_FILE, build_provenance(provenance))
    write_atomic(folder / SIGNATURE_FILE, sign_files(provenance.kind, folder_digests(folder), signer))
