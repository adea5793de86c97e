"""What a person is shown before anything leaves: every file, all that was claimed, and the first traces."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedcompose.files import sha256_file
from fedcompose.traces import decode
from fedcompose_client import preview
from fedcompose_client.preview import FIRST_TRACES, describe_offer
from tests.fedcompose.test_provenance import DP
from tests.federation_sim import FederationSim, make_traces

KINDS = ("adapter", "traces")


def leaves(document: Any) -> Iterator[object]:
    """Every number and text in a JSON document."""
    if isinstance(document, dict | list):
        for each in document.values() if isinstance(document, dict) else document:
            yield from leaves(each)
    elif document is not None:
        yield document


def claimed(path: Path) -> list[object]:
    """Read from the signed bytes, not by the code that shows them; constants of the format are no claim."""
    predicate = json.loads(path.read_bytes())["predicate"]
    (metrics,) = predicate["runDetails"]["byproducts"]
    numbers = json.loads(base64.b64decode(metrics["content"]))
    return [*leaves(predicate["buildDefinition"]["externalParameters"]), *leaves(numbers)]


def unshown(outbox: Path) -> list[object]:
    shown = {kind: list(leaves(claims)) for kind, claims in describe_offer(outbox, KINDS)["claims"].items()}
    return [value for kind in KINDS for value in claimed(outbox / kind / "provenance.json") if value not in shown[kind]]


def test_everything_that_was_claimed_is_shown(sim: FederationSim, monkeypatch: pytest.MonkeyPatch) -> None:
    site = sim.sites["site-a"]
    sim.contribute("site-a")
    assert 0.7123 in claimed(site.outbox / "adapter" / "provenance.json")
    assert unshown(site.outbox) == []
    monkeypatch.setattr(preview, "SHOWN_ELSEWHERE", {"subjects", "metrics"})
    assert 0.7123 in unshown(site.outbox), "the control"


def test_so_is_a_statement_of_differential_privacy(sim: FederationSim) -> None:
    site = sim.sites["site-a"]
    result = site.folder / "runs" / site.domain / "result.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"dp": DP.model_dump(mode="json")}))
    sim.contribute("site-a")
    assert DP.noise_multiplier in claimed(site.outbox / "adapter" / "provenance.json")
    assert unshown(site.outbox) == []


def test_every_file_and_the_first_traces_are_shown(sim: FederationSim) -> None:
    sim.contribute("site-a")
    outbox = sim.sites["site-a"].outbox
    shown = describe_offer(outbox, KINDS)
    files = {path.relative_to(outbox).as_posix(): path for kind in KINDS for path in (outbox / kind).iterdir()}
    assert {each["name"]: (each["size"], each["sha256"]) for each in shown["files"]} == {
        name: (path.stat().st_size, sha256_file(path)) for name, path in files.items()
    }
    shipped = decode((outbox / "traces" / "traces.jsonl").read_bytes())
    assert shown["traces"]["count"] == len(shipped) == len(make_traces(3))
    assert [trace["completion"] for trace in shown["traces"]["first"]] == [
        trace.completion for trace in shipped[:FIRST_TRACES]
    ]
