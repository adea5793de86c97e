"""Attacks on the way: a site, or whoever answers in its place, sends other bytes over Flower than it announced."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedcompose import wire
from fedcompose.call import read_own_call
from fedcompose.files import MAX_JSON_BYTES
from fedcompose.wire import Array, Part, RecordDict, Status
from fedcompose_coordinator.flower import Exchange, Question
from fedcompose_coordinator.jobs import Job
from tests.attacks.attack import Cases, Mutation, refusal_of
from tests.attacks.calls import a_call
from tests.federation_sim import FederationSim

WINDOW = 4096


@dataclass
class Fetch:
    """The coordinator fetches a contribution of site-a, window by window; `meddle` changes one kind of answer."""

    exchange: Exchange
    outbox: Path
    meddle: Callable[[RecordDict], object] = lambda content: None
    at: str = "offer"
    between: Callable[[], object] = lambda: None

    def refusal(self) -> str:
        code = refusal_of(self.admit)
        assert not (self.exchange.job.home / "inbox").exists(), "something lies in the inbox"
        return code

    def admit(self) -> None:
        while self.exchange.outcome is None:
            for question in self.exchange.questions():
                content = self.answer(question)
                if question.action == self.at:
                    self.meddle(content)
                self.exchange.answered(question, content)
                if question.action == "offer":
                    self.between()
        assert self.exchange.outcome.code == wire.ACCEPTED

    def answer(self, question: Question) -> RecordDict:
        parts = sorted((part_of(path) for path in self.outbox.iterdir()), key=order)
        if question.action == "status":
            return wire.status_answer(Status("ready"))
        if question.action == "offer":
            return wire.offer_answer(parts)
        asked = wire.read_request(question.content)
        pieces = wire.plan(parts, asked["start"], asked["length"])
        return wire.window_answer({piece.part.name: self.read(piece) for piece in pieces})

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
    job = Job(tmp_path / "hub", call, sent.envelope, call.sites[0])
    return Fetch(Exchange(job, "collect", WINDOW), outbox)


def answers(change: Callable[[RecordDict], object], at: str = "offer") -> Mutation:
    def mutate(attack: Fetch) -> None:
        attack.meddle, attack.at = change, at

    return mutate


def field(name: str, value: object) -> Mutation:
    return answers(lambda content: content["answer"].update({name: value}))


def first(name: str, value: object) -> Mutation:
    """The first entry of one of the lists that announce the files."""
    return answers(
        lambda content: content["answer"].update({name: [value, *content["answer"][name][1:]]})  # type: ignore[union-attr]
    )


def array(**changes: object) -> Mutation:
    return answers(lambda content: next(iter(content["parts"].values())).__dict__.update(changes), "fetch")  # type: ignore[union-attr]


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
    """The site contributes anew while the old contribution is fetched, and does not say so."""
    signature = attack.outbox / "model.sig"
    attack.between = lambda: signature.write_bytes(bytes(signature.stat().st_size))


BAD = "MESSAGE_INVALID"
TRANSPORT: Cases = {
    "sent-name-with-a-path": (first("names", "adapter/../../../x"), BAD),
    "sent-name-absolute": (first("names", "/etc/passwd"), BAD),
    "sent-name-unlisted": (first("names", "adapter/adapter_model.bin"), BAD),
    "sent-name-of-another-kind": (first("names", "traces/traces.jsonl"), BAD),
    "sent-name-twice": (first("names", "adapter/model.sig"), BAD),
    "sent-size-negative": (first("sizes", -1), BAD),
    "sent-size-of-a-petabyte": (first("sizes", 1 << 50), BAD),
    "sent-size-over-the-limit": (first("sizes", MAX_JSON_BYTES + 1), BAD),
    "sent-size-declared-larger": (first("sizes", 4000), BAD),
    "sent-size-declared-smaller": (first("sizes", 5), BAD),
    "sent-digest-of-another-file": (first("sha256", "0" * 64), "CONTRIBUTION_DIGEST"),
    "sent-digest-that-is-none": (first("sha256", "x"), BAD),
    "sent-other-bytes": (answers(other_bytes, "fetch"), "CONTRIBUTION_DIGEST"),
    "sent-a-file-less": (answers(one_file_less), BAD),
    "sent-an-array-more": (answers(one_array_more, "fetch"), BAD),
    "sent-an-array-cut": (array(data=b"short"), BAD),
    "sent-an-array-serialised": (array(stype="numpy.ndarray"), BAD),
    "sent-an-array-of-numbers": (array(dtype="float32"), BAD),
    "sent-no-arrays": (answers(lambda content: content.pop("parts"), "fetch"), BAD),
    "sent-no-answer": (answers(lambda content: content.pop("answer")), BAD),
    "sent-a-code-with-an-escape": (field("code", "\x1b[31mX"), BAD),
    "sent-no-list": (field("names", 7), BAD),
    "sent-another-contribution-midway": (another_contribution, "CONTRIBUTION_DIGEST"),
}
