"""The engine: one verified release in memory, one answer at a time.

A job is a prompt and how to continue it. One worker thread runs the jobs in the order in which they came, so
that each has the model, and whom it forces to speak, to itself. Tokens are told as they are written, each with
the experts that wrote it; a job can be cancelled at any token.

Greedy answers are those of `generate`, and of the evaluation in the release: what a base's own generation
settings ask for (a repetition penalty, say) is left out.
"""

from __future__ import annotations

import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from fedcompose.bases import Base, resolve_base
from fedcompose.errors import ConfigError
from fedcompose.model.composed import load_release
from fedcompose.model.controls import FixedRouter
from fedcompose.model.learned import PromptRouter
from fedcompose.model.lm import load_base
from fedcompose.model.router import RoutingRecord
from fedcompose.release import VerifiedRelease
from fedcompose.serve.text import TextStream

AUTO = "auto"
BASE = "base"
EXPERT_PREFIX = "expert:"

DEFAULT_MAX_TOKENS = 512
MIN_TEMPERATURE = 1e-3  # below it sampling is greedy anyway, and dividing by it overflows


@dataclass(frozen=True)
class Settings:
    """How to continue a prompt. `model` is one of `Engine.models`; without `max_tokens` a default that fits."""

    model: str = AUTO
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass
class Job:
    """A prompt that fits the model. `cancel` may be called from any thread, at any time."""

    prompt: list[int]
    max_tokens: int
    settings: Settings
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()


@dataclass(frozen=True)
class Token:
    """A token's text and the expert that most layers chose for it; `agreement` is the share of these layers.

    `layers` is the choice of each routed layer, a row of the router; without routing there are none, and the
    expert is `base`.
    """

    text: str
    expert: str
    agreement: float
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """A finished job. `shares` is each expert's part of all decisions, by layer and token, in router order."""

    tokens: tuple[Token, ...]
    finish: Literal["stop", "length", "cancelled"]
    prompt_tokens: int
    completion_tokens: int
    shares: Mapping[str, float]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)


class Engine:
    """A loaded release. `models` are the ids that a job can ask for:

    `auto`, where the router decides; `expert:SITE`, the same model with one expert forced at every token and
    layer; `base`, the untouched base, loaded when first asked for.
    """

    def __init__(self, release: VerifiedRelease, base: Base | None = None) -> None:
        """Load the release, on the base that it names or on the one given.

        Raises: RefusedError, MissingError: as `load_release`.
        """
        self.release = release
        self.experts = tuple(expert.site for expert in release.experts)
        self.models = (AUTO, *(EXPERT_PREFIX + site for site in self.experts), BASE)
        self._base = base or resolve_base(release.composition["base"]["name"])
        self._model, self._tokenizer = load_release(release, base=self._base)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    @property
    def context(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        return int(self._model.config.get_text_config().max_position_embeddings)

    def prepare(self, messages: Sequence[Mapping[str, str]], settings: Settings) -> Job:
        """A job that continues the conversation `messages`, each a `role` and a `content`.

        Raises: ConfigError: `MODEL_NOT_FOUND`, `MESSAGES_INVALID`, `CONTEXT_LENGTH_EXCEEDED`.
        """
        if settings.model not in self.models:
            raise ConfigError("MODEL_NOT_FOUND", "there is no such model here", expected=", ".join(self.models))
        prompt = self._prompt(messages)
        room = self.context - len(prompt)
        wanted = settings.max_tokens or min(DEFAULT_MAX_TOKENS, max(room, 1))
        if wanted > room:
            raise ConfigError(
                "CONTEXT_LENGTH_EXCEEDED",
                "the messages and the answer do not fit the model",
                expected=f"at most {self.context} tokens",
                got=f"{len(prompt)} of the messages and {wanted} to write",
                fix="shorten the messages or ask for fewer tokens",
            )
        return Job(prompt, wanted, settings)

    def submit(self, job: Job, on_token: Callable[[Token], object] | None = None) -> Future[Answer]:
        """Run a job after those before it; `on_token` is told each token, in the worker's thread."""
        return self._worker.submit(self._answer, job, on_token)

    def close(self) -> None:
        """Drop the jobs that wait, and wait for the one that runs."""
        self._worker.shutdown(cancel_futures=True)

    def _prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The conversation up to where the assistant begins to write, as `lm.prompt_ids` has it for one turn."""
        if self._tokenizer.chat_template is None:
            return list(self._tokenizer("".join(each["content"] + "\n" for each in messages)).input_ids)
        try:
            text = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise ConfigError(
                "MESSAGES_INVALID", "the base's chat template does not take these messages", got=type(error).__name__
            ) from error
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _answer(self, job: Job, on_token: Callable[[Token], object] | None) -> Answer:
        settings = job.settings
        sampled = settings.temperature >= MIN_TEMPERATURE
        torch.manual_seed(secrets.randbits(63) if settings.seed is None else settings.seed)
        with self._speaker(job) as (model, record):
            listener = _Listener(job, self, record, on_token)
            if not job.cancelled:
                prompt = torch.tensor([job.prompt], device=model.device)
                model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=job.max_tokens,
                    do_sample=sampled,
                    temperature=settings.temperature if sampled else 1.0,
                    top_p=settings.top_p,
                    top_k=0,
                    repetition_penalty=1.0,
                    eos_token_id=sorted(self.ends),
                    pad_token_id=self._tokenizer.pad_token_id,
                    stopping_criteria=StoppingCriteriaList([listener]),
                )
        return listener.answer()

    @contextmanager
    def _speaker(self, job: Job) -> Iterator[tuple[Any, RoutingRecord]]:
        """The model that answers a job, and the record of who speaks in it."""
        if job.settings.model == BASE:
            yield self._plain, RoutingRecord()
            return
        routing = self._model.routing
        with routing.using(self._router(job)), routing.recording() as record:
            yield self._model, record

    def _router(self, job: Job) -> nn.Module:
        """The release's router, or one that lets the expert speak that was asked for, or chosen for this prompt."""
        router: nn.Module = self._model.routing.router
        if job.settings.model != AUTO:
            chosen = self.experts.index(job.settings.model.removeprefix(EXPERT_PREFIX))
        elif isinstance(router, PromptRouter):
            ids = torch.tensor([job.prompt], device=self._model.device)
            (chosen,) = router.choose(self._model.get_input_embeddings()(ids), torch.ones_like(ids))
        else:
            return router
        return FixedRouter(chosen, len(self.experts))

    @cached_property
    def _plain(self) -> Any:
        """The base alone. The composed model cannot play it: the attention LoRA is merged into its weights."""
        model, _ = load_base(self._base.path, dtype=self._model.dtype)
        return model

    @cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""
        named = self._model.generation_config.eos_token_id
        also = named if isinstance(named, list) else [named]
        return frozenset(token for token in (self._tokenizer.eos_token_id, *also) if token is not None)

    def decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class _Listener(StoppingCriteria):
    """Hears every token of a job right after it was chosen, passes it on, and says when to stop."""

    def __init__(
        self, job: Job, engine: Engine, record: RoutingRecord, on_token: Callable[[Token], object] | None
    ) -> None:
        self._job, self._engine, self._record, self._on_token = job, engine, record, on_token
        self._stream: TextStream[tuple[int, ...]] = TextStream(engine.decode, job.settings.stop)
        self._tokens: list[Token] = []
        self._heard = 0
        self._finish: Literal["stop", "length", "cancelled"] | None = "cancelled" if job.cancelled else None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if self._finish is None:  # on a GPU a few more tokens may come before `generate` stops
            self._hear(int(input_ids[0, -1]))
        return torch.full((len(input_ids),), self._finish is not None, device=input_ids.device)

    def _hear(self, token: int) -> None:
        self._heard += 1
        layers = tuple(self._record.choices[-1][:, 0, -1].tolist()) if self._record.choices else ()
        self._record.calls.clear()
        if token in self._engine.ends:
            self._finish = "stop"
            return
        self._tell(self._stream.push(token, layers))
        if self._stream.stopped:
            self._finish = "stop"
        elif self._job.cancelled:
            self._finish = "cancelled"

    def _tell(self, pieces: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        for text, layers in pieces:
            token = _token(text, layers, self._engine.experts)
            self._tokens.append(token)
            if self._on_token:
                self._on_token(token)

    def answer(self) -> Answer:
        if not self._stream.stopped:
            self._tell(self._stream.flush())
        if self._stream.stopped:
            self._finish = "stop"
        return Answer(
            tokens=tuple(self._tokens),
            finish=self._finish or "length",
            prompt_tokens=len(self._job.prompt),
            completion_tokens=self._heard,
            shares=_shares(self._tokens, self._engine.experts),
        )


def _token(text: str, layers: tuple[int, ...], experts: Sequence[str]) -> Token:
    if not layers:
        return Token(text, BASE, 1.0, layers)
    votes = Counter(layers)
    winner = max(range(len(experts)), key=lambda expert: votes[expert])  # the first of equals
    return Token(text, experts[winner], votes[winner] / len(layers), layers)


def _shares(tokens: Sequence[Token], experts: Sequence[str]) -> dict[str, float]:
    """Each expert's part of all decisions; empty where nothing was decided."""
    votes = Counter(expert for token in tokens for expert in token.layers)
    return {name: votes[row] / votes.total() for row, name in enumerate(experts)} if votes else {}
