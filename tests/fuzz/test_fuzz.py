"""A short run of every fuzz target; `run.py` makes the long ones."""

from __future__ import annotations

from random import Random

import pytest

from fedcompose.errors import RefusedError
from tests.fuzz.mutation import mutated
from tests.fuzz.targets import Target, targets

NAMES = (
    "bundle", "statement", "federation file", "federation", "call file", "call", "delivery file", "delivery",
    "invitation file", "invitation", "receipt file", "receipt",
    "revocations file", "revocations", "enrolment file", "enrolment", "provenance", "release provenance",
    "composition", "configuration", "weights", "router", "gates", "traces", "ledger", "public key", "json",
)  # fmt: skip
CASES = 150


@pytest.fixture(scope="module")
def all_targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    found = targets(tmp_path_factory.mktemp("fuzz"))
    assert set(found) == set(NAMES)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_damaged_input_is_refused_or_means_what_was_meant(all_targets: dict[str, Target], name: str) -> None:
    target, random = all_targets[name], Random(name)
    assert target.try_(target.seed)
    accepted = sum(target.try_(mutated(target.seed, target.form, random)) for _ in range(CASES))
    assert accepted < CASES * 2 // 3, "hardly any damage was noticed"


def test_a_finding_is_noticed() -> None:
    """Negative control: another error than a refusal, and another meaning."""

    def refuse(data: bytes) -> object:
        raise RefusedError("X", "refused")

    assert not Target("bytes", b"", refuse).try_(b"")
    with pytest.raises(IndexError):
        Target("bytes", b"", lambda data: data[0]).try_(b"")
    with pytest.raises(AssertionError):
        Target("bytes", b"a", lambda data: data, courier=True).try_(b"b")
