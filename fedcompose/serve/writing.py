"""One answer while it is written: hears every token right after it was chosen, passes it on, and says when to stop.

Whoever runs the model, one request at a time or many together, tells tokens to a `Writing` and stops when it is done.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

from fedcompose.model.router import NO_EXPERT
from fedcompose.serve.sampling import Chosen, Sampling
from fedcompose.serve.text import TextStream

AUTO = "auto"
BASE = "base"
MERGED = "merged"  # who speaks where all experts always do

Layers = tuple[int, ...]
Finish = Literal["stop", "length", "cancelled"]


@dataclass
class Job:
    """A prompt that fits the model and how to continue it. `cancel` may be called from any thread, at any time.

    `wish` has the expert forced at each point, or `NO_EXPERT`; for the base, which has no points, it is None.
    """

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]
    wish: Layers | None
    choice: int = 0  # which of several answers to one request: with a seed, each is another
    _cancelled: threading.Event = field(default_factory=threading.Event, init=False)
    _heed: Callable[[], object] | None = field(default=None, init=False)

    def choices(self, count: int) -> list[Job]:
        """As many answers to the same request, each a job of its own."""
        return [replace(self, choice=choice) for choice in range(count)]

    def cancel(self) -> None:
        self._cancelled.set()
        if self._heed is not None:
            self._heed()

    def when_cancelled(self, heed: Callable[[], object]) -> None:
        """`heed` is called once the job is cancelled, at once if it is."""
        self._heed = heed
        if self.cancelled:
            heed()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()


@dataclass(frozen=True)
class Token:
    """A token's text and the expert that most layers chose for it; `agreement` is the share of these layers.

    `layers` is the choice of each routed layer, a row of the router; without routing there are none, and the
    expert is `base`. `chosen` is the token's number and, on request, its probability.
    """

    text: str
    expert: str
    agreement: float
    layers: Layers
    chosen: Chosen


@dataclass(frozen=True)
class Answer:
    """A finished job. `shares` is each expert's part of all decisions, by layer and token, in router order.

    `counts` are the tokens that each expert wrote, those included that ended the answer and are not shown.
    """

    tokens: tuple[Token, ...]
    finish: Finish
    prompt_tokens: int
    completion_tokens: int
    shares: Mapping[str, float]
    counts: Mapping[str, int]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)


class Writing:
    """See the module. `answer` is done when the job is: with an answer, or with the error that ended it."""

    def __init__(
        self,
        job: Job,
        experts: Sequence[str],
        ends: frozenset[int],
        decode: Callable[[list[int]], str],
        on_token: Callable[[Token], object] | None,
    ) -> None:
        self.job, self._experts, self._ends, self._on_token = job, experts, ends, on_token
        self.generator = job.sampling.generator(job.choice)
        self.answer: Future[Answer] = Future()
        self.answer.set_running_or_notify_cancel()
        self._stream: TextStream[tuple[Layers, Chosen]] = TextStream(decode, job.stops)
        self._tokens: list[Token] = []
        self._heard: list[Layers] = []
        self._busy = threading.Lock()

    @property
    def done(self) -> bool:
        return self.answer.done()

    def hear(self, chosen: Chosen, layers: Layers) -> None:
        """The next token, and who wrote it. What goes wrong here ends this answer alone."""
        with self._busy:
            try:
                if not self.done:
                    self._hear(chosen, layers)
            except Exception as error:
                self.fail(error)

    def _hear(self, chosen: Chosen, layers: Layers) -> None:
        self._heard.append(layers)
        if chosen.id in self._ends:
            self._end("stop")
            return
        self._tell(self._stream.push(chosen.id, (layers, chosen)))
        if self._stream.stopped:
            self._end("stop")
        elif self.job.cancelled:
            self._end("cancelled")
        elif len(self._heard) >= self.job.max_tokens:
            self._end("length")

    def cancel(self) -> None:
        """End here; nothing happens if it has ended."""
        with self._busy:
            if not self.done:
                self._end("cancelled")

    def fail(self, error: BaseException) -> None:
        with suppress(InvalidStateError):
            self.answer.set_exception(error)

    def _end(self, finish: Finish) -> None:
        if not self._stream.stopped:
            self._tell(self._stream.flush())
        if self._stream.stopped:  # the stop string may have been complete only now
            finish = "stop"
        with suppress(InvalidStateError):
            self.answer.set_result(
                Answer(
                    tokens=tuple(self._tokens),
                    finish=finish,
                    prompt_tokens=len(self.job.prompt),
                    completion_tokens=len(self._heard),
                    shares=shares(self._heard, self._experts),
                    counts=Counter(majority(layers, self._experts)[0] for layers in self._heard),
                )
            )

    def _tell(self, pieces: Sequence[tuple[str, tuple[Layers, Chosen]]]) -> None:
        for text, (layers, chosen) in pieces:
            token = Token(text, *majority(layers, self._experts), layers, chosen)
            self._tokens.append(token)
            if self._on_token:
                self._on_token(token)


def majority(layers: Layers, experts: Sequence[str]) -> tuple[str, float]:
    """Who wrote a token, and the share of layers that agree; the first of equals."""
    if not layers:
        return BASE, 1.0
    votes = Counter(layers)
    winner = max(range(NO_EXPERT, len(experts)), key=lambda expert: (votes[expert], -expert))
    return (MERGED if winner == NO_EXPERT else experts[winner]), votes[winner] / len(layers)


def shares(heard: Sequence[Layers], experts: Sequence[str]) -> dict[str, float]:
    """Each expert's part of all decisions; empty where nobody decided."""
    votes = Counter(expert for layers in heard for expert in layers if expert != NO_EXPERT)
    return {name: votes[row] / votes.total() for row, name in enumerate(experts)} if votes else {}
