"""One answer at a time, by transformers' `generate`: for the models that continuous batching does not take.

A job has the model, and whom it forces to speak, to itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from fedcompose.model.controls import PinnedRouter
from fedcompose.model.router import RoutingRecord
from fedcompose.serve.sampling import choose
from fedcompose.serve.writing import Writing


class Worker:
    """One model and the thread that runs it; the same to use as `batching.Worker`."""

    alive, free = True, 1.0  # each answer has a cache of its own, and takes it along

    def __init__(self, model: Any, router: PinnedRouter | None, context: int) -> None:
        self._model, self._router, self.capacity = model, router, context
        self._writings: set[Writing] = set()
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self.on_step: Callable[[int], object] | None = None
        self.running = 0

    @property
    def waiting(self) -> int:
        return max(0, len(self._writings) - self.running)

    def submit(self, writing: Writing) -> None:
        """Write this answer after those before it."""
        with self._lock:
            self._writings.add(writing)
        writing.answer.add_done_callback(lambda _: self._forget(writing))
        writing.job.when_cancelled(writing.cancel)
        self._thread.submit(self._write, writing)

    def cancel_all(self) -> None:
        with self._lock:
            writings = list(self._writings)
        for writing in writings:
            writing.cancel()

    def close(self) -> None:
        """End all answers, then the thread."""
        self.cancel_all()
        self._thread.shutdown()

    def _forget(self, writing: Writing) -> None:
        with self._lock:
            self._writings.discard(writing)

    def _write(self, writing: Writing) -> None:
        if writing.done:
            return
        self.running = 1
        try:
            self._generate(writing)
        except Exception as error:
            writing.fail(error)
        finally:
            self.running = 0
            writing.cancel()  # nobody waits for an answer that nobody writes

    def _generate(self, writing: Writing) -> None:
        prompt = torch.tensor([writing.job.prompt], device=self._model.device)
        with ExitStack() as scope:
            record = RoutingRecord()
            if self._router is not None and writing.job.wish is not None:
                scope.enter_context(self._model.routing.using(self._router))
                record = scope.enter_context(self._model.routing.recording())
                self._router.pin([writing.job.wish])
                scope.callback(self._router.unpin)
            self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=writing.job.max_tokens,
                do_sample=False,
                repetition_penalty=1.0,
                logits_processor=LogitsProcessorList([_Choosing(writing, record, self.on_step)]),
                stopping_criteria=StoppingCriteriaList([_Done(writing)]),
            )


class _Choosing(LogitsProcessor):
    """Chooses the token, tells it, and leaves `generate` no other."""

    def __init__(self, writing: Writing, record: RoutingRecord, on_step: Callable[[int], object] | None) -> None:
        self._writing, self._record, self._on_step = writing, record, on_step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = choose(scores[0].float(), self._writing.job.sampling, self._writing.generator)
        decided = self._record.calls[-1].values() if self._record.calls else ()
        layers = tuple(int(decision.choice.flatten()[-1]) for decision in decided)
        self._record.calls.clear()
        if self._on_step and layers:
            self._on_step(1)
        self._writing.hear(chosen, layers)
        only = torch.full_like(scores, -torch.inf)
        only[:, chosen.id] = 0
        return only


class _Done(StoppingCriteria):
    def __init__(self, writing: Writing) -> None:
        self._writing = writing

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self._writing.done, device=input_ids.device)
