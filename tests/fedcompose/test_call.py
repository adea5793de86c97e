"""What a call says in one form only, and what a coordinator's calls together say about its ledger."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fedcompose.call import (
    CALL_TYPE,
    Call,
    WantedLora,
    check_history,
    make_call,
    parse_call,
    read_own_call,
    verify_call,
)
from fedcompose.errors import RefusedError
from fedcompose.federation import Policy
from fedcompose.files import dump_json, sha256_hex
from fedcompose.ledger import EMPTY, Head
from fedcompose.signing import read_envelope_unverified, sign_envelope
from tests.flower_sim import FlowerSim

NINE = Head(entries=9, head="9" * 64)


@pytest.fixture
def sim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FlowerSim:
    monkeypatch.setattr("os.fsync", lambda _: None)
    return FlowerSim(tmp_path)


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(RefusedError) as caught:
        action()
    return caught.value.code


def test_a_call_says_all_that_an_answer_must_fit(sim: FlowerSim) -> None:
    lora = WantedLora(rank=8, targets=("up_proj",))
    envelope = sim.call(lora=lora, ledger=NINE)
    call = verify_call(envelope, sim.federation, "site-a", sim.now)
    assert (call.coordinator, call.lora, call.ledger) == ("hub", lora, NINE)
    assert (call.issued, call.deadline) == (sim.now.replace(microsecond=0), call.issued + timedelta(days=7))
    assert call.digest == sha256_hex(read_envelope_unverified(envelope, CALL_TYPE))


@pytest.mark.parametrize(
    "change",
    [
        lambda payload: payload.replace(b'"issued": ', b'"issued":  '),
        lambda payload: payload.replace(b'"rank": 64', b'"rank": 64, "rank": 512'),
        lambda payload: payload.replace(b'"nonce"', b'"policy": null, "nonce"'),
        lambda payload: payload.rstrip(),
        lambda payload: payload.replace(b'"hub"', b'"h\\u0075b"'),
    ],
    ids=["space", "key-twice", "null", "line-break", "escape"],
)
def test_a_call_has_one_form(sim: FlowerSim, change: Callable[[bytes], bytes]) -> None:
    """So its digest, which contributions repeat, stands for what it says and for nothing else."""
    payload = read_envelope_unverified(sim.call(), CALL_TYPE)
    assert parse_call(payload).payload == payload
    assert change(payload) != payload
    assert refusal(lambda: parse_call(change(payload))) in ("CALL_INVALID", "JSON_INVALID")


def test_any_other_word_in_a_call_gives_another_digest(sim: FlowerSim) -> None:
    call = read_own_call(sim.call(ledger=NINE))
    digests = {
        call.digest,
        call.model_copy(update={"deadline": call.deadline + timedelta(seconds=1)}).digest,
        call.model_copy(update={"lora": WantedLora(rank=65)}).digest,
        call.model_copy(update={"policy": "0" * 64}).digest,
        call.model_copy(update={"ledger": EMPTY}).digest,
        call.model_copy(update={"ledger": None}).digest,
    }
    assert len(digests) == 6


def test_a_call_names_the_coordinator_that_signed_it(sim: FlowerSim) -> None:
    document = json.loads(read_envelope_unverified(sim.call(), CALL_TYPE)) | {"coordinator": "other"}
    forged = sign_envelope(dump_json(document), CALL_TYPE, [sim.signer])
    assert refusal(lambda: verify_call(forged, sim.federation, "site-a", sim.now)) == "CALL_COORDINATOR"


def test_a_call_is_made_under_the_policy_that_the_site_knows(sim: FlowerSim) -> None:
    with_policy = sim.federation.model_copy(update={"policy": Policy(sha256="a" * 64)})
    other = sim.federation.model_copy(update={"policy": Policy(sha256="b" * 64)})
    deadline = sim.now + timedelta(days=1)
    envelope = make_call(with_policy, sim.signer, "base", ["adapter"], deadline=deadline, now=sim.now, nonce=bytes(32))
    assert verify_call(envelope, with_policy, "site-a", sim.now).policy == "a" * 64
    for known in (other, sim.federation):
        assert refusal(lambda known=known: verify_call(envelope, known, "site-a", sim.now)) == "CALL_POLICY"
    assert refusal(lambda: verify_call(sim.call(), with_policy, "site-a", sim.now)) == "CALL_POLICY"


# The ledger, as calls show it ---------------------------------------------------------------------


def calls(sim: FlowerSim, *heads: tuple[int, str] | None, every: timedelta = timedelta(days=1)) -> list[Call]:
    """One call after the other, with these heads: a number of entries and the digit that the digest is made of."""
    made = []
    for n, head in enumerate(heads):
        ledger = head and Head(entries=head[0], head=head[1] * 64)
        envelope = sim.call(now=sim.now + n * every, nonce=bytes([n]) * 32, ledger=ledger)
        made.append(read_own_call(envelope))
    return made


GROWN: dict[str, tuple[tuple[int, str] | None, ...]] = {
    "growing": ((3, "a"), (5, "b"), (9, "c")),
    "nothing decided in between": ((3, "a"), (3, "a")),
    "a ledger since the second": (None, (3, "a")),
    "no ledger at all": (None, None),
}


@pytest.mark.parametrize("name", GROWN)
@pytest.mark.parametrize("order", [1, -1], ids=["in-order", "the-older-one-last"])
def test_a_ledger_may_grow(sim: FlowerSim, name: str, order: int) -> None:
    check_history(calls(sim, *GROWN[name])[::order])


REWRITTEN: dict[str, tuple[tuple[tuple[int, str] | None, ...], str]] = {
    "shorter": (((5, "a"), (3, "b")), "LEDGER_SHRUNK"),
    "shorter by one": (((5, "a"), (7, "b"), (6, "c")), "LEDGER_SHRUNK"),
    "as long and another": (((5, "a"), (5, "b")), "LEDGER_FORKED"),
    "as long as one long ago, and another": (((5, "a"), (5, "a"), (5, "b")), "LEDGER_FORKED"),
    "gone": (((5, "a"), None), "LEDGER_SHRUNK"),
}


@pytest.mark.parametrize("name", REWRITTEN)
@pytest.mark.parametrize("order", [1, -1], ids=["in-order", "the-older-one-last"])
def test_a_ledger_may_not_shrink_or_fork(sim: FlowerSim, name: str, order: int) -> None:
    heads, code = REWRITTEN[name]
    made = calls(sim, *heads)
    assert refusal(lambda: check_history(made[::order])) == code


def test_two_calls_of_one_second_have_no_order(sim: FlowerSim) -> None:
    check_history(calls(sim, (5, "a"), (3, "b"), every=timedelta(0)))


def test_each_coordinator_has_a_ledger_of_its_own(sim: FlowerSim) -> None:
    first, second = calls(sim, (5, "a"), (3, "b"))
    check_history([first, second.model_copy(update={"coordinator": "other"})])


def test_a_site_that_checks_nothing_would_be_fooled(sim: FlowerSim) -> None:
    """Negative control: each of the two calls is well made, and only the other one tells."""
    for call in calls(sim, (5, "a"), (3, "b")):
        check_history([call])


def test_changes_are_read_strictly(sim: FlowerSim) -> None:
    document: dict[str, Any] = json.loads(read_envelope_unverified(sim.call(ledger=NINE), CALL_TYPE))
    for ledger in ({"entries": -1, "head": "0" * 64}, {"entries": 1}, {"entries": 1, "head": "x"}, [], "9"):
        assert refusal(lambda ledger=ledger: parse_call(dump_json(document | {"ledger": ledger}))) == "CALL_INVALID"
    for lora in ({"rank": 0, "targets": ["x"]}, {"rank": 1, "targets": []}, {"rank": 1, "targets": ["(a+)+"]}, {}):
        assert refusal(lambda lora=lora: parse_call(dump_json(document | {"lora": lora}))) == "CALL_INVALID"
