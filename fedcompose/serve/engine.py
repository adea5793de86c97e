"""The engine: one verified release in memory, many answers at once.

A job is a prompt, how to continue it, and who is forced to speak in it. Jobs of all kinds are written together, token
by token; each token is told as it is written, with the experts that wrote it, and a job can be cancelled at any time.
Whom one job forces to speak, no other job notices.

Greedy answers are those of `generate`, and of the evaluation in the release: what a base's own generation settings ask
for (a repetition penalty, say) is left out.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jinja2 import TemplateError

from fedcompose.bases import Base, resolve_base
from fedcompose.errors import ConfigError, MissingError, RefusedError
from fedcompose.model.composed import check_base_bytes, load_release, prove_alive
from fedcompose.model.controls import MaskedScorer, PinnedRouter
from fedcompose.model.learned import PromptRouter, Router
from fedcompose.model.lm import load_base
from fedcompose.model.router import NO_EXPERT
from fedcompose.model.spread import is_spread
from fedcompose.model.spread import spread as over_gpus
from fedcompose.release import VerifiedRelease
from fedcompose.routing import RouterConfig
from fedcompose.serve import batching, sequential
from fedcompose.serve.sampling import Sampling
from fedcompose.serve.writing import AUTO, BASE, Answer, Job, Layers, Token, Writing

EXPERT_PREFIX = "expert:"
DEFAULT_MAX_TOKENS = 512

Worker = batching.Worker | sequential.Worker
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pin:
    """An expert that speaks in the layers `first` to `last`, whatever the router says; layers count from 0."""

    expert: str
    first: int
    last: int


@dataclass(frozen=True)
class Settings:
    """How to continue a prompt. `model` is one of `Engine.models`; without `max_tokens` a default that fits."""

    model: str = AUTO
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    force: str | None = None  # this expert everywhere
    pins: tuple[Pin, ...] = ()

    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.seed, self.logprobs)


class Engine:
    """A loaded release whose experts are all proved to speak. `models` are the ids that a job can ask for:

    `auto`, where the router decides; `expert:SITE`, the same model with one expert forced at every token and layer;
    `base`, the untouched base, loaded when first asked for.
    """

    def __init__(
        self,
        release: VerifiedRelease,
        base: Base | None = None,
        dtype: torch.dtype | None = None,
        together: bool = True,
        spread: bool = False,
    ) -> None:
        """Load the release, on the base that it names or on the one given; `together` answers many jobs at once.

        In float32 an answer is the same whoever else is answered. In the narrower format that a machine may be faster
        in, `dtype` None, what is computed together is rounded together, and a near tie may fall the other way.
        `spread` uses all GPUs for one model; over more than one, jobs are answered one at a time.

        Raises: RefusedError, MissingError: as `load_release`; RefusedError: `EXPERT_DEAD`.
        """
        self.release = release
        self.experts = tuple(expert.site for expert in release.experts)
        self.masked: frozenset[str] = frozenset()
        self._refused: str | None = None
        self.on_step: Callable[[int], object] | None = None
        self._base = base or resolve_base(release.composition["base"]["name"])
        self._spread = spread
        self._model, self._tokenizer = load_release(release, dtype, self._base, spread=spread)
        prove_alive(self._model, self._tokenizer, self.experts)
        self._chooser = self._model.routing.router
        self._pinned = PinnedRouter(self._chooser, len(self.experts))
        self._together = together
        self._loading, self._masking = threading.Lock(), threading.Lock()
        self._plain: Worker | None = None
        self._worker = self._work(self._model, self._pinned)

    @property
    def models(self) -> tuple[str, ...]:
        speaking = (EXPERT_PREFIX + site for site in self.experts if site not in self.masked)
        return (AUTO, *speaking, BASE)

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the model."""
        dtype: torch.dtype = self._model.dtype
        return dtype

    @property
    def layers(self) -> int:
        """How many places of the model decide about experts."""
        return len(self._model.routing.points)

    @property
    def context(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        return min(self._window, self._worker.capacity)

    @property
    def alive(self) -> bool:
        """Whether a job that is submitted will be answered."""
        return self._worker.alive and (self._plain is None or self._plain.alive)

    @property
    def running(self) -> int:
        return sum(worker.running for worker in self._workers)

    @property
    def waiting(self) -> int:
        return sum(worker.waiting for worker in self._workers)

    @property
    def cache_free(self) -> float:
        """The share of the fullest cache that no answer holds."""
        return min(worker.free for worker in self._workers)

    def prepare(self, messages: Sequence[Mapping[str, str]], settings: Settings) -> Job:
        """A job that continues the conversation `messages`, each a `role` and a `content`.

        Raises: ConfigError: `MODEL_NOT_FOUND`, `MESSAGES_INVALID`, `CONTEXT_LENGTH_EXCEEDED`, `PIN_INVALID`.
        """
        return self._job(self._conversation(messages), settings)

    def prepare_text(self, prompt: str, settings: Settings) -> Job:
        """A job that continues a text as it is, without the base's chat template.

        Raises: ConfigError: as `prepare`; `PROMPT_EMPTY`.
        """
        tokens = self._read(prompt)
        if not tokens:
            raise ConfigError("PROMPT_EMPTY", "there is nothing to continue")
        return self._job(tokens, settings)

    def submit(self, job: Job, on_token: Callable[[Token], object] | None = None) -> Future[Answer]:
        """Write a job's answer; `on_token` is told each token, in the engine's thread.

        Raises: MissingError: `ENGINE_DEAD`; ConfigError: `MODEL_NOT_FOUND` if the expert was masked in between;
            RefusedError: with the code of `refuse`; `BASE_MISMATCH` if the base's files were changed since the start.
        """
        writing = Writing(job, self.experts, self.ends, self.decode, on_token)
        worker = self._base_worker() if job.wish is None else self._worker
        with self._masking:
            if self._refused is not None:
                raise RefusedError(self._refused, "nothing is answered here now")
            if any(self.experts[row] in self.masked for row in {*(job.wish or ())} - {NO_EXPERT}):
                raise self._no_such_model()
            worker.submit(writing)
        return writing.answer

    def cancel_all(self) -> None:
        """End every answer where it is."""
        for worker in self._workers:
            worker.cancel_all()

    def refuse(self, code: str) -> None:
        """From now on nothing is answered, until `mask` says again who may speak; what is written ends here."""
        with self._masking:
            self._refused = code
            self.cancel_all()

    def mask(self, sites: Collection[str]) -> None:
        """From now on no router chooses these sites' experts, and nobody can force them; what is written ends here.

        Raises: RefusedError: `EXPERT_UNMASKABLE` where the composition needs every expert, or none would be left.
        """
        rows = [row for row, site in enumerate(self.experts) if site in sites]
        masked = frozenset(self.experts[row] for row in rows)
        if rows and len(self.experts) - len(rows) < self._least:
            raise RefusedError("EXPERT_UNMASKABLE", "this release cannot answer without these experts")
        with self._masking:
            self._refused = None
            if masked == self.masked:
                return
            self.masked = masked
            if isinstance(self._chooser, PromptRouter | Router):
                scorer = self._chooser.scorer
                original = scorer.scorer if isinstance(scorer, MaskedScorer) else scorer
                self._chooser.scorer = MaskedScorer(original, rows) if rows else original
            self.cancel_all()

    def close(self) -> None:
        """End all answers and stop."""
        for worker in self._workers:
            worker.close()

    def decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    @cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""
        named = self._model.generation_config.eos_token_id
        also = named if isinstance(named, list) else [named]
        return frozenset(token for token in (self._tokenizer.eos_token_id, *also) if token is not None)

    @property
    def _least(self) -> int:
        """How many experts have to be left: those who always speak, whatever their scores are."""
        config = RouterConfig.model_validate(self.release.composition["router"])
        return {"identity": len(self.experts), "sampled": config.top_k}.get(config.estimator) or 1

    @property
    def _window(self) -> int:
        return int(self._model.config.get_text_config().max_position_embeddings)

    @property
    def _workers(self) -> list[Worker]:
        return [worker for worker in (self._worker, self._plain) if worker is not None]

    def _work(self, model: Any, router: PinnedRouter | None) -> Worker:
        """The model's worker: the fast one, if the model is of a kind that it takes."""
        worker: Worker | None = None
        if is_spread(model):  # the cache of continuous batching lies on one device
            log.warning("over several devices a model answers one request at a time")
        elif self._together:
            try:
                worker = batching.Worker(model, router, self._window)
            except (MissingError, ValueError, TypeError, AttributeError, NotImplementedError, KeyError) as error:
                log.warning("this model answers one request at a time: %s", type(error).__name__)
        worker = worker or sequential.Worker(model, router, self._window)
        worker.on_step = self._told_step
        return worker

    def _told_step(self, distinct: int) -> None:
        if self.on_step is not None:
            self.on_step(distinct)

    def _base_worker(self) -> Worker:
        """The base alone. The composed model cannot play it: the attention LoRA is merged into its weights.

        Raises: RefusedError: `BASE_MISMATCH` if its files were changed since the start.
        """
        with self._loading:
            if self._plain is None:
                check_base_bytes(self.release, resolve_base(self._base.path))
                model, _ = load_base(self._base.path, dtype=self._model.dtype, to_gpu=not self._spread)
                self._plain = self._work(over_gpus(model) if self._spread else model, None)
            return self._plain

    def _job(self, prompt: list[int], settings: Settings) -> Job:
        room = self.context - len(prompt)
        wanted = settings.max_tokens or min(DEFAULT_MAX_TOKENS, max(room, 1))
        if wanted > room:
            raise self._too_long(f"{len(prompt)} of the messages and {wanted} to write")
        return Job(prompt, wanted, settings.sampling(), settings.stop, self._wish(prompt, settings))

    def _read(self, text: str, **options: bool) -> list[int]:
        """The tokens of a text, unless it is so long that they cannot fit: to read all of it would take seconds."""
        if len(text) > self.context * self._longest_token:
            raise self._too_long(f"{len(text)} characters")
        return list(self._tokenizer(text, **options).input_ids)

    @cached_property
    def _longest_token(self) -> int:
        """In characters, or in the bytes that some vocabularies write as characters."""
        return max(map(len, self._tokenizer.get_vocab()))

    def _too_long(self, got: str) -> ConfigError:
        return ConfigError(
            "CONTEXT_LENGTH_EXCEEDED",
            "the messages and the answer do not fit the model",
            expected=f"at most {self.context} tokens",
            got=got,
            fix="shorten the messages or ask for fewer tokens",
        )

    def _wish(self, prompt: Sequence[int], settings: Settings) -> Layers | None:
        """Who is to speak at each layer: the expert asked for, or the one that a router of prompts has chosen."""
        model = settings.model
        if model in self.experts and model not in (AUTO, BASE):  # a site's bare name will do
            model = EXPERT_PREFIX + model
        if model not in self.models:
            raise self._no_such_model()
        pins = settings.pins if settings.force is None else (Pin(settings.force, 0, self.layers - 1), *settings.pins)
        if model == BASE:
            if pins:
                raise ConfigError("PIN_INVALID", "the base alone has no experts")
            return None
        chosen = NO_EXPERT
        if model != AUTO:
            chosen = self.experts.index(model.removeprefix(EXPERT_PREFIX))
        elif isinstance(self._chooser, PromptRouter):
            ids = torch.tensor([list(prompt)], device=self._model.device)
            (chosen,) = self._chooser.choose(self._model.get_input_embeddings()(ids), torch.ones_like(ids))
        wish = [chosen] * self.layers
        for pin in pins:
            wish[pin.first : pin.last + 1] = [self._row(pin)] * (pin.last + 1 - pin.first)
        return tuple(wish)

    def _no_such_model(self) -> ConfigError:
        return ConfigError("MODEL_NOT_FOUND", "there is no such model here", expected=", ".join(self.models))

    def _row(self, pin: Pin) -> int:
        if pin.expert not in self.experts or pin.expert in self.masked:
            raise ConfigError("PIN_INVALID", "there is no such expert here", expected=", ".join(self.experts))
        if not 0 <= pin.first <= pin.last < self.layers:
            raise ConfigError("PIN_INVALID", "there are no such layers", expected=f"0 to {self.layers - 1}, in order")
        return self.experts.index(pin.expert)

    def _conversation(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The conversation up to where the assistant begins to write, as `lm.prompt_ids` has it for one turn."""
        if self._tokenizer.chat_template is None:
            return self._read("".join(each["content"] + "\n" for each in messages))
        try:
            text = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise ConfigError(
                "MESSAGES_INVALID", "the base's chat template does not take these messages", got=type(error).__name__
            ) from error
        return self._read(text, add_special_tokens=False)
