"""Step 10: put the candidate and the sites' own signed folders together, state what is in it, and sign it.

Input: `candidate/` (composition, router, attention LoRA), the admitted contributions it was composed from, the
federation file and, if there is one, `evaluation.json` with the candidate's numbers. Output: `release/`, which appears
only after it was verified as anybody will verify it, and written down in the ledger, whose head before that is in its
provenance.
The sites' folders go in byte for byte, with their own signatures; traces do not go in.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from fedcompose.adapter import CONFIG_FILE, MAX_WEIGHTS_BYTES, WEIGHTS_FILE
from fedcompose.composition import (
    ATTENTION_FOLDER,
    COMPOSITION_FILE,
    MAX_ROUTER_BYTES,
    ROUTER_FILE,
    Composition,
    parse_composition,
)
from fedcompose.contribution import OPTIONAL, REQUIRED, VerifiedContribution
from fedcompose.document import format_time
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.federation import Federation
from fedcompose.federation_file import read_federation
from fedcompose.files import (
    MAX_JSON_BYTES,
    dir_hash,
    folder_digests,
    new_folder,
    read_json,
    read_limited,
    write_atomic,
    write_json,
)
from fedcompose.folder import copy_file
from fedcompose.ledger import Head
from fedcompose.provenance import (
    PROVENANCE_FILE,
    BaseReference,
    Ingredient,
    ReleaseProvenance,
    installed_versions,
)
from fedcompose.release import (
    EVALUATION_FILE,
    FEDERATION_FILE,
    INGREDIENTS_FOLDER,
    ReceivedRelease,
    VerifiedRelease,
    verify_release,
)
from fedcompose.revocations import with_revocations
from fedcompose.signing import SIGNATURE_FILE, Signer, sign_files
from fedcompose.statement import build_release_provenance
from fedcompose.trust_state import accepted_revocations
from fedcompose_coordinator.decisions import deciding
from fedcompose_coordinator.evaluation import make_parts

RELEASE = "release"


def release(
    home: Path,
    signer: Signer,
    federation: Federation,
    candidate: Path,
    contributions: Sequence[VerifiedContribution],
    now: datetime,
) -> VerifiedRelease:
    """Write and sign `release/` in the coordinator's folder; an older one is replaced.

    `federation` is the content of `federation.json` in that folder, and of the revocation list that this machine
    has accepted. Of `contributions` those are taken that the candidate was composed from.

    The same inputs at the same time, with the ledger at the same entry, give the same bytes.

    Raises: ConfigError: `FEDERATION_DIFFERS`, `CANDIDATE_NO_ROUTER`, `CANDIDATE_CHANGED`, `INGREDIENT_MISSING`,
            `EVALUATION_OTHER`.
        RefusedError: whatever `verify_release` refuses, and what is wrong with this coordinator's own clock or ledger,
        as `deciding`.
    """
    envelope = read_limited(home / FEDERATION_FILE, MAX_JSON_BYTES)
    stated, roots = read_federation(envelope)
    if with_revocations(stated, accepted_revocations(stated.id)) != federation:
        raise ConfigError("FEDERATION_DIFFERS", f"{home / FEDERATION_FILE} is not the federation file in use")
    coordinator, _ = federation.coordinator_key(signer.keyid, now)
    _check_releasable(candidate)
    composition = parse_composition(read_limited(candidate / COMPOSITION_FILE, MAX_JSON_BYTES))
    ingredients = _ingredients(composition, contributions)
    target = home / RELEASE
    with deciding(home, now) as decisions, new_folder(target) as folder:
        _copy_candidate(candidate, folder, composition)
        if (home / EVALUATION_FILE).is_file():
            _copy(home, folder, EVALUATION_FILE, MAX_JSON_BYTES)
            _check_measured(folder / EVALUATION_FILE, candidate)
        write_atomic(folder / FEDERATION_FILE, envelope)
        for contribution in ingredients:
            _copy_ingredient(contribution, folder / INGREDIENTS_FOLDER / contribution.site)
        claims = _claims(folder, federation, coordinator.id, composition, ingredients, decisions.head, now)
        write_json(folder / PROVENANCE_FILE, build_release_provenance(claims))
        write_atomic(folder / SIGNATURE_FILE, sign_files(RELEASE, folder_digests(folder), signer))
        found = verify_release(ReceivedRelease(folder), roots, now)
        decisions.record(
            "released", release=found.dir_hash, composition=found.digests[COMPOSITION_FILE],
            experts=[each.dir_hash for each in ingredients],
        )  # fmt: skip
    experts = (replace(expert, path=target / INGREDIENTS_FOLDER / expert.site) for expert in found.experts)
    return replace(found, path=target, experts=tuple(experts))


def _check_releasable(candidate: Path) -> None:
    """A release shows who speaks, and holds experts as they were signed; other candidates stay at home."""
    composition = read_json(candidate / COMPOSITION_FILE)
    if composition.get("router") is None:
        raise ConfigError(
            "CANDIDATE_NO_ROUTER",
            f"a candidate made by {composition.get('method')} has no router, and is only for measuring",
            fix="compose with another method",
        )
    if composition.get("changed"):
        raise ConfigError(
            "CANDIDATE_CHANGED",
            "the candidate holds trained copies of the experts, which no site has signed; it is only for measuring",
            fix="compose without expert_steps",
        )


def _check_measured(evaluation: Path, candidate: Path) -> None:
    """The numbers are of these weights: an evaluation names all that it measured by digest."""
    document = read_json(evaluation)
    digests = document.get("digests") if isinstance(document, dict) else None
    measured = digests.get("composed") if isinstance(digests, dict) else None
    expected = make_parts(candidate, ()).composed(candidate).digest
    if measured != expected:
        raise ConfigError(
            "EVALUATION_OTHER",
            f"{EVALUATION_FILE} was measured with another candidate than this one",
            expected=f"numbers of the weights {expected}",
            got=f"{ascii(measured)[:70] if measured else 'none'}",
            fix=f"fedcompose coordinator evaluate; or release without numbers: remove {EVALUATION_FILE}",
        )


def _ingredients(composition: Composition, contributions: Sequence[VerifiedContribution]) -> list[VerifiedContribution]:
    """The contributions that the candidate names, in the order of the router's rows."""
    known = {contribution.dir_hash: contribution for contribution in contributions}
    missing = [expert.site for expert in composition.experts if expert.dir_hash not in known]
    if missing:
        raise ConfigError(
            "INGREDIENT_MISSING",
            f"the candidate was composed from a contribution of {missing[0]} that is not in the store",
            fix="compose again: fedcompose coordinator compose",
        )
    return [known[expert.dir_hash] for expert in composition.experts]


def _copy_candidate(candidate: Path, folder: Path, composition: Composition) -> None:
    _copy(candidate, folder, COMPOSITION_FILE, MAX_JSON_BYTES)
    _copy(candidate, folder, ROUTER_FILE, MAX_ROUTER_BYTES)
    if composition.attention is not None:
        _copy(candidate, folder, f"{ATTENTION_FOLDER}/{CONFIG_FILE}", MAX_JSON_BYTES)
        _copy(candidate, folder, f"{ATTENTION_FOLDER}/{WEIGHTS_FILE}", MAX_WEIGHTS_BYTES)


def _copy_ingredient(contribution: VerifiedContribution, target: Path) -> None:
    """A site's folder, byte for byte, still the one that was admitted."""
    target.mkdir(parents=True)
    limits = {**REQUIRED["adapter"], **OPTIONAL["adapter"]}
    for name, digest in contribution.digests.items():
        if copy_file(contribution.path, name, limits[name], target / name, 0o644) != digest:
            raise RefusedError("FILE_CHANGED", f"{contribution.path / name} is not what was admitted")
    copy_file(contribution.path, SIGNATURE_FILE, limits[SIGNATURE_FILE], target / SIGNATURE_FILE, 0o644)


def _copy(source: Path, folder: Path, name: str, max_bytes: int) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    copy_file(source, name, max_bytes, folder / name, 0o644)


def _claims(
    folder: Path,
    federation: Federation,
    coordinator: str,
    composition: Composition,
    ingredients: Sequence[VerifiedContribution],
    ledger: Head,
    now: datetime,
) -> ReleaseProvenance:
    subjects = folder_digests(folder)
    return ReleaseProvenance(
        federation=federation.id,
        federation_version=federation.version,
        coordinator=coordinator,
        method=composition.method,
        ledger=ledger,
        base=BaseReference(name=composition.base.name, dir_hash=composition.base.dir_hash),
        ingredients=tuple(
            Ingredient(
                site=each.site,
                dir_hash=each.dir_hash,
                payload_sha256=each.payload_sha256,
                keyid=each.keyid,
                sequence=each.provenance.sequence,
                received_on=each.received_on,
            )
            for each in ingredients
        ),
        subjects=subjects,
        invocation=f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, format_time(now) + dir_hash(subjects))}",
        finished=now,
        versions=installed_versions(),
    )
