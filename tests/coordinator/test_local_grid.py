"""The in-process grid behaves as Flower's own grids do, so that any ServerApp and any ClientApp run on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from flwr.app import MetricRecord
from flwr.serverapp.strategy import FedAvg

from fedcompose.errors import MissingError
from fedcompose.wire import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    ErrorCode,
    Grid,
    Message,
    RecordDict,
    ServerApp,
)
from fedcompose_coordinator import local_grid
from fedcompose_coordinator.local_grid import run_locally


@dataclass
class Site:
    """A site whose answer is a function of the message."""

    site: str
    answer: Callable[[Message], RecordDict]

    def __call__(self, message: Message, context: Context) -> Message:
        return Message(self.answer(message), reply_to=message)


def replies(sites: list[Site], *messages: tuple[int, RecordDict]) -> list[Message]:
    """The replies to these messages, each to a node by its position."""
    received: list[Message] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        nodes = [*grid.get_node_ids(), 10**6]
        sent = [Message(content, nodes[index], "query.x") for index, content in messages]
        received.extend(grid.send_and_receive(sent, timeout=10))

    run_locally(server, sites)
    return received


def note(text: str) -> RecordDict:
    return RecordDict({"note": ConfigRecord({"text": text})})


def test_each_node_answers_for_itself() -> None:
    sites = [Site("a", lambda _: note("from a")), Site("b", lambda _: note("from b"))]
    texts = [reply.content["note"]["text"] for reply in replies(sites, (1, note("")), (0, note("")))]
    assert texts == ["from b", "from a"]


def test_nodes_carry_their_sites_names() -> None:
    names: list[str] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        names.extend(node.name for node in grid.get_nodes())

    run_locally(server, [Site("a", note), Site("b", note)])
    assert names == ["a", "b"]


def test_what_a_site_does_to_its_message_stays_with_it() -> None:
    """Flower's own secure aggregation pops records out of the messages that it gets."""
    shared = note("shared")

    def take(message: Message) -> RecordDict:
        return RecordDict({"note": message.content.pop("note")})

    answers = replies([Site("a", take), Site("b", take)], (0, shared), (1, shared))
    assert [reply.content["note"]["text"] for reply in answers] == ["shared", "shared"]
    assert "note" in shared


def test_an_app_that_raises_and_a_node_that_is_not_there_give_error_replies() -> None:
    def fail(_: Message) -> RecordDict:
        raise ValueError("a text that could quote data")

    first, second = replies([Site("a", fail)], (0, note("")), (1, note("")))
    assert first.error == Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "ValueError")
    assert second.error.code == ErrorCode.NODE_UNAVAILABLE


def test_flowers_own_averaging_runs_on_it() -> None:
    """Three sites add 1, 2 and 3 to a vector; two rounds of averaging add 2 each."""

    def site(name: str, step: float) -> Site:
        def train(message: Message) -> RecordDict:
            vector = message.content["arrays"]["x"].numpy() + step
            metrics = MetricRecord({"num-examples": 1})
            return RecordDict({"arrays": ArrayRecord({"x": Array(vector)}), "metrics": metrics})

        return Site(name, train)

    final: list[np.ndarray] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        start = ArrayRecord({"x": Array(np.zeros(4))})
        result = FedAvg(fraction_evaluate=0.0).start(grid=grid, initial_arrays=start, num_rounds=2)
        final.append(result.arrays["x"].numpy())

    run_locally(server, [site("a", 1), site("b", 2), site("c", 3)])
    np.testing.assert_allclose(final[0], np.full(4, 4.0))


def test_without_the_client_role_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_grid, "entry_points", lambda group: [])
    with pytest.raises(MissingError) as caught:
        local_grid.site_apps([])
    assert caught.value.code == "ROLE_NOT_INSTALLED"
