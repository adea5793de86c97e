"""Verify what a site signed and shipped: an adapter or a set of traces. It raises or admits.

Input: a folder that anybody may have written, and a federation file that is already believed. Output: a
`VerifiedContribution`, the only thing that composing accepts. The order of the checks is fixed:

1. The folder holds exactly the files of its kind, each a regular file within its limit.
2. `model.sig` has the one accepted shape; its hint names a key of an active site that counts at this time.
3. The signature holds over the statement, and the statement lists exactly the folder's other files.
4. Every file is read once; its bytes have the signed digest, and these same bytes are parsed. (Weights are
   hashed and checked piece by piece, in 6; if their digest is wrong, that is what counts.)
5. The provenance speaks of these files, this federation, the signer's own site and domain, a base of the
   federation, has not expired and does not come from the future; the site's own limits hold.
6. The adapter with its gates, or every trace, is acceptable.

Nothing is written, no tensor library is loaded, and large weights take no more memory than small ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from fedcompose.adapter import CONFIG_FILE, MAX_WEIGHTS_BYTES, WEIGHTS_FILE, AdapterConfig, check_adapter
from fedcompose.document import format_time
from fedcompose.errors import RefusedError
from fedcompose.federation import Federation, Site
from fedcompose.files import MAX_JSON_BYTES, dir_hash, sha256_hex
from fedcompose.folder import HashedFile, Limits, check_names, list_files, open_hashed, read_file
from fedcompose.gates import GATES_FILE, MAX_GATES_BYTES, read_gates
from fedcompose.provenance import (
    PROVENANCE_FILE,
    BaseReference,
    Provenance,
    check_limits,
    check_use,
)
from fedcompose.signing import SIGNATURE_FILE, SignedFiles, read_hint, verify_files
from fedcompose.statement import parse_provenance
from fedcompose.traces import MAX_TRACES_BYTES, PRIVATE_CLASSES, TRACES_FILE, Trace, decode

Kind = Literal["adapter", "traces"]
KINDS: tuple[Kind, ...] = ("adapter", "traces")

README_FILE = "README.md"
MAX_README_BYTES = 64 << 10
REQUIRED: Mapping[Kind, Limits] = {
    "adapter": {
        CONFIG_FILE: MAX_JSON_BYTES,
        WEIGHTS_FILE: MAX_WEIGHTS_BYTES,
        PROVENANCE_FILE: MAX_JSON_BYTES,
        SIGNATURE_FILE: MAX_JSON_BYTES,
    },
    "traces": {
        TRACES_FILE: MAX_TRACES_BYTES,
        PROVENANCE_FILE: MAX_JSON_BYTES,
        SIGNATURE_FILE: MAX_JSON_BYTES,
    },
}
OPTIONAL: Mapping[Kind, Limits] = {
    "adapter": {README_FILE: MAX_README_BYTES, GATES_FILE: MAX_GATES_BYTES},
    "traces": {},
}
CLOCK_SKEW = timedelta(minutes=5)  # how far a signer's clock may be ahead of ours


@dataclass(frozen=True)
class ReceivedContribution:
    """A folder that claims to be a contribution. Nothing about it is known."""

    path: Path


@dataclass(frozen=True)
class VerifiedContribution:
    """A contribution that passed every check at `received_on`. Only `verify_contribution` makes one."""

    path: Path
    kind: Kind
    site: str
    domain: str
    dir_hash: str
    keyid: str
    payload_sha256: str
    provenance: Provenance
    digests: Mapping[str, str]
    received_on: datetime

    def read(self, name: str) -> bytes:
        """The bytes of a signed file, still those that were verified.

        Raises: RefusedError: `FILE_CHANGED` if the folder was altered since.
        """
        limits = {**REQUIRED[self.kind], **OPTIONAL[self.kind]}
        return read_unchanged(self.path, name, limits[name], self.digests[name])

    def traces(self) -> list[Trace]:
        """The traces of a trace contribution."""
        return decode(self.read(TRACES_FILE))


def verify_contribution(
    received: ReceivedContribution,
    federation: Federation,
    *,
    now: datetime,
    base_shapes: Mapping[str, tuple[int, int]] | None = None,
) -> VerifiedContribution:
    """Check a contribution in full, in the order above.

    `base_shapes` are the linear layers of the federation's base; without them (only for looking at a
    contribution on a machine that has no base) an adapter is checked against its own configuration alone.

    Raises: RefusedError: with the code of the first check that failed.
    """
    folder = received.path
    names = list_files(folder)  # 1
    kind = kind_of(names)
    check_names(names, REQUIRED[kind], OPTIONAL[kind])
    site, signed = _verify_signature(folder, federation, now)  # 2, 3
    check_listed(signed, names)
    files = _read_signed(folder, kind, signed)  # 4
    provenance = parse_provenance(files[PROVENANCE_FILE])  # 5
    check_subjects(provenance.subjects, signed.digests)
    check_claims(provenance, kind, site, federation, now)
    check_limits(provenance.dp, provenance.audit, provenance.limits)
    if kind == "adapter":  # 6
        config = check_signed_adapter(folder, "", files[CONFIG_FILE], signed.digests, base_shapes)
        _check_summary(provenance, config)
        _check_gates(provenance, files.get(GATES_FILE), config, base_shapes)
    else:
        _check_traces(provenance, decode(files[TRACES_FILE]))
    return VerifiedContribution(
        path=folder,
        kind=kind,
        site=site.id,
        domain=site.domain,
        dir_hash=dir_hash(signed.digests),
        keyid=signed.keyid,
        payload_sha256=signed.payload_sha256,
        provenance=provenance,
        digests=signed.digests,
        received_on=now,
    )


def kind_of(names: Mapping[str, int]) -> Kind:
    """Which kind of contribution a folder wants to be, by its one telling file.

    Raises: RefusedError: `CONTRIBUTION_UNKNOWN`.
    """
    if TRACES_FILE in names:
        return "traces"
    if CONFIG_FILE in names or WEIGHTS_FILE in names:
        return "adapter"
    raise RefusedError(
        "CONTRIBUTION_UNKNOWN",
        "the folder is not a contribution",
        expected=f"{CONFIG_FILE} and {WEIGHTS_FILE}, or {TRACES_FILE}",
        fix="name the folder in which these files lie",
    )


def check_listed(signed: SignedFiles, names: Mapping[str, int]) -> None:
    """The signature covers every file but itself, and no file that is not there.

    Raises: RefusedError: `FILE_UNSIGNED`, `FILE_MISSING`.
    """
    found = names.keys() - {SIGNATURE_FILE}
    if unsigned := sorted(found - signed.digests.keys()):
        raise RefusedError("FILE_UNSIGNED", f"the signature does not cover {unsigned[0][:128]!a}")
    if missing := sorted(signed.digests.keys() - found):
        raise RefusedError("FILE_MISSING", f"{missing[0][:128]!a} was signed but is not there")


def check_subjects(subjects: Mapping[str, str], digests: Mapping[str, str]) -> None:
    """The provenance speaks of exactly the signed files, itself left out.

    Raises: RefusedError: `PROVENANCE_SUBJECTS`.
    """
    if subjects != {name: digest for name, digest in digests.items() if name != PROVENANCE_FILE}:
        raise RefusedError("PROVENANCE_SUBJECTS", "the provenance was written for other files than these")


def check_claims(claims: Provenance, kind: Kind, site: Site, federation: Federation, now: datetime) -> None:
    """The signer may say this: its own site and domain, this federation, one of its bases, now.

    Raises: RefusedError: `PROVENANCE_KIND`, `FEDERATION_MISMATCH`, `SITE_MISMATCH`, `DOMAIN_MISMATCH`,
        `NOT_PERMITTED`, `BASE_MISMATCH`, `CONTRIBUTION_EXPIRED`, `CONTRIBUTION_FROM_FUTURE`, `USE_EXPIRED`.
    """
    _same("PROVENANCE_KIND", "the provenance is of another kind than the folder", kind, claims.kind)
    check_federation(claims.federation, claims.federation_version, federation)
    if claims.site != site.id:
        raise RefusedError(
            "SITE_MISMATCH",
            f"the key of site {site.id} signed what claims to come from site {claims.site}",
            expected=f"a contribution of site {site.id}",
            got=f"one of site {claims.site}",
            fix="ask both sites, by phone or in person, who made it",
        )
    _same("DOMAIN_MISMATCH", f"site {site.id} is enrolled for another domain", site.domain, claims.domain)
    if kind not in site.may:
        raise RefusedError("NOT_PERMITTED", f"site {site.id} may not contribute {kind}", expected=", ".join(site.may))
    check_base(claims.base, federation)
    if now >= claims.expires:
        raise RefusedError(
            "CONTRIBUTION_EXPIRED",
            "the contribution was to be received earlier",
            expected=f"before {format_time(claims.expires)}",
            got=format_time(now),
            fix="ask the site to contribute again, or check this machine's clock",
        )
    check_use(claims.use, None, now)
    if claims.finished > now + CLOCK_SKEW:
        raise RefusedError(
            "CONTRIBUTION_FROM_FUTURE",
            "the contribution claims to be made later than it was received",
            expected=f"before {format_time(now)}",
            got=format_time(claims.finished),
            fix="check this machine's clock and the site's",
        )


def check_federation(claimed: str, version: int, federation: Federation) -> None:
    """Raises: RefusedError: `FEDERATION_MISMATCH`, `FEDERATION_OLD`."""
    if claimed != federation.id:
        raise RefusedError(
            "FEDERATION_MISMATCH",
            f"this was signed for another federation than {federation.name!a}",
            expected=federation.id,
            got=claimed,
            fix="ask the sender which federation it is for, and check it by that one's federation file",
        )
    if version > federation.version:
        raise RefusedError(
            "FEDERATION_OLD",
            "this was signed under a newer federation file than the one here",
            expected=f"version {federation.version} or older",
            got=f"version {version}",
            fix="get the current federation file",
        )


def check_base(claimed: BaseReference, federation: Federation) -> None:
    """Raises: RefusedError: `BASE_MISMATCH`."""
    if (claimed.name, claimed.dir_hash) not in {(base.name, base.dir_hash) for base in federation.base_models}:
        raise RefusedError(
            "BASE_MISMATCH",
            "this was made for a base that the federation does not use",
            expected=" or ".join(f"{base.name!a} ({base.dir_hash})" for base in federation.base_models),
            got=f"{claimed.name!a} ({claimed.dir_hash})",
        )


def read_unchanged(folder: Path, name: str, max_bytes: int, digest: str) -> bytes:
    """The bytes of a file that must have this SHA-256.

    Raises: RefusedError: `FILE_CHANGED`, and all that `folder.read_file` raises.
    """
    data = read_file(folder, name, max_bytes)
    if sha256_hex(data) != digest:
        raise _changed(name)
    return data


@contextmanager
def open_unchanged(folder: Path, name: str, max_bytes: int, digest: str) -> Iterator[HashedFile]:
    """A file that must have this SHA-256, for reading in pieces.

    Raises: RefusedError: when the block ends, `FILE_CHANGED` if it has not, in place of whatever the block raised.
    """
    with open_hashed(folder, name, max_bytes) as file:
        try:
            yield file
        finally:
            if file.digest() != digest:
                raise _changed(name)


def check_signed_adapter(
    folder: Path,
    prefix: str,
    config: bytes,
    digests: Mapping[str, str],
    base_shapes: Mapping[str, tuple[int, int]] | None,
) -> AdapterConfig:
    """Check a LoRA below `prefix` of a signed folder, whose configuration was read and compared already.

    Raises: RefusedError: `FILE_CHANGED`, and all that `adapter.check_adapter` raises.
    """
    name = prefix + WEIGHTS_FILE
    with open_unchanged(folder, name, MAX_WEIGHTS_BYTES, digests[name]) as weights:
        return check_adapter(config, weights, weights.size, base_shapes)


def _changed(name: str) -> RefusedError:
    return RefusedError("FILE_CHANGED", f"{name} is not the file that was signed")


def _verify_signature(folder: Path, federation: Federation, now: datetime) -> tuple[Site, SignedFiles]:
    bundle = read_file(folder, SIGNATURE_FILE, MAX_JSON_BYTES)
    site, key = federation.site_key(read_hint(bundle), now)
    return site, verify_files(bundle, key.public_key.encode())


def _read_signed(folder: Path, kind: Kind, signed: SignedFiles) -> dict[str, bytes]:
    """Every file but the weights, which need not fit into memory."""
    limits = {**REQUIRED[kind], **OPTIONAL[kind]}
    small = {name: digest for name, digest in signed.digests.items() if name != WEIGHTS_FILE}
    return {name: read_unchanged(folder, name, limits[name], digest) for name, digest in small.items()}


def _check_summary(claims: Provenance, config: AdapterConfig) -> None:
    claimed = claims.lora and (claims.lora.r, claims.lora.alpha, set(claims.lora.targets))
    if claimed != (config.r, config.lora_alpha, set(config.target_modules)):
        raise RefusedError("PROVENANCE_CONTENT", "the provenance describes another LoRA than this one")


def _check_gates(
    claims: Provenance,
    gates: bytes | None,
    config: AdapterConfig,
    base_shapes: Mapping[str, tuple[int, int]] | None,
) -> None:
    """Gates fit the expert; and they come without differential privacy, so beside an expert that has it they are none.

    Raises: RefusedError: `GATES_NOT_PRIVATE`, `GATES_INVALID`, `SAFETENSORS_INVALID`.
    """
    if gates is None:
        return
    if claims.dp is not None:
        raise RefusedError("GATES_NOT_PRIVATE", "the expert claims differential privacy, which its gates do not have")
    read_gates(gates, config, base_shapes)


def _check_traces(claims: Provenance, traces: list[Trace]) -> None:
    counts: dict[str, int] = {}
    for trace in traces:
        counts[trace.provenance_class] = counts.get(trace.provenance_class, 0) + 1
    if claims.traces is None or counts != claims.traces.classes:
        raise RefusedError("PROVENANCE_CONTENT", "the provenance counts other traces than these")
    if "A" in counts:
        raise RefusedError("TRACES_CLASS", "traces of class A are sampled by a coordinator, not by a site")
    if counts.keys() & PRIVATE_CLASSES and not claims.traces.declared_non_private:
        raise RefusedError(
            "TRACES_CLASS",
            "the traces come from private questions",
            expected="classes B, C or D, or data that its owner declared non-private",
            got=", ".join(sorted(counts)),
        )


def _same(code: str, what: str, expected: str, got: str) -> None:
    if expected != got:
        raise RefusedError(code, what, expected=expected, got=got)
