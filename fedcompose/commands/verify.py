"""`fedcompose verify` and `fedcompose inspect`: check a folder somebody signed, and say what it is.

Neither loads a tensor library, so that a machine with nothing but this distribution can check a release.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from fedcompose.bases import Base, base_shapes, resolve_base
from fedcompose.commands.inspect import Facts, aligned, contribution_facts, release_facts, show, unverified_facts
from fedcompose.console import AsJson, err, out, print_json
from fedcompose.contribution import KINDS, ReceivedContribution, VerifiedContribution, verify_contribution
from fedcompose.errors import ConfigError, MissingError, RefusedError
from fedcompose.federation import Federation, format_time, trusted_federation
from fedcompose.files import MAX_JSON_BYTES, read_limited
from fedcompose.release import COMPOSITION_FILE, ReceivedRelease, VerifiedRelease, verify_release

Verified: TypeAlias = VerifiedRelease | VerifiedContribution
Row: TypeAlias = tuple[str, str, str]  # what was checked, who or what it is, details

DEFAULT_FEDERATION = Path("federation.json")
SHORT = 12  # characters of a digest on a terminal; `--json` has them whole

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A release, a contribution, or an outbox.")]
Roots = Annotated[
    list[str] | None,
    typer.Option(metavar="KEYID", help="A root's fingerprint, got from its owner. Repeatable."),
]
File = Annotated[
    Path | None,
    typer.Option("--federation", help="The federation file; for a contribution ./federation.json is the default."),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    app.command()(verify)
    app.command()(inspect)


def verify(folder: Folder, root_fingerprint: Roots = None, federation: File = None, as_json: AsJson = False) -> None:
    """Check everything about a signed folder: exit 0, or 1 with the reason.

    Example: fedcompose verify release --root-fingerprint 9f1c...
    """
    found = _verified(folder, root_fingerprint, federation)
    if as_json:
        print_json({"verified": True, "folders": [_facts(each).as_dict() for each in found]})
        return
    for each in found:
        _print_checks(each)


def inspect(folder: Folder, root_fingerprint: Roots = None, federation: File = None, as_json: AsJson = False) -> None:
    """Say who made a signed folder, from what, its sizes, licences and numbers.

    Without a reason to trust its roots the content is shown as UNVERIFIED.

    Example: fedcompose inspect release
    """
    try:
        facts = [_facts(each) for each in _verified(folder, root_fingerprint, federation)]
    except (RefusedError, ConfigError) as error:
        if error.code not in ("TRUST_ROOT_UNKNOWN", "FEDERATION_MISSING") or root_fingerprint:
            raise
        facts = [unverified_facts(path) for path in _folders(folder)]
        err.print(error.diagnostics(), markup=False, style="yellow")
    if as_json:
        print_json({"folders": [each.as_dict() for each in facts]})
        return
    for each in facts:
        show(each)


def _verified(folder: Path, fingerprints: Collection[str] | None, federation_file: Path | None) -> list[Verified]:
    now = datetime.now(UTC)
    folders = _folders(folder)
    if is_release(folders[0]):
        if federation_file is not None:
            trusted_federation(read_limited(federation_file, MAX_JSON_BYTES), fingerprints, now)
        return [verify_release(ReceivedRelease(folders[0]), fingerprints, now)]
    trusted = trusted_federation(_federation_file(federation_file), fingerprints, now)
    base = _base_here(trusted)
    shapes = base_shapes(base) if base else None
    return [verify_contribution(ReceivedContribution(path), trusted, now=now, base_shapes=shapes) for path in folders]


def _folders(folder: Path) -> list[Path]:
    """The signed folders that a person means by `folder`: itself, or its `adapter/` and `traces/`."""
    folder = folder.resolve()
    inner = [folder / kind for kind in KINDS if (folder / kind).is_dir()]
    return inner or [folder]


def is_release(folder: Path) -> bool:
    return (folder / COMPOSITION_FILE).exists()


def _federation_file(given: Path | None) -> bytes:
    path = given or DEFAULT_FEDERATION
    if not path.is_file():
        raise ConfigError(
            "FEDERATION_MISSING",
            "a contribution is checked against its federation file, which is not here",
            got=str(path),
            fix="--federation FILE",
        )
    return read_limited(path, MAX_JSON_BYTES)


def _base_here(federation: Federation) -> Base | None:
    """The federation's base, if this machine has it: then an adapter's tensors are checked against it too."""
    for entry in federation.base_models:
        try:
            base = resolve_base(entry.name)
        except (MissingError, ConfigError):
            continue
        if base.digest == entry.dir_hash:
            return base
    return None


def _facts(found: Verified) -> Facts:
    return release_facts(found) if isinstance(found, VerifiedRelease) else contribution_facts(found)


def _print_checks(found: Verified) -> None:
    release = isinstance(found, VerifiedRelease)
    rows = _release_rows(found) if isinstance(found, VerifiedRelease) else _contribution_rows(found)
    out.print(f"{'Release' if release else 'Contribution'} {found.path}", markup=False)
    for line in aligned([(f"✓ {check}", who, details) for check, who, details in rows]):
        out.print(line, markup=False, style="green")
    out.print(f"Verified. dirHash {found.dir_hash}\n", markup=False)


def _release_rows(release: VerifiedRelease) -> Iterable[Row]:
    federation, claims = release.federation, release.provenance
    yield (
        "federation file",
        federation.name,
        f"version {federation.version}, signed by roots trusted here, valid on {format_time(claims.finished)}",
    )
    yield (
        "coordinator's signature",
        claims.coordinator,
        f"key {release.keyid[:SHORT]}, over {len(release.digests)} files, each as it was signed",
    )
    yield "base", claims.base.name, f"dirHash {claims.base.dir_hash[:SHORT]}, one of the federation's"
    for row, expert in enumerate(release.experts):
        yield (
            f"expert {row}",
            f"{expert.site} · {expert.domain}",
            f"site's signature, key {expert.keyid[:SHORT]}, received {format_time(expert.received_on)}, same base",
        )
    yield "router", f"{len(release.experts)} experts", "one row each, in this order"
    for site in release.composition.get("masked", ()):
        yield "masked", site, "its expert was there in training and is not here; the rest stayed as it was"


def _contribution_rows(found: VerifiedContribution) -> Iterable[Row]:
    claims = found.provenance
    yield "site's signature", f"{found.site} · {found.domain}", f"key {found.keyid[:SHORT]}, active and in its time"
    yield "files", f"{len(found.digests)} signed files", "each with the signed digest, and no others"
    yield (
        "provenance",
        f"sequence {claims.sequence}",
        f"this federation, own site and domain, to be received before {format_time(claims.expires)}",
    )
    yield "base", claims.base.name, f"dirHash {claims.base.dir_hash[:SHORT]}, one of the federation's"
    if claims.lora is not None:
        targets = ", ".join(claims.lora.targets)
        yield (
            "adapter",
            f"LoRA of rank {claims.lora.r}",
            f"exactly the tensors that {targets} imply, finite and bounded",
        )
    if claims.traces is not None:
        counts = ", ".join(f"{count} of class {name}" for name, count in sorted(claims.traces.classes.items()))
        yield "traces", counts, "no chat markers or hidden characters"
