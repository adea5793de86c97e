"""What a signer claims about a folder, in the `provenance.json` that lies in it.

The file lies inside the signed folder, so one signature binds the claims to the weights. It says which
federation and base the folder is for, which call it answers, until when it may be admitted, and which files
it speaks of. It proves that the signer says so, not that training happened.

`Provenance` (of a contribution) and `ReleaseProvenance` are the claims as this project uses them; how they are
written in the file, `statement.py` says. Nothing here has room for a path, a host or a person; the only free
values are the numbers in `metrics`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic.alias_generators import to_camel

from fedcompose.document import Digest, Time, Title, format_time
from fedcompose.errors import RefusedError
from fedcompose.federation import FederationId
from fedcompose.keys import Identifier
from fedcompose.ledger import Head
from fedcompose.traces import ProvenanceClass

PROVENANCE_FILE = "provenance.json"

PACKAGES = ("fedcompose", "opacus", "peft", "torch", "transformers", "trl")

MAX_METRICS = 32
MAX_METRICS_BYTES = 1024
MAX_SUBJECTS = 4096
MAX_INGREDIENTS = 512
MAX_RECIPIENTS = 64

Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:@/+-]{0,127}\z")]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_./-]{0,254}\z")]
MetricName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}\z")]
Count = Annotated[int, Field(ge=1, lt=1 << 53)]  # beyond it JSON readers disagree about integers
Metrics = Annotated[dict[MetricName, Annotated[float, Field(allow_inf_nan=False)]], Field(max_length=MAX_METRICS)]
Versions = Annotated[dict[Label, Label], Field(max_length=16)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Verdict = Literal["pass", "warn", "fail", "inconclusive"]
Required = Literal["none", "warn", "pass"]  # the worst verdict of an audit that a site lets out
ACCEPTED: Mapping[Required, tuple[Verdict, ...]] = {
    "none": ("pass", "warn", "fail", "inconclusive"), "warn": ("pass", "warn"), "pass": ("pass",),
}  # fmt: skip
Subjects = Annotated[dict[FileName, Digest], Field(min_length=1, max_length=MAX_SUBJECTS)]


class Record(BaseModel):
    """Strict and frozen. Documents spell names in camelCase and code in snake_case, never the other way."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
    )


class CallReference(Record):
    """The call that a contribution answers; `sha256`, of what the coordinator signed, stands for all that it says."""

    id: Label
    nonce: Digest
    sha256: Digest


class BaseReference(Record):
    """The base that a folder is for: the federation's name for it and the digest that decides."""

    name: Title
    dir_hash: Digest


class LoraSummary(Record):
    """What kind of LoRA the adapter is, for people; the adapter's own configuration decides."""

    r: Count
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    targets: Annotated[tuple[Label, ...], Field(strict=False, min_length=1, max_length=1024)]


class TraceSummary(Record):
    """How many traces of which class; `declared_non_private` is the word that its questions are public."""

    classes: Annotated[dict[ProvenanceClass, Count], Field(min_length=1)]
    declared_non_private: bool


Uncounted = Literal["choice-of-settings", "number-of-units", "other-runs", "audit", "trace-selection"]


class DpPhase(Record):
    """Steps that each drew every unit with probability `batch` / `units`, and added noise once."""

    name: Literal["warm-up", "reinforcement"]
    batch: Count
    steps: Count


class DpStatement(Record):
    """What an adapter guarantees, in the terms of NIST SP 800-226, and what the guarantee leaves out.

    Two data sets are neighbours when one has one `unit` more; the site itself is trusted; `units` is public and
    rounded down; ε follows from the other numbers, so anybody can compute it again.
    """

    epsilon: Positive
    delta: Annotated[float, Field(gt=0, lt=1)]
    unit: Literal["prompt", "user"]
    neighbours: Literal["add-or-remove-one"]
    trust_model: Literal["central"]
    mechanism: Literal["clipped-gaussian"]
    sampler: Literal["poisson"]
    accountant: Literal["prv"]
    noise_multiplier: Positive
    clip_norm: Positive
    units: Count
    phases: Annotated[tuple[DpPhase, ...], Field(strict=False, min_length=1, max_length=2)]
    uncounted: Annotated[tuple[Uncounted, ...], Field(strict=False, max_length=5)]


class AuditNumbers(Record):
    """What an audit measured, as far as its owner let the numbers out."""

    canaries: Count
    rewarded: Share
    auc: Share
    auc_high: Share
    tpr_high: Share
    power_auc: Share
    epsilon_low: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    epsilon_cap: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class AuditStatement(Record):
    """How a memorisation audit ended: of a twin, trained as the adapter was, with canaries among its rows."""

    verdict: Verdict
    target: Literal["twin"]
    numbers: AuditNumbers | None = None


class SiteLimits(Record):
    """What the site itself asks of whatever it ships; an adapter beyond its own site's limits is refused everywhere."""

    require_audit: Required
    max_epsilon: Positive | None = None


class UseTerms(Record):
    """For what, by which coordinators and until when a contribution may be used, and who is told of objections.

    Recipients and time are enforced wherever it is received, composed, verified or loaded. The purpose is for people.
    """

    purpose: Title
    recipients: Annotated[tuple[Identifier, ...], Field(strict=False, min_length=1, max_length=MAX_RECIPIENTS)]
    expires: Time
    contact: Title

    def __str__(self) -> str:
        return (
            f"for {self.purpose}, by {', '.join(self.recipients)}, until {format_time(self.expires)}; "
            f"objections to {self.contact}"
        )


class Claims(Record):
    """What contributions and releases both say."""

    federation: FederationId
    federation_version: Count
    base: BaseReference
    subjects: Subjects
    invocation: Label
    finished: Time
    metrics: Metrics = {}
    versions: Versions


class Provenance(Claims):
    """The claims of one contribution; `sequence` is the site's own rising count."""

    kind: Literal["adapter", "traces"]
    site: Identifier
    domain: Identifier
    sequence: Count
    expires: Time
    call: CallReference | None = None
    lora: LoraSummary | None = None
    traces: TraceSummary | None = None
    dp: DpStatement | None = None
    audit: AuditStatement | None = None
    limits: SiteLimits | None = None
    use: UseTerms | None = None


class Ingredient(Record):
    """One expert of a release: what its site signed, with which key, and when the coordinator received it."""

    site: Identifier
    dir_hash: Digest
    payload_sha256: Digest
    keyid: Digest
    sequence: Count
    received_on: Time


class ReleaseProvenance(Claims):
    """The claims of a release; `ledger` is how far the coordinator's decision ledger had come."""

    coordinator: Identifier
    method: Label
    ledger: Head | None = None
    ingredients: Annotated[tuple[Ingredient, ...], Field(strict=False, min_length=1, max_length=MAX_INGREDIENTS)]


def check_limits(dp: DpStatement | None, audit: AuditStatement | None, limits: SiteLimits | None) -> None:
    """A site's own limits hold for its adapter.

    Raises: RefusedError: `AUDIT_BELOW_LIMIT`, `EPSILON_ABOVE_LIMIT`.
    """
    if limits is None:
        return
    verdict = audit.verdict if audit else None
    if limits.require_audit != "none" and verdict not in ACCEPTED[limits.require_audit]:
        raise RefusedError(
            "AUDIT_BELOW_LIMIT",
            "the site's own limits do not let this adapter out",
            expected=f"an audit that ended with {' or '.join(ACCEPTED[limits.require_audit])}",
            got=verdict or "no audit of this adapter",
            fix="run `fedcompose client audit`, or train with fewer steps, more rows or --dp-epsilon",
        )
    if limits.max_epsilon is not None and (dp is None or dp.epsilon > limits.max_epsilon):
        raise RefusedError(
            "EPSILON_ABOVE_LIMIT",
            "the site's own limits do not let this adapter out",
            expected=f"differential privacy with an epsilon of at most {limits.max_epsilon:g}",
            got=f"epsilon {dp.epsilon:g}" if dp else "no differential privacy",
            fix=f"train with --dp-epsilon {limits.max_epsilon:g} or less",
        )


def check_use(terms: UseTerms | None, coordinator: str | None, now: datetime) -> None:
    """A site's terms let this coordinator, or anybody where none is named, use its contribution at this time.

    Raises: RefusedError: `USE_RECIPIENT`, `USE_EXPIRED`.
    """
    if terms is None:
        return
    if coordinator is not None and coordinator not in terms.recipients:
        raise RefusedError(
            "USE_RECIPIENT",
            "the site did not sign this contribution for this coordinator",
            expected=", ".join(terms.recipients),
            got=coordinator,
            fix=f"leave the site out, or ask it to contribute for you: {terms.contact}",
        )
    if now >= terms.expires:
        raise RefusedError(
            "USE_EXPIRED",
            "the time for which the site lets its contribution be used is over",
            expected=f"use before {format_time(terms.expires)}",
            got=format_time(now),
            fix=f"leave the site out, or ask it to contribute again: {terms.contact}",
        )


def installed_versions() -> dict[str, str]:
    """Versions of the packages that made the weights, as far as this machine has them."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
