"""Two sites that differ only in what may not leave say the same, byte for byte, to whoever asks them.

The twins have the same keys, call, clock and settings, and the same questions and answers to train and to choose by.
They differ in the name of the file, in identifiers, in a column that no setting names, and in the questions that only
measure. Every answer of a round is compared, from `describe` to the last byte of what was signed.

What this cannot show: that weights tell nothing about the rows they learned from (a control changes one such row, and
the bytes differ); that the stated accuracies tell nothing, for they are of private rows (here they are equal, and a
control lets them differ); that it tells nothing when an answer comes, or how far and how fast a training is.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedcompose.bases import resolve_base
from fedcompose.errors import ConfigError
from fedcompose.parts import offer_digest
from fedcompose.tasks import Example
from fedcompose.wire import WINDOW_BYTES, Context, Message, RecordDict, Status, TaskIdentity, request
from fedcompose_client import flower
from fedcompose_client.config import load_config
from fedcompose_client.contribute import contribute
from fedcompose_client.data import split
from fedcompose_client.flower import make_app
from fedcompose_client.jobs import Job, decide, jobs, record
from fedcompose_client.offer import outbox_parts
from fedcompose_client.train import train
from tests.client.small_site import TRAINING, silent
from tests.flower_sim import FlowerSim

# isort: split
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

Row = dict[str, str]
SHORT = TRAINING | {"warm_up_steps": 1, "warm_up_batch": 22, "steps": 1, "samples_per_prompt": 2, "max_new_tokens": 6}
ROWS = [{"question": f"{a}{b}", "answer": "yes" if a < b else "no", "patient": "A"} for a in range(6) for b in range(7)]


@pytest.fixture
def sim(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> FlowerSim:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    sim = FlowerSim(tmp_path, {"site-a": "order"}, base=tiny_base)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(int(sim.now.timestamp())))
    settings = sim.folder("site-a") / "site.toml"
    training = "\n".join(f"{name} = {value}" for name, value in SHORT.items())
    settings.write_text(f"{settings.read_text().replace('numeric', 'exact')}\n[domains.order.training]\n{training}\n")
    sim.call()
    return sim


class Round:
    """A whole round of a site with this file; `said` are its answers, one for each question that it was asked."""

    def __init__(self, sim: FlowerSim, data: bytes, file: str = "data.jsonl", accuracy: float | None = None) -> None:
        self.sim, self.site, self.said = sim, sim.folder("site-a"), dict[str, bytes]()
        untouched = self.site.with_name("untouched")
        shutil.copytree(self.site, untouched)
        settings = self.site / "site.toml"
        settings.write_text(settings.read_text().replace("data.jsonl", file))
        (self.site / file).write_bytes(data)
        self._play(accuracy)
        self.provenance = self.read("outbox/order/adapter/provenance.json")
        shutil.rmtree(self.site)
        untouched.rename(self.site)

    def _play(self, accuracy: float | None) -> None:
        self._ask("describe", request())
        self._ask("call", request(call=self.sim.newest_call()))
        self._ask_all("asked")
        call = jobs(self.site)[0].call.id
        decide(self.site, call, "approved", self.sim.now)
        record(self.site, call, "started", self.sim.now)
        try:
            train(self.site, load_config(self.site), "order", silent)
        except ConfigError as error:
            record(self.site, call, "failed", self.sim.now, code=error.code)
        else:
            self._sign(accuracy)
        self._ask_all("done")

    def _sign(self, accuracy: float | None) -> None:
        job, path = jobs(self.site)[0], self.site / "runs" / "order" / "result.json"
        if accuracy is not None:
            result = json.loads(path.read_bytes())
            result["accuracy"]["rlvr"]["value"] = accuracy
            path.write_text(json.dumps(result))
        base = resolve_base(load_config(self.site).base)
        signer = self.sim.site_signer("site-a")
        contribute(self.site, "order", signer, self.sim.federation, self.sim.now, call=job.call, base=base)
        offer = offer_digest(outbox_parts(self.site / "outbox" / "order", job.call.want))
        record(self.site, job.call.id, "signed", self.sim.now, offer=offer)

    def _ask_all(self, when: str) -> None:
        """Everything that a coordinator may ask about a call, and some that it may not."""
        signed = jobs(self.site)[0].offer or "0" * 64
        window: dict[str, Any] = {"offer": signed, "start": 0, "length": WINDOW_BYTES}
        for action in ("status", "offer", "shell", "receipt"):
            self._ask(action, self.sim.request("site-a"), when)
        self._ask("fetch", self.sim.request("site-a", **window), when)
        self._ask("fetch", self.sim.request("site-a", **window | {"nonce": "0" * 64}), f"{when}, without its nonce")

    def _ask(self, action: str, content: RecordDict, when: str = "") -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        message = Message(content, dst_node_id=2, message_type=f"query.{action}")
        answer = make_app(self.site, lambda: self.sim.now)(message, Context(1, 2, {}, RecordDict(), {})).content
        self.said[f"{action} {when}"] = b"".join(
            each.deflate() for _, each in sorted(get_all_nested_objects(answer).items())
        )

    def read(self, name: str) -> dict[str, Any]:
        path = self.site / name
        return dict(json.loads(path.read_bytes())) if path.is_file() else {}


def lines(rows: Sequence[Row]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def measuring(rows: Sequence[Row]) -> set[str]:
    """The questions that only measure; their own text says which these are."""
    examples = [Example(row["question"], row["answer"], None) for row in rows]
    return {each.question for each in split(examples, 0, SHORT["validation_count"], SHORT["test_count"]).test}  # type: ignore[arg-type]


def measured_by_others(rows: Sequence[Row]) -> list[Row]:
    """The same rows to train and to choose by, and other questions to measure by."""
    twins = [dict(row) for row in rows]
    for row in twins:
        before = row["question"]
        if before in measuring(twins):
            numbers = itertools.count()
            while row["question"] == before or row["question"] not in measuring(twins):
                row["question"] = f"{before} of patient {next(numbers)}"
    return twins


def differing(one: Round, other: Round) -> set[str]:
    assert one.said.keys() == other.said.keys()
    return {question for question, answer in one.said.items() if other.said[question] != answer}


def test_twins_say_the_same_to_the_last_byte_of_what_was_signed(sim: FlowerSim) -> None:
    twins = [{"note": f"by Dr {n}", **row, "patient": f"B-{n}"} for n, row in enumerate(measured_by_others(ROWS))]
    assert measuring(twins).isdisjoint(measuring(ROWS))
    one, other = Round(sim, lines(ROWS)), Round(sim, lines(twins), file="ann-smith.jsonl")
    assert len(one.said["fetch done"]) > 10_000, "an adapter crossed"
    assert differing(one, other) == set()


def test_what_differs_for_other_weights_is_what_was_signed_and_nothing_else(sim: FlowerSim) -> None:
    """Control: one row to learn from has another answer."""
    learned = next(row for row in ROWS if row["question"] not in measuring(ROWS))
    other = [row | {"answer": "perhaps"} if row is learned else row for row in ROWS]
    assert differing(Round(sim, lines(ROWS)), Round(sim, lines(other))) == {"offer done", "fetch done"}


def test_another_accuracy_changes_the_stated_numbers_and_nothing_else(sim: FlowerSim) -> None:
    """Control: the same weights, and other questions to measure by that went better."""
    one, other = Round(sim, lines(ROWS)), Round(sim, lines(ROWS), accuracy=0.9)
    assert differing(one, other) == {"offer done", "fetch done"}
    stated = [each.provenance["predicate"]["runDetails"].pop("byproducts") for each in (one, other)]
    assert stated[0] != stated[1] and one.provenance == other.provenance


def test_a_training_that_failed_says_so_and_not_why(sim: FlowerSim) -> None:
    one = Round(sim, lines([*ROWS, {"question": "", "answer": "yes"}]))
    other = Round(sim, lines(ROWS)[:-5], file="ann-smith.jsonl")
    assert b"failed" in one.said["status done"]
    assert differing(one, other) == set()


def test_a_status_that_tells_of_the_file_is_found(sim: FlowerSim, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a number of the closed list is enough to tell the twins apart."""

    def leaky(folder: Path, job: Job, domain: str) -> Status:
        return Status(job.state, step=len(load_config(folder).domain(domain).file.name))

    monkeypatch.setattr(flower, "job_status", leaky)
    broken = lines(ROWS)[:-5]
    found = differing(Round(sim, broken), Round(sim, broken, file="ann-smith.jsonl"))
    assert found == {"call ", "status asked", "status done"}
