"""A coordinator's folder, opened: its settings, the federation it trusts, its base, and what was received."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from fedcompose.bases import Base, resolve_base
from fedcompose.contribution import VerifiedContribution
from fedcompose.errors import RefusedError
from fedcompose.federation import Federation
from fedcompose.files import MAX_JSON_BYTES, read_limited
from fedcompose.provenance import check_use
from fedcompose.trust_state import trusted_federation
from fedcompose_coordinator.config import CoordinatorConfig, load_config
from fedcompose_coordinator.decisions import deciding

CANDIDATE = "candidate"
ATTENTION_ONLY = "control-attention-only"


def federation_of(home: Path, fingerprints: list[str] | None = None) -> tuple[CoordinatorConfig, Federation]:
    """Settings and trusted federation; `fingerprints` of its roots are needed the first time.

    The ledger and the clock are looked at as well, so that nothing begins that could not be written down at its end.

    Raises: ConfigError: as `load_config`. RefusedError: as `trusted_federation` and `deciding`.
    """
    config, now = load_config(home), datetime.now(UTC)
    envelope = read_limited(home / config.federation, MAX_JSON_BYTES)
    federation = trusted_federation(envelope, fingerprints, now)
    with deciding(home, now):
        pass
    return config, federation


def open_home(home: Path, fingerprints: list[str] | None = None) -> tuple[CoordinatorConfig, Federation, Base]:
    """Settings, trusted federation, and the base, which must be one of the federation's.

    Raises: RefusedError: `BASE_MISMATCH`; as `federation_of`.
    """
    config, federation = federation_of(home, fingerprints)
    base = resolve_base(config.base)
    known = {entry.dir_hash: entry.name for entry in federation.base_models}
    if base.digest not in known:
        raise RefusedError(
            "BASE_MISMATCH",
            f"{config.base} is not a base of federation {federation.name!a}",
            expected=", ".join(f"{name} {digest[:16]}" for digest, name in known.items()),
            got=base.digest[:16],
            fix="pull the same base with the same library versions, or have the roots list this one",
        )
    return config, federation, Base(known[base.digest], base.path, base.digest)


def received_from(home: Path, federation: Federation) -> list[VerifiedContribution]:
    """Everything that was admitted, also of sites that were removed since."""
    from fedcompose_coordinator.intake import admitted

    return admitted(home, federation)


def members_of(home: Path, federation: Federation) -> list[VerifiedContribution]:
    """What compositions are made from: what was admitted, without the sites that were removed.

    Raises: RefusedError: `USE_RECIPIENT`, `USE_EXPIRED`, where a site does not let us use its contribution now.
    """
    from fedcompose_coordinator.membership import members

    found, name = members(home, received_from(home, federation)), load_config(home).id
    for each in found:
        check_use(each.provenance.use, name, datetime.now(UTC))
    return found
