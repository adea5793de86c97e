"""`formats.md` and `errors.md` say what the code does: examples parse, limits agree, no field and no code lacks."""

from __future__ import annotations

import base64
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from pydantic import BaseModel

from fedcompose import ledger, receipt
from fedcompose.adapter import AdapterConfig, parse_config
from fedcompose.call import Call, parse_call
from fedcompose.composition import Composition, parse_composition
from fedcompose.delivery import Receipt
from fedcompose.errors import RefusedError
from fedcompose.explanations import EXPLANATIONS
from fedcompose.federation import Federation
from fedcompose.files import dump_json, sha256_hex
from fedcompose.invitation import Invitation
from fedcompose.keys import Enrolment, read_enrolment
from fedcompose.revocations import Revocations, parse_revocations
from fedcompose.signing import keyid_of, verify_files
from fedcompose.statement import _Statement, parse_provenance, parse_release_provenance
from fedcompose.traces import Trace, decode
from fedcompose_coordinator.approvals import Approval

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "formats.md").read_text()
ERRORS = (ROOT / "docs" / "errors.md").read_text()
EXAMPLES: dict[str, str] = dict(re.findall(r"^```json ([^\n]+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


def example(name: str) -> Any:
    return json.loads(EXAMPLES[name])


def site_key() -> bytes:
    public_key: str = example("federation")["sites"][0]["keys"][0]["public_key"]
    return public_key.encode()


def parse_ledger(data: bytes) -> object:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.jsonl"
        path.write_bytes(data)
        return ledger.verify(path)


def validated(model: type[BaseModel]) -> Callable[[bytes], object]:
    return lambda data: model.model_validate(json.loads(data))


PARSERS: dict[str, Callable[[bytes], object]] = {
    "enrolment envelope": read_enrolment,
    "model.sig": lambda data: verify_files(data, site_key()),
    "statement": lambda data: json.loads(data),
    "federation": validated(Federation),
    "revocations": parse_revocations,
    "enrolment": validated(Enrolment),
    "invitation": validated(Invitation),
    "call": lambda data: parse_call(dump_json(json.loads(data))),
    "adapter_config.json": parse_config,
    "trace": lambda data: decode(data),
    "adapter provenance": parse_provenance,
    "traces provenance": parse_provenance,
    "composition.json": parse_composition,
    "release provenance": parse_release_provenance,
    "ledger entry": parse_ledger,
    "approval": validated(Approval),
    "receipt": validated(Receipt),
    "answer receipt": validated(receipt.Receipt),
}


@pytest.mark.parametrize("name", PARSERS)
def test_every_example_parses_and_with_a_field_more_it_does_not(name: str) -> None:
    PARSERS[name](EXAMPLES[name].encode())
    if name != "statement":
        spoiled = json.dumps(example(name) | {"Unknown": 1})
        with pytest.raises((RefusedError, ValueError)):
            PARSERS[name](spoiled.encode() + b"\n")


def test_there_is_a_parser_for_every_example() -> None:
    assert EXAMPLES.keys() == PARSERS.keys()


def test_the_examples_belong_together() -> None:
    """One federation, one site, and what it signed; so that a reader can check an implementation against them."""
    federation, bundle = example("federation"), example("model.sig")
    assert federation["sites"][0]["keys"][0]["keyid"] == keyid_of(site_key())
    signed = verify_files(EXAMPLES["model.sig"].encode(), site_key())
    assert json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"])) == example("statement")
    assert signed.digests["provenance.json"] == sha256_hex(dump_json(example("adapter provenance")))
    release = parse_release_provenance(EXAMPLES["release provenance"].encode())
    assert release.ingredients[0].payload_sha256 == signed.payload_sha256
    assert release.ingredients[0].dir_hash == example("composition.json")["experts"][0]["dirHash"]
    call = parse_call(dump_json(example("call")))
    answered = parse_provenance(EXAMPLES["adapter provenance"].encode()).call
    assert answered is not None and (answered.nonce, answered.sha256) == (call.nonce, call.digest)
    assert json.loads(base64.b64decode(example("enrolment envelope")["payload"])) == example("enrolment")
    written = receipt.Receipt.model_validate(example("answer receipt"))
    receipt.check_answer(written, "The answer is 42.")
    assert (written.router, written.base) == (release.subjects["router.safetensors"], release.base.dir_hash)
    assert written.experts[0].dir_hash == release.ingredients[0].dir_hash


def names_in(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        yield from schema.get("properties", {})
        for each in schema.values():
            yield from names_in(each)
    elif isinstance(schema, list):
        for each in schema:
            yield from names_in(each)


@pytest.mark.parametrize(
    "model",
    [
        Federation,
        Revocations,
        Enrolment,
        Invitation,
        Call,
        AdapterConfig,
        Trace,
        _Statement,
        Composition,
        Approval,
        Receipt,
        receipt.Receipt,
    ],
)
def test_every_field_is_mentioned(model: type[BaseModel]) -> None:
    names = set(names_in(model.model_json_schema(by_alias=True)))
    assert len(names) >= 5
    assert not [name for name in names if not re.search(rf'[`"]{name}[`"]', PAGE)]


def test_the_limits_are_those_of_the_code() -> None:
    limits = re.findall(r"^\| `(\w+)\.(MAX_\w+)` \| (\S+) \|$", PAGE, re.MULTILINE)
    assert len(limits) > 20
    for module, name, value in limits:
        assert getattr(importlib.import_module(f"fedcompose.{module}"), name) == float(value), name


def test_every_code_that_the_page_names_can_be_raised() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \|", ERRORS, re.MULTILINE))
    named = set(re.findall(r"`([A-Z][A-Z0-9]*_[A-Z0-9_]+)`", PAGE)) - {"FEDCOMPOSE_HOME"}
    assert "KEY_REVOKED" in named
    assert not named - listed


def test_the_page_of_errors_is_what_the_source_raises() -> None:
    command = [sys.executable, str(ROOT / "docs" / "make_errors.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_page_of_errors_lacks_no_code_that_a_docstring_names() -> None:
    """The page is made by reading calls; what the docstrings promise is a second witness."""
    listed = set(re.findall(r"^\| `(\w+)` \|", ERRORS, re.MULTILINE))
    promised = set()
    for package in ("fedcompose", "client/fedcompose_client", "coordinator/fedcompose_coordinator"):
        for path in (ROOT / package).rglob("*.py"):
            for raises in re.findall(r"Raises: (.*?)(?:\n\n|\"\"\")", path.read_text(), re.DOTALL):
                promised |= set(re.findall(r"`([A-Z][A-Z0-9_]{4,})`", raises))
    assert len(promised) > 80
    assert not promised - listed


def test_no_explanation_is_of_a_code_that_nothing_raises() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \|", ERRORS, re.MULTILINE))
    assert not EXPLANATIONS.keys() - listed
