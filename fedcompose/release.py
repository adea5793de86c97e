"""Verify a release: what the coordinator composed, and for every expert in it, what its site signed.

Everything is checked offline, from the folder and a few root fingerprints, in this order:

1. The folder holds exactly the files of a release, each a regular file within its limit.
2. The roots that are trusted here signed the `federation.json` inside; it was valid when the release was made.
3. A coordinator of that federation signed exactly the other files, and each has the signed digest.
4. The provenance speaks of these files, this federation and one of its bases.
5. `composition.json` lists each ingredient exactly once, in the router's row order.
6. Each ingredient is, byte for byte, a contribution that its site's key signed, was valid when the
   coordinator received it, and was made for the same base. Experts that answer a call of one name answer one call.
7. Router and attention LoRA are well-formed; what they do is for an evaluation to say.
8. No root has withdrawn the release.

Trust that was granted is judged as of the time the release was made: an archive stays verifiable after keys and
federation files expire. Trust that was withdrawn since counts as far as this machine knows: a revocation names a time,
and what was signed at that time or later is refused. Whether it may still be used today is for `standing.py` to say. No
tensor library is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from fedcompose.adapter import CONFIG_FILE, MAX_WEIGHTS_BYTES, WEIGHTS_FILE
from fedcompose.composition import (
    ATTENTION_FOLDER,
    COMPOSITION_FILE,
    MAX_ROUTER_BYTES,
    ROUTER_FILE,
    ComposedExpert,
    Composition,
    parse_composition,
)
from fedcompose.contribution import (
    CLOCK_SKEW,
    OPTIONAL,
    REQUIRED,
    ReceivedContribution,
    VerifiedContribution,
    check_base,
    check_federation,
    check_listed,
    check_signed_adapter,
    check_subjects,
    read_unchanged,
    verify_contribution,
)
from fedcompose.document import format_time
from fedcompose.errors import RefusedError
from fedcompose.federation import Coordinator, Federation, Site
from fedcompose.federation_file import open_federation, verify_federation
from fedcompose.files import MAX_JSON_BYTES, dir_hash, parse_json
from fedcompose.folder import check_names, list_files, read_file
from fedcompose.provenance import (
    PROVENANCE_FILE,
    Ingredient,
    ReleaseProvenance,
    check_use,
)
from fedcompose.revocations import RevokedKey, with_revocations
from fedcompose.signing import SIGNATURE_FILE, SignedFiles, read_hint, verify_files
from fedcompose.statement import parse_release_provenance
from fedcompose.tensors import parse_safetensors
from fedcompose.trust_state import accepted_federation, accepted_revocations, remembered_federation

EVALUATION_FILE = "evaluation.json"
FEDERATION_FILE = "federation.json"
INGREDIENTS_FOLDER = "ingredients"

_INGREDIENT = re.compile(rf"{INGREDIENTS_FOLDER}/(?P<site>[a-z0-9][a-z0-9_-]{{0,62}})/(?P<file>[^/]+)")


@dataclass(frozen=True)
class ReceivedRelease:
    """A folder that claims to be a release. Nothing about it is known."""

    path: Path


@dataclass(frozen=True)
class VerifiedRelease:
    """A release that passed every check. Only `verify_release` makes one.

    `composition` and `evaluation` are the JSON documents; `experts` are the ingredients in router row order.
    `federation` is the version in the release, with what this machine knows to be revoked since.
    """

    path: Path
    composition: Mapping[str, Any]
    experts: tuple[VerifiedContribution, ...]
    federation: Federation
    provenance: ReleaseProvenance
    evaluation: Mapping[str, Any] | None
    keyid: str
    dir_hash: str
    digests: Mapping[str, str]

    def read(self, name: str) -> bytes:
        """The bytes of a signed file, still those that were verified.

        Raises: RefusedError: `FILE_CHANGED` if the folder was altered since.
        """
        return read_unchanged(self.path, name, _limit(name), self.digests[name])


def verify_release(
    received: ReceivedRelease,
    root_fingerprints: Collection[str] | None = None,
    now: datetime | None = None,
    without: Collection[str] = (),
) -> VerifiedRelease:
    """Check a release in full, in the order above. `now` is this machine's clock unless given.

    Without fingerprints the versions of the federation file that this machine accepted decide, and their roots.
    Nothing is remembered. The experts of the sites in `without` will not be used: they must be what their sites signed,
    and what was revoked of these sites since does not matter.

    Raises: RefusedError: with the code of the first check that failed.
    """
    folder, now = received.path, now or datetime.now(UTC)
    names = list_files(folder)  # 1
    sites = _check_folder(names)
    granted, provenance = _trusted(folder, root_fingerprints, now)  # 2
    federation = with_known_revocations(granted)
    signed = _verify_signature(folder, names, federation, provenance)  # 3
    files = _read_signed(folder, signed)
    if parse_release_provenance(files[PROVENANCE_FILE]) != provenance:  # 4
        raise RefusedError("FILE_CHANGED", f"{PROVENANCE_FILE} changed while it was read")
    check_subjects(provenance.subjects, signed.digests)
    check_federation(provenance.federation, provenance.federation_version, federation)
    check_base(provenance.base, federation)
    composition = parse_composition(files[COMPOSITION_FILE])  # 5
    _check_composition(composition, provenance, sites)
    experts = tuple(  # 6
        _verify_ingredient(folder, expert, entry, provenance, granted if expert.site in without else federation, signed)
        for expert, entry in zip(composition.experts, provenance.ingredients, strict=True)
    )
    _check_calls(experts)
    _check_parts(folder, composition, files, signed)  # 7
    digest = dir_hash(signed.digests)
    accepted_revocations(federation.id).check_release(digest)  # 8
    return VerifiedRelease(
        path=folder,
        composition=parse_json(files[COMPOSITION_FILE], COMPOSITION_FILE),
        experts=experts,
        federation=federation,
        provenance=provenance,
        evaluation=_evaluation(files.get(EVALUATION_FILE)),
        keyid=signed.keyid,
        dir_hash=digest,
        digests=signed.digests,
    )


def required_files(sites: Collection[str], attention: bool) -> dict[str, int]:
    """Names and size limits of what a release of these sites must hold."""
    limits = {name: _limit(name) for name in (COMPOSITION_FILE, ROUTER_FILE, FEDERATION_FILE)}
    limits |= {PROVENANCE_FILE: MAX_JSON_BYTES, SIGNATURE_FILE: MAX_JSON_BYTES}
    if attention:
        limits |= {f"{ATTENTION_FOLDER}/{name}": _limit(name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    for site in sites:
        limits |= {f"{INGREDIENTS_FOLDER}/{site}/{name}": size for name, size in REQUIRED["adapter"].items()}
    return limits


def _limit(name: str) -> int:
    file = name.rpartition("/")[2]
    sizes = {WEIGHTS_FILE: MAX_WEIGHTS_BYTES, ROUTER_FILE: MAX_ROUTER_BYTES}
    return sizes.get(file, MAX_JSON_BYTES)


def _check_folder(names: Mapping[str, int]) -> set[str]:
    """The sites whose folders lie in `ingredients/`; every file belongs to a release of these."""
    sites = {match["site"] for name in names if (match := _INGREDIENT.fullmatch(name))}
    optional = {EVALUATION_FILE: MAX_JSON_BYTES}
    for site in sites:
        optional |= {f"{INGREDIENTS_FOLDER}/{site}/{name}": size for name, size in OPTIONAL["adapter"].items()}
    attention = any(name.startswith(f"{ATTENTION_FOLDER}/") for name in names)
    check_names(names, required_files(sites, attention), optional)
    return sites


def _trusted(folder: Path, fingerprints: Collection[str] | None, now: datetime) -> tuple[Federation, ReleaseProvenance]:
    """The federation file as it is in the release, believed as of the release's own date, which is a claim until the
    signature is checked. What was revoked since is not applied yet."""
    provenance = parse_release_provenance(read_file(folder, PROVENANCE_FILE, MAX_JSON_BYTES))
    made = provenance.finished
    if made > now + CLOCK_SKEW:
        raise RefusedError(
            "RELEASE_FROM_FUTURE",
            "the release claims to be made later than now",
            got=format_time(made),
            expected=f"before {format_time(now)}",
            fix="check this machine's clock",
        )
    envelope = read_file(folder, FEDERATION_FILE, MAX_JSON_BYTES)
    if fingerprints:
        verify_federation(envelope, root_fingerprints=fingerprints, now=made)
    else:
        remembered_federation(envelope, made)
    federation = open_federation(envelope).federation
    if made < federation.issued:
        raise RefusedError("FEDERATION_OLD", "the release is older than the federation file in it")
    return federation, provenance


def with_known_revocations(federation: Federation) -> Federation:
    """The federation, with the keys revoked that a later version or a revocation list accepted here revokes."""
    listed = accepted_revocations(federation.id)
    today = accepted_federation(federation.id)
    members: list[Coordinator | Site] = [*today.coordinators, *today.sites] if today else []
    since = [RevokedKey(keyid=key.keyid, **dict(key.revoked)) for each in members for key in each.keys if key.revoked]
    return with_revocations(with_revocations(federation, listed), listed.model_copy(update={"keys": tuple(since)}))


def _verify_signature(
    folder: Path, names: Mapping[str, int], federation: Federation, claims: ReleaseProvenance
) -> SignedFiles:
    bundle = read_file(folder, SIGNATURE_FILE, MAX_JSON_BYTES)
    coordinator, key = federation.coordinator_key(read_hint(bundle), claims.finished)
    signed = verify_files(bundle, key.public_key.encode())
    check_coordinator(coordinator.id, claims)
    check_listed(signed, names)
    return signed


def check_coordinator(signer: str, claims: ReleaseProvenance) -> None:
    if signer != claims.coordinator:
        raise RefusedError(
            "COORDINATOR_MISMATCH",
            "the release claims another coordinator than its signer",
            expected=signer,
            got=claims.coordinator,
        )


def _read_signed(folder: Path, signed: SignedFiles) -> dict[str, bytes]:
    """Compare every file with its signed digest, adapters' weights where they are parsed; keep our own for parsing."""
    kept: dict[str, bytes] = {}
    for name, digest in signed.digests.items():
        if name.endswith(f"/{WEIGHTS_FILE}"):
            continue
        data = read_unchanged(folder, name, _limit(name), digest)
        if not name.startswith(f"{INGREDIENTS_FOLDER}/"):
            kept[name] = data
    return kept


def _check_composition(composition: Composition, claims: ReleaseProvenance, sites: set[str]) -> None:
    """Composition, provenance and folder name the same experts, each once, in one order."""
    composed = [expert.site for expert in composition.experts]
    if len(set(composed)) != len(composed) or set(composed) != sites:
        raise RefusedError(
            "COMPOSITION_EXPERTS",
            "the composition does not list each ingredient exactly once",
            expected=", ".join(sorted(sites)),
            got=", ".join(composed),
        )
    if sites & set(composition.masked):
        raise RefusedError("COMPOSITION_EXPERTS", "the composition masks an expert that is in it")
    claimed = [(entry.site, entry.dir_hash) for entry in claims.ingredients]
    if claimed != [(expert.site, expert.dir_hash) for expert in composition.experts]:
        raise RefusedError("COMPOSITION_EXPERTS", "the provenance names other experts than the composition")
    base = (composition.base.name, composition.base.dir_hash)
    if base != (claims.base.name, claims.base.dir_hash) or composition.method != claims.method:
        raise RefusedError("COMPOSITION_MISMATCH", "the provenance names another base or method")


def _verify_ingredient(
    folder: Path,
    expert: ComposedExpert,
    entry: Ingredient,
    claims: ReleaseProvenance,
    federation: Federation,
    signed: SignedFiles,
) -> VerifiedContribution:
    """The site's own contribution, verified as when the coordinator received it."""
    if entry.received_on > claims.finished:
        raise RefusedError("INGREDIENT_TIME", f"the expert of {entry.site} was received after the release")
    path = folder / INGREDIENTS_FOLDER / entry.site
    found = verify_contribution(ReceivedContribution(path), federation, now=entry.received_on)
    prefix = f"{INGREDIENTS_FOLDER}/{entry.site}/"
    listed = {name.removeprefix(prefix): digest for name, digest in signed.digests.items() if name.startswith(prefix)}
    check_use(found.provenance.use, claims.coordinator, claims.finished)
    facts = {
        "kind": (found.kind, "adapter"),
        "site": (found.site, entry.site),
        "domain": (found.domain, expert.domain),
        "digest": (found.dir_hash, entry.dir_hash),
        "signed statement": (found.payload_sha256, entry.payload_sha256),
        "key": (found.keyid, entry.keyid),
        "sequence": (found.provenance.sequence, entry.sequence),
        "base": (found.provenance.base.dir_hash, claims.base.dir_hash),
        "files": ({**found.digests, SIGNATURE_FILE: listed.get(SIGNATURE_FILE)}, listed),
    }
    for fact, (is_, claimed) in facts.items():
        if is_ != claimed:
            raise RefusedError(
                "INGREDIENT_MISMATCH", f"the expert of {entry.site} has another {fact} than the release says"
            )
    return found


def _check_calls(experts: Collection[VerifiedContribution]) -> None:
    """A coordinator that tells sites different things under one name is found out when their answers meet."""
    told: dict[str, str] = {}
    for expert in experts:
        call = expert.provenance.call
        if call is not None and told.setdefault(call.id, call.sha256) != call.sha256:
            raise RefusedError(
                "INGREDIENT_CALL",
                f"the experts in this release answer two different calls, both named {call.id!a}",
                expected=f"the call with SHA-256 {told[call.id]}",
                got=f"{call.sha256}, in what site {expert.site} signed",
                fix="do not use it; ask the coordinator why it told its sites different things",
            )


def _check_parts(folder: Path, composition: Composition, files: Mapping[str, bytes], signed: SignedFiles) -> None:
    """What the coordinator trained: one router row per expert, and the attention LoRA that was announced."""
    tensors = parse_safetensors(files[ROUTER_FILE])
    rows = len(composition.experts)
    for tensor in tensors.values():
        if tensor.shape[0] != rows or not np.isfinite(tensor.float32()).all():
            raise RefusedError("ROUTER_INVALID", "the router does not have one finite row per expert")
    prefix = f"{ATTENTION_FOLDER}/"
    announced = files.get(prefix + CONFIG_FILE)
    if (composition.attention is None) != (announced is None):
        raise RefusedError("COMPOSITION_MISMATCH", "the composition and the folder disagree about attention")
    if composition.attention is not None and announced is not None:
        config = check_signed_adapter(folder, prefix, announced, signed.digests, None)
        if (config.r, config.lora_alpha) != (composition.attention.r, composition.attention.alpha):
            raise RefusedError("COMPOSITION_MISMATCH", "the attention LoRA has another rank or alpha")


def _evaluation(data: bytes | None) -> Mapping[str, Any] | None:
    if data is None:
        return None
    document = parse_json(data, EVALUATION_FILE)
    if not isinstance(document, dict):
        raise RefusedError("EVALUATION_INVALID", f"{EVALUATION_FILE} is not a JSON object")
    return document
