"""What an offer holds, in terms that a person can judge: files, every number and name that was claimed, traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedcompose.contribution import Kind
from fedcompose.files import read_limited
from fedcompose.parts import offer_digest, stream_bytes
from fedcompose.provenance import PROVENANCE_FILE, Provenance
from fedcompose.statement import parse_provenance
from fedcompose.traces import MAX_TRACES_BYTES, TRACES_FILE, Trace, decode
from fedcompose_client.offer import outbox_parts

FIRST_TRACES = 3
MAX_PROVENANCE_BYTES = 4 << 20
SHOWN_ELSEWHERE = {"subjects"}  # the files and their digests


def describe_offer(outbox: Path, want: Sequence[Kind]) -> dict[str, Any]:
    """Everything in the files of an offer but the weights, which are numbers nobody can read.

    Raises: RefusedError: `NOT_READY`, and what reading the files raises.
    """
    parts = outbox_parts(outbox, want)
    kinds = sorted({part.name.partition("/")[0] for part in parts})
    traces = _traces(outbox) if "traces" in kinds else []
    return {
        "offer": offer_digest(parts),
        "bytes": stream_bytes(parts),
        "files": [asdict(part) for part in parts],
        "claims": {kind: _claims(outbox / kind / PROVENANCE_FILE) for kind in kinds},
        "traces": {"count": len(traces), "first": [_shown(trace) for trace in traces[:FIRST_TRACES]]},
    }


def _claims(path: Path) -> dict[str, Any]:
    claims: Provenance = parse_provenance(read_limited(path, MAX_PROVENANCE_BYTES))
    return claims.model_dump(mode="json", exclude_none=True, exclude=SHOWN_ELSEWHERE)


def _traces(outbox: Path) -> list[Trace]:
    return decode(read_limited(outbox / "traces" / TRACES_FILE, MAX_TRACES_BYTES))


def _shown(trace: Trace) -> dict[str, Any]:
    return trace.model_dump(mode="json", exclude_none=True)
