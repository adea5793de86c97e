"""Approvals: named people who must sign for a contribution before it is admitted, where the coordinator wants that.

`coordinator.toml` says how many (`approvals`) and who (`[approvers]`, a public key for each name). An approval is a
signed document of its own kind, kept in `approvals/<dirHash>/<name>.json`: who approved can be checked later, and
neither a line in the ledger nor a file alone counts. An approver's key has no other right.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedcompose.document import Digest, Time
from fedcompose.errors import ConfigError, RefusedError
from fedcompose.federation import FederationId
from fedcompose.files import MAX_JSON_BYTES, dump_json, parse_json, read_limited, sha256_hex, write_atomic
from fedcompose.keys import Identifier
from fedcompose.signing import Signer, keyid_of, load_public_key, sign_envelope, verify_envelope

log = logging.getLogger(__name__)

APPROVAL_TYPE = "application/vnd.fedcompose.approval.v1+json"
FOLDER = "approvals"


@dataclass(frozen=True)
class Rule:
    """How many of these people, by name with their public keys, must approve."""

    needed: int = 0
    keys: Mapping[str, bytes] = field(default_factory=dict)


class Approval(BaseModel):
    """One person's word that this contribution may be admitted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_: Literal["fedcompose/approval/v1"] = Field(alias="schema")
    federation: FederationId
    contribution: Digest
    by: Identifier
    at: Time


def read_rule(home: Path, needed: int, approvers: Mapping[str, Path]) -> Rule:
    """The rule that the settings ask for, its keys read and distinct.

    Raises: ConfigError: `APPROVERS_INVALID`, `FILE_UNREADABLE`. RefusedError: `KEY_UNUSABLE`.
    """
    keys = {name: read_limited(home / path, MAX_JSON_BYTES) for name, path in approvers.items()}
    for pem in keys.values():
        load_public_key(pem)
    if len(set(keys.values())) != len(keys) or needed > len(keys):
        raise ConfigError(
            "APPROVERS_INVALID",
            "the approvers in coordinator.toml cannot give so many approvals",
            expected=f"at least {needed} names, each with a key of its own",
            got=f"{len(keys)} names, {len(set(keys.values()))} keys",
        )
    return Rule(needed, keys)


def approve(
    home: Path, rule: Rule, federation: str, contribution: str, name: str, signer: Signer, now: datetime
) -> str:
    """Sign and keep an approval; the SHA-256 of what was signed.

    Raises: ConfigError: `APPROVER_UNKNOWN`. RefusedError: `APPROVER_KEY`.
    """
    if name not in rule.keys:
        raise ConfigError(
            "APPROVER_UNKNOWN", f"coordinator.toml names no approver {name!a}", expected=", ".join(rule.keys) or "one"
        )
    if keyid_of(rule.keys[name]) != signer.keyid:
        raise RefusedError(
            "APPROVER_KEY",
            f"this is not the key of approver {name}",
            expected=f"key {keyid_of(rule.keys[name])}",
            got=f"key {signer.keyid}",
        )
    approval = Approval(
        schema="fedcompose/approval/v1", federation=federation, contribution=contribution, by=name, at=now
    )
    payload = dump_json(approval.model_dump(mode="json", by_alias=True))
    write_atomic(_path(home, contribution, name), sign_envelope(payload, APPROVAL_TYPE, [signer]))
    return sha256_hex(payload)


def approved_by(home: Path, rule: Rule, federation: str, contribution: str, recorded: Mapping[str, str]) -> set[str]:
    """Who of the present approvers has approved this contribution: in the ledger (`recorded`) and by signature.

    An approval that is gone, altered or by a key of earlier does not count; it can be given again.
    """
    found = set()
    for name in recorded.keys() & rule.keys.keys():
        try:
            payload = _signed_payload(home, contribution, name, rule.keys[name])
            approval = Approval.model_validate(parse_json(payload, "the approval"))
        except (ConfigError, RefusedError, ValidationError):
            log.warning("the approval by %s does not count", name)
            continue
        said = (approval.federation, approval.contribution, approval.by, sha256_hex(payload))
        if said == (federation, contribution, name, recorded[name]):
            found.add(name)
    return found


def _signed_payload(home: Path, contribution: str, name: str, public_pem: bytes) -> bytes:
    envelope = read_limited(_path(home, contribution, name), MAX_JSON_BYTES)
    return verify_envelope(envelope, APPROVAL_TYPE, {keyid_of(public_pem): public_pem}).payload


def _path(home: Path, contribution: str, name: str) -> Path:
    return home / FOLDER / contribution / f"{name}.json"
