from __future__ import annotations

import base64
import copy
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from fedcompose.errors import RefusedError
from fedcompose.files import dump_json
from fedcompose.ledger import Head
from fedcompose.provenance import (
    AuditNumbers,
    AuditStatement,
    BaseReference,
    CallReference,
    DpPhase,
    DpStatement,
    Ingredient,
    LoraSummary,
    Provenance,
    ReleaseProvenance,
    SiteLimits,
    TraceSummary,
    UseTerms,
    check_limits,
    check_use,
)
from fedcompose.statement import build_provenance, build_release_provenance, parse_provenance, parse_release_provenance

NOW = datetime(2026, 11, 21, 9, 0, tzinfo=UTC)
FEDERATION = "urn:uuid:00000000-0000-4000-8000-000000000001"
SHARED: dict[str, Any] = {
    "federation": FEDERATION,
    "federation_version": 3,
    "base": BaseReference(name="tiny", dir_hash="b" * 64),
    "subjects": {"b.json": "2" * 64, "a.json": "1" * 64},
    "invocation": "urn:uuid:00000000-0000-4000-8000-000000000002",
    "finished": NOW,
    "metrics": {"rlvr_accuracy": 0.5, "n": 200},
    "versions": {"fedcompose": "0.1.0"},
}
SITE: dict[str, Any] = {**SHARED, "site": "site-a", "domain": "clock", "sequence": 12, "expires": NOW}
ADAPTER = Provenance(kind="adapter", lora=LoraSummary(r=8, alpha=16, targets=("up_proj",)), **SITE)
DP = DpStatement(
    epsilon=7.9, delta=1e-5, unit="prompt", neighbours="add-or-remove-one", trust_model="central",
    mechanism="clipped-gaussian", sampler="poisson", accountant="prv", noise_multiplier=0.6, clip_norm=0.1, units=1200,
    phases=(DpPhase(name="reinforcement", batch=8, steps=36),), uncounted=("choice-of-settings", "other-runs"),
)  # fmt: skip
NUMBERS = AuditNumbers(
    canaries=300, rewarded=0.9, auc=0.5, auc_high=0.57, tpr_high=0.04, power_auc=0.99, epsilon_low=0.0, epsilon_cap=4.1
)
PRIVATE = ADAPTER.model_copy(
    update={
        "dp": DP,
        "audit": AuditStatement(verdict="pass", target="twin", numbers=NUMBERS),
        "limits": SiteLimits(require_audit="pass", max_epsilon=8.0),
        "use": UseTerms(purpose="research", recipients=("hub",), expires=NOW, contact="office@example.org"),
    }
)
TRACES = Provenance(
    kind="traces",
    traces=TraceSummary(classes={"B": 40}, declared_non_private=False),
    call=CallReference(id="2026-11", nonce="c" * 64, sha256="d" * 64),
    **SITE,
)
RELEASE = ReleaseProvenance(
    coordinator="hub",
    method="hard_top1_ste",
    ledger=Head(entries=7, head="9" * 64),
    ingredients=(
        Ingredient(
            site="site-a",
            dir_hash="d" * 64,
            payload_sha256="e" * 64,
            keyid="f" * 64,
            sequence=12,
            received_on=NOW,
        ),
    ),
    **SHARED,
)


PARAMETERS = "predicate/buildDefinition/externalParameters"
RUN = "predicate/runDetails"


def refused(parse: Callable[[bytes], object], document: Any) -> str:
    with pytest.raises(RefusedError) as refusal:
        parse(dump_json(document))
    return refusal.value.code


@pytest.mark.parametrize("claims", [ADAPTER, PRIVATE, TRACES], ids=["adapter", "private", "traces"])
def test_claims_survive_the_statement(claims: Provenance) -> None:
    assert parse_provenance(dump_json(build_provenance(claims))) == claims
    assert parse_release_provenance(dump_json(build_release_provenance(RELEASE))) == RELEASE


def test_what_is_not_claimed_is_not_in_the_statement() -> None:
    parameters = build_provenance(ADAPTER)["predicate"]["buildDefinition"]["externalParameters"]
    assert not {"dp", "audit", "limits", "use"} & parameters.keys()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("dp/epsilon", 0), ("dp/epsilon", "8"), ("dp/unit", "row"), ("dp/note", "x"), ("dp/uncounted", ["none"]),
        ("dp/phases", []), ("dp/sampler", "shuffled"), ("audit/verdict", "good"), ("audit/numbers/seed", 7),
        ("audit/numbers/auc", 1.5), ("limits/requireAudit", "maybe"),
        ("use/recipients", []), ("use/recipients", ["Hub X"]), ("use/expires", "never"), ("use/note", "x"),
        ("use/contact", ""), ("use/purpose", "a\u202eb"),
    ],
)  # fmt: skip
def test_privacy_claims_have_room_for_nothing_else(path: str, value: object) -> None:
    statement = build_provenance(PRIVATE)
    assert refused(parse_provenance, changed(statement, f"{PARAMETERS}/{path}", value)) == "PROVENANCE_INVALID"


@pytest.mark.parametrize(
    ("dp", "verdict", "limits", "code"),
    [
        (None, "warn", {"require_audit": "pass"}, "AUDIT_BELOW_LIMIT"),
        (None, "inconclusive", {"require_audit": "warn"}, "AUDIT_BELOW_LIMIT"),
        (None, None, {"require_audit": "warn"}, "AUDIT_BELOW_LIMIT"),
        (None, "pass", {"require_audit": "none", "max_epsilon": 8.0}, "EPSILON_ABOVE_LIMIT"),
        (DP, "pass", {"require_audit": "pass", "max_epsilon": 7.0}, "EPSILON_ABOVE_LIMIT"),
        (DP, "pass", {"require_audit": "pass", "max_epsilon": 8.0}, None),
        (None, "warn", {"require_audit": "warn"}, None),
        (None, None, {"require_audit": "none"}, None),
    ],
)
def test_a_sites_own_limits(dp: DpStatement | None, verdict: Any, limits: dict[str, Any], code: str | None) -> None:
    audit = AuditStatement(verdict=verdict, target="twin") if verdict else None
    if code is None:
        check_limits(dp, audit, SiteLimits(**limits))
        return
    with pytest.raises(RefusedError) as refusal:
        check_limits(dp, audit, SiteLimits(**limits))
    assert refusal.value.code == code


@pytest.mark.parametrize(
    ("coordinator", "at", "code"),
    [
        ("hub", NOW - timedelta(seconds=1), None),
        (None, NOW - timedelta(seconds=1), None),
        ("hub", NOW, "USE_EXPIRED"),
        (None, NOW, "USE_EXPIRED"),
        ("another", NOW - timedelta(days=1), "USE_RECIPIENT"),
    ],
)
def test_a_sites_terms(coordinator: str | None, at: datetime, code: str | None) -> None:
    check_use(None, coordinator, at)
    if code is None:
        check_use(PRIVATE.use, coordinator, at)
        return
    with pytest.raises(RefusedError) as refusal:
        check_use(PRIVATE.use, coordinator, at)
    assert refusal.value.code == code


def test_the_statement_is_in_toto_and_slsa_to_the_letter() -> None:
    statement = build_provenance(ADAPTER)
    definition = statement["predicate"]["buildDefinition"]
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    assert statement["subject"][0] == {"name": "a.json", "digest": {"sha256": "1" * 64}}
    assert definition["buildType"] == "https://fedcompose.dev/train-lora/v1"
    assert definition["externalParameters"] == {
        "federation": FEDERATION,
        "federationVersion": 3,
        "site": "site-a",
        "domain": "clock",
        "sequence": 12,
        "expires": "2026-11-21T09:00:00Z",
        "lora": {"r": 8, "alpha": 16.0, "targets": ["up_proj"]},
    }
    assert definition["resolvedDependencies"] == [
        {"name": "base", "digest": {"dirHash": "b" * 64}, "annotations": {"model": "tiny"}}
    ]
    run = statement["predicate"]["runDetails"]
    assert run["builder"] == {"id": "urn:fedcompose:site:site-a", "version": {"fedcompose": "0.1.0"}}
    metrics = json.loads(base64.b64decode(run["byproducts"][0]["content"]))
    assert metrics == {"rlvr_accuracy": 0.5, "n": 200}


# Every field of an in-toto Statement v1, its resource descriptors and a SLSA v1 provenance predicate.
# Source: https://github.com/in-toto/attestation/tree/main/spec/v1, https://slsa.dev/spec/v1.0/provenance.
DESCRIPTOR = {"name", "uri", "digest", "content", "downloadLocation", "mediaType", "annotations"}
SPECIFIED: dict[str, set[str]] = {
    "": {"_type", "subject", "predicateType", "predicate"},
    "subject": DESCRIPTOR,
    "predicate": {"buildDefinition", "runDetails"},
    "predicate/buildDefinition": {"buildType", "externalParameters", "internalParameters", "resolvedDependencies"},
    "predicate/buildDefinition/resolvedDependencies": DESCRIPTOR,
    RUN: {"builder", "metadata", "byproducts"},
    f"{RUN}/builder": {"id", "builderDependencies", "version"},
    f"{RUN}/metadata": {"invocationId", "startedOn", "finishedOn"},
    f"{RUN}/byproducts": DESCRIPTOR,
}
DIGESTS = {"sha256", "dirHash"}  # of the algorithms that in-toto names


def unspecified(document: Any, path: str = "") -> list[str]:
    """Fields that in-toto and SLSA do not have; what `externalParameters` and `annotations` hold is ours to say."""
    if isinstance(document, list):
        return [name for each in document for name in unspecified(each, path)]
    if not isinstance(document, dict) or path.endswith(("/externalParameters", "/annotations", "/version")):
        return []
    known = DIGESTS if path.endswith("/digest") else SPECIFIED[path]
    strange = [f"{path}/{name}" for name in document.keys() - known]
    return strange + [
        name
        for key, value in document.items()
        if key in known
        for name in unspecified(value, f"{path}/{key}".strip("/"))
    ]


@pytest.mark.parametrize(
    "statement",
    [build_provenance(ADAPTER), build_provenance(PRIVATE), build_provenance(TRACES), build_release_provenance(RELEASE)],
    ids=["adapter", "private", "traces", "release"],
)
def test_has_no_field_that_in_toto_and_slsa_do_not_have(statement: dict[str, Any]) -> None:
    assert unspecified(statement) == []
    assert unspecified(changed(statement, "predicate/runDetails/finishedOn", "x")) == [f"{RUN}/finishedOn"]
    assert unspecified(changed(statement, "subject/0/digest/SHA256", "x")) == ["subject/digest/SHA256"]


def test_a_release_names_its_ingredients_by_what_the_sites_signed() -> None:
    dependencies = build_release_provenance(RELEASE)["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert dependencies[1] == {
        "name": "site-a",
        "digest": {"dirHash": "d" * 64},
        "annotations": {
            "omsPayloadSha256": "e" * 64,
            "keyid": "f" * 64,
            "sequence": 12,
            "receivedOn": "2026-11-21T09:00:00Z",
        },
    }


def at(document: Any, path: str) -> tuple[Any, Any]:
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    for part in parents:
        document = document[part]
    return document, last


def changed(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    document = copy.deepcopy(document)
    parent, key = at(document, path)
    if value is ...:
        del parent[key]
    else:
        parent[key] = value
    return document


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("_type", "https://in-toto.io/Statement/v0.1"),
        ("_type", ...),
        ("statement_type", "https://in-toto.io/Statement/v1"),
        ("predicateType", "https://model_signing/signature/v1.0"),
        ("host", "gpu-7.hospital.example"),
        ("subject", []),
        ("subject/0/name", "../b.json"),
        ("subject/0/name", "b.json"),
        ("subject/0/digest", {"sha1": "1" * 40}),
        ("subject/0/digest/sha256", "1" * 63),
        ("predicate/buildDefinition/buildType", "https://fedcompose.dev/compose/v1"),
        ("predicate/buildDefinition/buildType", "https://fedcompose.dev/distill/v1"),
        ("predicate/buildDefinition/buildType", ...),
        ("predicate/buildDefinition/resolvedDependencies", []),
        ("predicate/buildDefinition/resolvedDependencies/0/name", "policy"),
        ("predicate/buildDefinition/resolvedDependencies/0/annotations/path", "/home/me"),
        (f"{PARAMETERS}/federation", "elsewhere"),
        (f"{PARAMETERS}/federation_version", 3),
        (f"{PARAMETERS}/sequence", 0),
        (f"{PARAMETERS}/sequence", True),
        (f"{PARAMETERS}/sequence", "12"),
        (f"{PARAMETERS}/sequence", 1 << 53),
        (f"{PARAMETERS}/site", "site-b"),
        (f"{PARAMETERS}/site", "\x1b[2Jsite-a"),
        (f"{PARAMETERS}/expires", "2026-11-21"),
        (f"{PARAMETERS}/expires", "2026-11-21T09:00:00+00:00"),
        (f"{PARAMETERS}/expires", 1763715600),
        (f"{PARAMETERS}/expires", ...),
        (f"{PARAMETERS}/call", {"id": "x", "nonce": "short"}),
        (f"{PARAMETERS}/lora", ...),
        (f"{RUN}/builder/id", "urn:fedcompose:site:site-b"),
        (f"{RUN}/builder/version", {"fedcompose": "/home/me"}),
        (f"{RUN}/metadata/hostname", "gpu-7"),
        (f"{RUN}/byproducts", []),
        (f"{RUN}/byproducts/0/content", "%%%"),
        (f"{RUN}/byproducts/0/content", base64.b64encode(b'{"n": "two hundred"}').decode()),
        (f"{RUN}/byproducts/0/content", base64.b64encode(b'{"Patient 7": 1}').decode()),
    ],
)
def test_refuses_statements_the_builders_do_not_write(path: str, value: Any) -> None:
    document = build_provenance(ADAPTER)
    assert parse_provenance(dump_json(document)) == ADAPTER
    assert refused(parse_provenance, changed(document, path, value)) == "PROVENANCE_INVALID"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("predicate/buildDefinition/resolvedDependencies/1/annotations", {"model": "tiny"}),
        ("predicate/buildDefinition/resolvedDependencies/1/annotations/keyid", ...),
        ("predicate/buildDefinition/resolvedDependencies/0/name", "site-b"),
        (f"{RUN}/builder/id", "urn:fedcompose:site:hub"),
        (f"{PARAMETERS}/site", "site-a"),
        (f"{PARAMETERS}/ledger", {"entries": 7}),
        (f"{PARAMETERS}/ledger", {"entries": -1, "head": "9" * 64}),
        (f"{PARAMETERS}/ledger/file", "ledger.jsonl"),
    ],
)
def test_refuses_release_statements_the_builder_does_not_write(path: str, value: Any) -> None:
    document = build_release_provenance(RELEASE)
    assert refused(parse_release_provenance, changed(document, path, value)) == "PROVENANCE_INVALID"


def test_the_two_kinds_are_never_taken_for_each_other() -> None:
    assert refused(parse_release_provenance, build_provenance(ADAPTER)) == "PROVENANCE_INVALID"
    assert refused(parse_provenance, build_release_provenance(RELEASE)) == "PROVENANCE_INVALID"


def test_metrics_stay_few_and_finite() -> None:
    many = {f"accuracy_with_a_long_name_{index}": 0.123456789 for index in range(32)}
    with pytest.raises(ValueError, match="1024 bytes"):
        build_provenance(ADAPTER.model_copy(update={"metrics": many}))
    with pytest.raises(ValueError, match="finite"):
        Provenance(**{**ADAPTER.model_dump(), "metrics": {"n": float("nan")}})


def test_an_adapter_cannot_be_described_without_its_lora() -> None:
    with pytest.raises(ValueError, match="lora"):
        build_provenance(ADAPTER.model_copy(update={"lora": None}))
