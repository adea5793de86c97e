"""What a signer claims about a folder: an in-toto Statement with SLSA v1 provenance, in `provenance.json`.

The file lies inside the signed folder, so one signature binds the claims to the weights. It says which
federation and base the folder is for, which call it answers, until when it may be admitted, and which files
it speaks of. It proves that the signer says so, not that training happened.

`Provenance` (of a contribution) and `ReleaseProvenance` are the claims as this project uses them; `build_*`
turns them into a statement and `parse_*` accepts exactly such statements. Nothing here has room for a path,
a host or a person; the only free values are the numbers in `metrics`.

Source: https://in-toto.io/Statement/v1, https://slsa.dev/spec/v1.0/provenance.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Final, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic.alias_generators import to_camel

from fedcompose.errors import RefusedError
from fedcompose.federation import Digest, FederationId, Time, Title, format_time
from fedcompose.files import parse_json
from fedcompose.keys import Identifier
from fedcompose.ledger import Head
from fedcompose.traces import ProvenanceClass

PROVENANCE_FILE = "provenance.json"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://slsa.dev/provenance/v1"
TRAIN_LORA: Final = "https://fedcompose.dev/train-lora/v1"
DISTILL: Final = "https://fedcompose.dev/distill/v1"
COMPOSE: Final = "https://fedcompose.dev/compose/v1"

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


class _Record(BaseModel):
    """Strict and frozen. Documents spell names in camelCase and code in snake_case, never the other way."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
    )


class CallReference(_Record):
    """The call that a contribution answers; `sha256`, of what the coordinator signed, stands for all that it says."""

    id: Label
    nonce: Digest
    sha256: Digest


class BaseReference(_Record):
    """The base that a folder is for: the federation's name for it and the digest that decides."""

    name: Title
    dir_hash: Digest


class LoraSummary(_Record):
    """What kind of LoRA the adapter is, for people; the adapter's own configuration decides."""

    r: Count
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    targets: Annotated[tuple[Label, ...], Field(strict=False, min_length=1, max_length=1024)]


class TraceSummary(_Record):
    """How many traces of which class; `declared_non_private` is the word that its questions are public."""

    classes: Annotated[dict[ProvenanceClass, Count], Field(min_length=1)]
    declared_non_private: bool


class DpPhase(_Record):
    """Steps that each drew every unit with probability `batch` / `units`, and added noise once."""

    name: Literal["warm-up", "reinforcement"]
    batch: Count
    steps: Count


class DpStatement(_Record):
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
    uncounted: Annotated[
        tuple[Literal["choice-of-settings", "number-of-units", "other-runs"], ...], Field(strict=False, max_length=3)
    ]


class AuditNumbers(_Record):
    """What an audit measured, as far as its owner let the numbers out."""

    canaries: Count
    rewarded: Share
    auc: Share
    auc_high: Share
    tpr_high: Share
    power_auc: Share
    epsilon_low: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    epsilon_cap: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class AuditStatement(_Record):
    """How a memorisation audit ended: of a twin, trained as the adapter was, with canaries among its rows."""

    verdict: Verdict
    target: Literal["twin"]
    numbers: AuditNumbers | None = None


class SiteLimits(_Record):
    """What the site itself asks of whatever it ships; an adapter beyond its own site's limits is refused everywhere."""

    require_audit: Required
    max_epsilon: Positive | None = None


class UseTerms(_Record):
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


class _Claims(_Record):
    """What contributions and releases both say."""

    federation: FederationId
    federation_version: Count
    base: BaseReference
    subjects: Subjects
    invocation: Label
    finished: Time
    metrics: Metrics = {}
    versions: Versions


class Provenance(_Claims):
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


class Ingredient(_Record):
    """One expert of a release: what its site signed, with which key, and when the coordinator received it."""

    site: Identifier
    dir_hash: Digest
    payload_sha256: Digest
    keyid: Digest
    sequence: Count
    received_on: Time


class ReleaseProvenance(_Claims):
    """The claims of a release; `ledger` is how far the coordinator's decision ledger had come."""

    coordinator: Identifier
    method: Label
    ledger: Head | None = None
    ingredients: Annotated[tuple[Ingredient, ...], Field(strict=False, min_length=1, max_length=MAX_INGREDIENTS)]


def build_provenance(claims: Provenance) -> dict[str, Any]:
    """The statement of a contribution.

    Raises: ValueError: if an adapter comes without its LoRA summary, or traces without their counts.
    """
    shared = claims.model_dump(include=set(_SiteParameters.model_fields))
    if claims.kind == "adapter":
        build: _AdapterBuild | _TracesBuild = _AdapterBuild(
            build_type=TRAIN_LORA,
            external_parameters=_AdapterParameters(
                **shared,
                lora=claims.lora,  # type: ignore[arg-type]
                dp=claims.dp,
                audit=claims.audit,
                limits=claims.limits,
            ),
            resolved_dependencies=(_base_dependency(claims.base),),
        )
    else:
        build = _TracesBuild(
            build_type=DISTILL,
            external_parameters=_TracesParameters(**shared, traces=claims.traces),  # type: ignore[arg-type]
            resolved_dependencies=(_base_dependency(claims.base),),
        )
    return _statement(claims, build, f"urn:fedcompose:site:{claims.site}")


def build_release_provenance(claims: ReleaseProvenance) -> dict[str, Any]:
    """The statement of a release; an ingredient is named by what its site signed, not by a file of ours."""
    build = _ReleaseBuild(
        build_type=COMPOSE,
        external_parameters=_ReleaseParameters(
            federation=claims.federation,
            federation_version=claims.federation_version,
            method=claims.method,
            ledger=claims.ledger,
        ),
        resolved_dependencies=(
            _base_dependency(claims.base),
            *(_ingredient_dependency(ingredient) for ingredient in claims.ingredients),
        ),
    )
    return _statement(claims, build, f"urn:fedcompose:coordinator:{claims.coordinator}")


def parse_provenance(data: bytes) -> Provenance:
    """The claims in a contribution's `provenance.json`.

    Raises: RefusedError: `PROVENANCE_INVALID`, `JSON_INVALID`.
    """
    statement = _parsed(_Statement, parse_json(data, PROVENANCE_FILE))
    build = statement.predicate.build_definition
    if isinstance(build, _ReleaseBuild):
        _refuse("the provenance of a release, not of a contribution")
    parameters = build.external_parameters
    _check_builder(statement, f"urn:fedcompose:site:{parameters.site}")
    return Provenance(
        kind="adapter" if isinstance(build, _AdapterBuild) else "traces",
        site=parameters.site,
        domain=parameters.domain,
        sequence=parameters.sequence,
        expires=parameters.expires,
        call=parameters.call,
        use=parameters.use,
        **_only_of_adapters(parameters),
        traces=parameters.traces if isinstance(parameters, _TracesParameters) else None,
        **_shared_claims(statement, parameters, build.resolved_dependencies[0]),
    )


def parse_release_provenance(data: bytes) -> ReleaseProvenance:
    """The claims in a release's `provenance.json`.

    Raises: RefusedError: `PROVENANCE_INVALID`, `JSON_INVALID`.
    """
    statement = _parsed(_Statement, parse_json(data, PROVENANCE_FILE))
    build = statement.predicate.build_definition
    if not isinstance(build, _ReleaseBuild):
        _refuse("the provenance of a contribution, not of a release")
    base, *ingredients = build.resolved_dependencies
    if not isinstance(base, _BaseDependency):
        _refuse("the first dependency is not the base")
    coordinator = statement.predicate.run_details.builder.id.removeprefix("urn:fedcompose:coordinator:")
    _check_builder(statement, f"urn:fedcompose:coordinator:{coordinator}")
    return _parsed(
        ReleaseProvenance,
        {
            "coordinator": coordinator,
            "method": build.external_parameters.method,
            "ledger": build.external_parameters.ledger,
            "ingredients": [_ingredient(entry) for entry in ingredients],
            **_shared_claims(statement, build.external_parameters, base),
        },
        by_name=True,
    )


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


# --- the statement, as it lies in the file --------------------------------------------------------


class _Sha256(_Record):
    sha256: Digest


class _DirHash(_Record):
    dir_hash: Digest


class _Subject(_Record):
    name: FileName
    digest: _Sha256


class _ModelName(_Record):
    model: Title


class _BaseDependency(_Record):
    name: Literal["base"]
    digest: _DirHash
    annotations: _ModelName


class _Receipt(_Record):
    oms_payload_sha256: Digest
    keyid: Digest
    sequence: Count
    received_on: Time


class _IngredientDependency(_Record):
    name: Identifier
    digest: _DirHash
    annotations: _Receipt


class _SiteParameters(_Record):
    federation: FederationId
    federation_version: Count
    site: Identifier
    domain: Identifier
    sequence: Count
    call: CallReference | None = None
    expires: Time
    use: UseTerms | None = None


class _AdapterParameters(_SiteParameters):
    lora: LoraSummary
    dp: DpStatement | None = None
    audit: AuditStatement | None = None
    limits: SiteLimits | None = None


class _TracesParameters(_SiteParameters):
    traces: TraceSummary


class _ReleaseParameters(_Record):
    federation: FederationId
    federation_version: Count
    method: Label
    ledger: Head | None = None


class _AdapterBuild(_Record):
    build_type: Literal["https://fedcompose.dev/train-lora/v1"]
    external_parameters: _AdapterParameters
    resolved_dependencies: Annotated[tuple[_BaseDependency], Field(strict=False)]


class _TracesBuild(_Record):
    build_type: Literal["https://fedcompose.dev/distill/v1"]
    external_parameters: _TracesParameters
    resolved_dependencies: Annotated[tuple[_BaseDependency], Field(strict=False)]


class _ReleaseBuild(_Record):
    build_type: Literal["https://fedcompose.dev/compose/v1"]
    external_parameters: _ReleaseParameters
    resolved_dependencies: Annotated[
        tuple[_BaseDependency | _IngredientDependency, ...],
        Field(strict=False, min_length=2, max_length=MAX_INGREDIENTS + 1),
    ]


class _Builder(_Record):
    id: Label
    version: Versions


class _RunMetadata(_Record):
    invocation_id: Label
    finished_on: Time


class _MetricsFile(_Record):
    name: Literal["metrics"]
    media_type: Literal["application/json"]
    content: Annotated[str, Field(max_length=2 * MAX_METRICS_BYTES)]


class _Run(_Record):
    builder: _Builder
    metadata: _RunMetadata
    byproducts: Annotated[tuple[_MetricsFile], Field(strict=False)]


class _Predicate(_Record):
    build_definition: Annotated[_AdapterBuild | _TracesBuild | _ReleaseBuild, Field(discriminator="build_type")]
    run_details: _Run


class _Statement(_Record):
    statement_type: Literal["https://in-toto.io/Statement/v1"] = Field(
        validation_alias="_type", serialization_alias="_type"
    )
    predicate_type: Literal["https://slsa.dev/provenance/v1"]
    subject: Annotated[tuple[_Subject, ...], Field(strict=False, min_length=1, max_length=MAX_SUBJECTS)]
    predicate: _Predicate


class _MetricsContent(_Record):
    metrics: Metrics


_R = TypeVar("_R", bound=_Record)


def _statement(claims: _Claims, build: _AdapterBuild | _TracesBuild | _ReleaseBuild, builder: str) -> dict[str, Any]:
    statement = _Statement(
        statement_type=STATEMENT_TYPE,
        predicate_type=PREDICATE_TYPE,
        subject=tuple(
            _Subject(name=name, digest=_Sha256(sha256=claims.subjects[name])) for name in sorted(claims.subjects)
        ),
        predicate=_Predicate(
            build_definition=build,
            run_details=_Run(
                builder=_Builder(id=builder, version=claims.versions),
                metadata=_RunMetadata(invocation_id=claims.invocation, finished_on=claims.finished),
                byproducts=(_metrics_file(claims.metrics),),
            ),
        ),
    )
    return statement.model_dump(mode="json", by_alias=True, exclude_none=True)


def _only_of_adapters(parameters: _SiteParameters) -> dict[str, Any]:
    if not isinstance(parameters, _AdapterParameters):
        return {}
    return {name: getattr(parameters, name) for name in ("lora", "dp", "audit", "limits")}


def _base_dependency(base: BaseReference) -> _BaseDependency:
    return _BaseDependency(
        name="base", digest=_DirHash(dir_hash=base.dir_hash), annotations=_ModelName(model=base.name)
    )


def _ingredient_dependency(ingredient: Ingredient) -> _IngredientDependency:
    return _IngredientDependency(
        name=ingredient.site,
        digest=_DirHash(dir_hash=ingredient.dir_hash),
        annotations=_Receipt(
            oms_payload_sha256=ingredient.payload_sha256,
            keyid=ingredient.keyid,
            sequence=ingredient.sequence,
            received_on=ingredient.received_on,
        ),
    )


def _ingredient(entry: _BaseDependency | _IngredientDependency) -> Ingredient:
    if isinstance(entry, _BaseDependency):
        _refuse("more than one base")
    return Ingredient(
        site=entry.name,
        dir_hash=entry.digest.dir_hash,
        payload_sha256=entry.annotations.oms_payload_sha256,
        keyid=entry.annotations.keyid,
        sequence=entry.annotations.sequence,
        received_on=entry.annotations.received_on,
    )


def _metrics_file(metrics: Mapping[str, float]) -> _MetricsFile:
    text = json.dumps(dict(metrics), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > MAX_METRICS_BYTES:
        raise ValueError(f"metrics are limited to {MAX_METRICS_BYTES} bytes")
    content = base64.b64encode(text).decode()
    return _MetricsFile(name="metrics", media_type="application/json", content=content)


def _metrics(file: _MetricsFile) -> dict[str, float]:
    try:
        text = base64.b64decode(file.content, validate=True)
    except (binascii.Error, ValueError):
        _refuse("metrics that are not base64")
    return _parsed(_MetricsContent, {"metrics": parse_json(text, "the metrics")}).metrics


def _shared_claims(
    statement: _Statement, parameters: _SiteParameters | _ReleaseParameters, base: _BaseDependency
) -> dict[str, Any]:
    run = statement.predicate.run_details
    subjects = {subject.name: subject.digest.sha256 for subject in statement.subject}
    if len(subjects) != len(statement.subject):
        _refuse("a subject appears twice")
    return {
        "federation": parameters.federation,
        "federation_version": parameters.federation_version,
        "base": BaseReference(name=base.annotations.model, dir_hash=base.digest.dir_hash),
        "subjects": subjects,
        "metrics": _metrics(run.byproducts[0]),
        "versions": run.builder.version,
        "invocation": run.metadata.invocation_id,
        "finished": run.metadata.finished_on,
    }


def _check_builder(statement: _Statement, expected: str) -> None:
    if statement.predicate.run_details.builder.id != expected:
        _refuse("a builder other than the claimed signer")


def _parsed(record: type[_R], document: Any, by_name: bool = False) -> _R:
    try:
        return record.model_validate(document, by_alias=not by_name, by_name=by_name)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:32] for part in first["loc"]) or "the statement"
        _refuse(f"{where!a}: {first['type']}")


def _refuse(reason: str) -> NoReturn:
    raise RefusedError("PROVENANCE_INVALID", f"{PROVENANCE_FILE} is not acceptable", got=reason)
