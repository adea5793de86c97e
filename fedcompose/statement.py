"""Claims as they lie in `provenance.json`: an in-toto Statement with SLSA v1 provenance.

`build_*` turns claims into a statement, and `parse_*` accepts exactly such statements and gives the claims back. What
lies in the file is spelled out in full by the records here, so that nothing else has a place in it.

Source: https://in-toto.io/Statement/v1, https://slsa.dev/spec/v1.0/provenance.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, NoReturn, TypeVar

from pydantic import Field, ValidationError

from fedcompose.document import Digest, Time, Title
from fedcompose.errors import RefusedError
from fedcompose.federation import FederationId
from fedcompose.files import parse_json
from fedcompose.keys import Identifier
from fedcompose.ledger import Head
from fedcompose.provenance import (
    MAX_INGREDIENTS,
    MAX_METRICS_BYTES,
    MAX_SUBJECTS,
    PROVENANCE_FILE,
    AuditStatement,
    BaseReference,
    CallReference,
    Claims,
    Count,
    DpStatement,
    FileName,
    Ingredient,
    Label,
    LoraSummary,
    Metrics,
    Provenance,
    Record,
    ReleaseProvenance,
    SiteLimits,
    TraceSummary,
    UseTerms,
    Versions,
)

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://slsa.dev/provenance/v1"
TRAIN_LORA: Final = "https://fedcompose.dev/train-lora/v1"
DISTILL: Final = "https://fedcompose.dev/distill/v1"
COMPOSE: Final = "https://fedcompose.dev/compose/v1"


class _Sha256(Record):
    sha256: Digest


class _DirHash(Record):
    dir_hash: Digest


class _Subject(Record):
    name: FileName
    digest: _Sha256


class _ModelName(Record):
    model: Title


class _BaseDependency(Record):
    name: Literal["base"]
    digest: _DirHash
    annotations: _ModelName


class _Receipt(Record):
    oms_payload_sha256: Digest
    keyid: Digest
    sequence: Count
    received_on: Time


class _IngredientDependency(Record):
    name: Identifier
    digest: _DirHash
    annotations: _Receipt


class _SiteParameters(Record):
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


class _ReleaseParameters(Record):
    federation: FederationId
    federation_version: Count
    method: Label
    ledger: Head | None = None


class _AdapterBuild(Record):
    build_type: Literal["https://fedcompose.dev/train-lora/v1"]
    external_parameters: _AdapterParameters
    resolved_dependencies: Annotated[tuple[_BaseDependency], Field(strict=False)]


class _TracesBuild(Record):
    build_type: Literal["https://fedcompose.dev/distill/v1"]
    external_parameters: _TracesParameters
    resolved_dependencies: Annotated[tuple[_BaseDependency], Field(strict=False)]


class _ReleaseBuild(Record):
    build_type: Literal["https://fedcompose.dev/compose/v1"]
    external_parameters: _ReleaseParameters
    resolved_dependencies: Annotated[
        tuple[_BaseDependency | _IngredientDependency, ...],
        Field(strict=False, min_length=2, max_length=MAX_INGREDIENTS + 1),
    ]


class _Builder(Record):
    id: Label
    version: Versions


class _RunMetadata(Record):
    invocation_id: Label
    finished_on: Time


class _MetricsFile(Record):
    name: Literal["metrics"]
    media_type: Literal["application/json"]
    content: Annotated[str, Field(max_length=2 * MAX_METRICS_BYTES)]


class _Run(Record):
    builder: _Builder
    metadata: _RunMetadata
    byproducts: Annotated[tuple[_MetricsFile], Field(strict=False)]


class _Predicate(Record):
    build_definition: Annotated[_AdapterBuild | _TracesBuild | _ReleaseBuild, Field(discriminator="build_type")]
    run_details: _Run


class _Statement(Record):
    statement_type: Literal["https://in-toto.io/Statement/v1"] = Field(
        validation_alias="_type", serialization_alias="_type"
    )
    predicate_type: Literal["https://slsa.dev/provenance/v1"]
    subject: Annotated[tuple[_Subject, ...], Field(strict=False, min_length=1, max_length=MAX_SUBJECTS)]
    predicate: _Predicate


class _MetricsContent(Record):
    metrics: Metrics


_R = TypeVar("_R", bound=Record)


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


def _statement(claims: Claims, build: _AdapterBuild | _TracesBuild | _ReleaseBuild, builder: str) -> dict[str, Any]:
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
