"""Attacks on the way: a site, or whoever answers in its place, sends other bytes over Flower than it announced."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedcompose import wire
from fedcompose.call import read_own_call
from fedcompose.wire import Array, Part, RecordDict
from fedcompose_coordinator.flower import CONVERSATIONS, Exchange
from tests.attacks.attack import Cases, Mutation, refusal_of
from tests.attacks.calls import a_call
from tests.federation_sim import FederationSim

WINDOW = 4096


@dataclass
class Fetch:
    """The coordinator fetches a contribution of site-a, window by window; `meddle` changes the answers."""

    exchange: Exchange
    outbox: Path
    meddle: Callable[[RecordDict], object] = lambda content: None
    between: Callable[[], object] = lambda: None

    def refusal(self) -> str:
        code = refusal_of(self.admit)
        assert not any(path.is_file() for path in self.exchange.home.rglob("*")), "something lies in the inbox"
        return code

    def admit(self) -> None:
        conversation = CONVERSATIONS["collect"](self.exchange)
        question = next(conversation)
        try:
            while True:
                asked = wire.read_request(question[1])
                parts = [part_of(path) for path in sorted(self.outbox.iterdir())]
                pieces = wire.plan(sorted(parts, key=order), asked["start"], asked["length"])
                data = {p.part.name: self.read(p) for p in pieces}
                content = wire.contribution_answer(sorted(parts, key=order), data)
                self.meddle(content)
                self.between()
                question = conversation.send(content)
        except StopIteration as end:
            assert end.value.code == wire.ACCEPTED

    def read(self, piece: wire.Slice) -> bytes:
        data = (self.outbox / piece.part.name.partition("/")[2]).read_bytes()
        return data[piece.offset : piece.offset + piece.length]


def part_of(path: Path) -> Part:
    data = path.read_bytes()
    return Part(f"adapter/{path.name}", len(data), hashlib.sha256(data).hexdigest())


def order(part: Part) -> int:
    return list(wire.part_limits(["adapter"])).index(part.name)


def a_fetch(released: FederationSim, tmp_path: Path) -> Fetch:
    from tests.attacks.attack import copied

    call = read_own_call((sent := a_call(released, tmp_path / "call")).envelope)
    outbox = copied(released.sites["site-a"].outbox / "adapter", tmp_path / "outbox")
    return Fetch(Exchange(tmp_path / "hub", call, sent.envelope, call.sites[0], WINDOW), outbox)


def answers(change: Callable[[RecordDict], object]) -> Mutation:
    def mutate(attack: Fetch) -> None:
        attack.meddle = change

    return mutate


def field(name: str, value: object) -> Mutation:
    return answers(lambda content: content["answer"].update({name: value}))


def first(name: str, value: object) -> Mutation:
    """The first entry of one of the lists that announce the files."""
    return answers(
        lambda content: content["answer"].update({name: [value, *content["answer"][name][1:]]})  # type: ignore[union-attr]
    )


def array(**changes: object) -> Mutation:
    return answers(lambda content: next(iter(content["parts"].values())).__dict__.update(changes))  # type: ignore[union-attr]


def one_file_less(content: RecordDict) -> None:
    for name in ("names", "sizes", "sha256"):
        content["answer"][name] = content["answer"][name][1:]  # type: ignore[index]


def one_array_more(content: RecordDict) -> None:
    content["parts"]["adapter/../../x"] = Array("uint8", (1,), wire.RAW, b"x")  # type: ignore[index]


def other_bytes(content: RecordDict) -> None:
    """As many bytes as announced, but others."""
    piece = next(iter(content["parts"].values()))  # type: ignore[union-attr]
    piece.__dict__.update(data=bytes(len(piece.data)))  # type: ignore[union-attr]


def another_contribution(attack: Fetch) -> None:
    """The site contributes anew while the old contribution is fetched."""
    attack.between = lambda: (attack.outbox / "model.sig").write_bytes(b"another")


BAD = "MESSAGE_INVALID"
TRANSPORT: Cases = {
    "sent-name-with-a-path": (first("names", "adapter/../../../x"), BAD),
    "sent-name-absolute": (first("names", "/etc/passwd"), BAD),
    "sent-name-unlisted": (first("names", "adapter/adapter_model.bin"), BAD),
    "sent-name-of-another-kind": (first("names", "traces/traces.jsonl"), BAD),
    "sent-name-twice": (first("names", "adapter/model.sig"), BAD),
    "sent-size-negative": (first("sizes", -1), BAD),
    "sent-size-of-a-petabyte": (first("sizes", 1 << 50), BAD),
    "sent-size-over-the-limit": (first("sizes", (1 << 20) + 1), BAD),
    "sent-size-declared-larger": (first("sizes", 4000), BAD),
    "sent-size-declared-smaller": (first("sizes", 5), BAD),
    "sent-digest-of-another-file": (first("sha256", "0" * 64), "CONTRIBUTION_DIGEST"),
    "sent-digest-that-is-none": (first("sha256", "x"), BAD),
    "sent-other-bytes": (answers(other_bytes), "CONTRIBUTION_DIGEST"),
    "sent-a-file-less": (answers(one_file_less), BAD),
    "sent-an-array-more": (answers(one_array_more), BAD),
    "sent-an-array-cut": (array(data=b"short"), BAD),
    "sent-an-array-serialised": (array(stype="numpy.ndarray"), BAD),
    "sent-an-array-of-numbers": (array(dtype="float32"), BAD),
    "sent-no-arrays": (answers(lambda content: content.pop("parts")), BAD),
    "sent-no-answer": (answers(lambda content: content.pop("answer")), BAD),
    "sent-a-code-with-an-escape": (field("code", "\x1b[31mX"), BAD),
    "sent-no-list": (field("names", 7), BAD),
    "sent-another-contribution-midway": (another_contribution, "CONTRIBUTION_CHANGED"),
}
