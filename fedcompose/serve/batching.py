"""Many answers at once: transformers' continuous batching, with our routing, our sampling and our supervision.

In each forward call the tokens of all running requests lie in one row. Before it, every token's wish is put to the
router; after it, every request's next token is chosen with that request's own settings and told with its routes.

Four things about `ContinuousBatchingManager` decide how it is used here. Left alone it takes most of a machine's
memory for its cache: the size is given. A request that outgrows the cache ends its thread for good: `Worker.capacity`
says what fits, and nothing else is admitted. It shares the cache of equal prompts, which under different experts are
not equal: sharing is off. When its cache ran full it lets nobody in until an answer has reached its length, and not
when answers end earlier, as most do: see `_let_in`. Everything of it that is not public is used in this module alone.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput

from fedcompose.errors import MissingError
from fedcompose.model.controls import PinnedRouter
from fedcompose.model.router import NO_EXPERT, RoutingRecord
from fedcompose.serve.sampling import Sampling, choose
from fedcompose.serve.writing import Job, Writing

PAGE_TOKENS = 32  # of a request's cache at a time
STEP_TOKENS = 512  # in one forward call; a longer prompt is read in parts while others write on
MAX_TOGETHER = 64  # requests in one forward call
CACHED_TOKENS = 16384  # of all requests together, unless one full context needs more
RESERVE = 0.15  # of the cache, which the scheduler keeps for those who write already

log = logging.getLogger(__name__)


class Worker:
    """One model and the thread that runs it. `on_step` is told how many experts worked in a step, in that thread."""

    def __init__(self, model: Any, router: PinnedRouter | None, context: int) -> None:
        """`router` is the model's own, or None for a model without experts."""
        self._model, self._router = model, router
        self._writings: dict[str, Writing] = {}
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._record = RoutingRecord()
        self.on_step: Callable[[int], object] | None = None
        with ExitStack() as scope:
            if router is not None:
                scope.enter_context(model.routing.using(router))
                self._record = scope.enter_context(model.routing.recording())
            self._manager = _manager(model, context)
            self._manager.output_router = _Deaths(self._lost)
            self._manager.warmup()  # makes the processor; there is nothing to warm up without graphs
            self._processor = self._manager.batch_processor
            self._processor.model_runner._sample = self._sample
            self._let_in(self._processor.scheduler)
            self.capacity = int(self._processor.cache.num_blocks) * PAGE_TOKENS - PAGE_TOKENS
            scope.callback(model.register_forward_pre_hook(self._before).remove)
            self._start()
            scope.callback(self._manager.stop, block=True, hard_stop=True)
            scope.callback(atexit.unregister, self.close)
            self._prove()
            self._scope = scope.pop_all()

    @property
    def alive(self) -> bool:
        """Whether anything that is submitted will be answered."""
        status = self._manager.background_thread_status
        return bool(self._manager.is_running()) and status.can_accept_new_requests() is None

    @property
    def running(self) -> int:
        return len(self._processor.scheduler.active_requests)

    @property
    def waiting(self) -> int:
        return max(0, len(self._writings) - self.running)

    @property
    def free(self) -> float:
        """The share of the cache that nobody holds. Pages of ended answers are given back in the next step."""
        return float(self._processor.cache.compute_free_capacity())

    def submit(self, writing: Writing) -> None:
        """Write this answer, together with the others.

        Raises: MissingError: `ENGINE_DEAD` when the thread has ended.
        """
        name = str(next(self._numbers))
        with self._lock:
            self._writings[name] = writing
        writing.answer.add_done_callback(lambda _: self._forget(name))
        job = writing.job
        taken = self._manager.add_request(job.prompt, request_id=name, max_new_tokens=job.max_tokens)
        if taken is None or not self.alive:  # the second: it may have ended between the two
            writing.fail(engine_dead())
            raise engine_dead()
        job.when_cancelled(writing.cancel)

    def cancel_all(self) -> None:
        with self._lock:
            writings = list(self._writings.values())
        for writing in writings:
            writing.cancel()

    def close(self) -> None:
        """End all answers, then the thread."""
        self.cancel_all()
        self._scope.close()

    def _start(self) -> None:
        """As the manager's own `start`, whose thread would keep a process that forgot to close it from ending."""
        self._manager.background_thread_status.clear()
        thread = threading.Thread(target=self._manager._run_generation_loop, name="engine", daemon=True)
        self._manager._generation_thread = thread
        thread.start()
        atexit.register(self.close)

    def _let_in(self, scheduler: Any) -> None:
        """An answer that ended early makes room too. For us it is a request that was cancelled."""
        clear = scheduler.clear_cancelled_requests

        def clear_and_let_in() -> Any:
            if cleared := clear():
                scheduler.block_new_requests = False
            return cleared

        scheduler.clear_cancelled_requests = clear_and_let_in

    def _prove(self) -> None:
        """Write one token: not every model can be run in this way, and some say so only then.

        Raises: MissingError: `ENGINE_DEAD`.
        """
        wish = None if self._router is None else (NO_EXPERT,) * len(self._model.routing.points)
        probe = Writing(Job([0, 0], 1, Sampling(), (), wish), (), frozenset(), lambda tokens: "", None)
        self.submit(probe)
        probe.answer.result()

    def _forget(self, name: str) -> None:
        """An answer has ended, by itself or early: its pages are free again from the next step on."""
        with self._lock:
            self._writings.pop(name, None)
        self._manager.cancel_request(name)

    def _lost(self, name: str, error: str) -> None:
        with self._lock:
            writing = self._writings.get(name)
        if writing is not None:
            log.error("the engine failed: %s", error)
            writing.fail(engine_dead())

    def _before(self, model: Any, arguments: Any) -> None:
        """Say whose tokens the forward call holds that begins now."""
        if self._router is None:
            return
        self._record.calls.clear()
        free = (NO_EXPERT,) * len(model.routing.points)
        rows = self._rows
        self._router.pin([self._wish(row) or free for row in rows], [row.query_length for row in rows])

    def _wish(self, row: Any) -> tuple[int, ...] | None:
        writing = self._writings.get(row.state.request_id)
        return None if writing is None else writing.job.wish

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        """Choose the next token of each request whose prompt has been read, and tell it; in place of the manager's."""
        ends = itertools.accumulate(row.query_length for row in self._rows)
        told = [(row, end - 1) for row, end in zip(self._rows, ends, strict=True) if row.has_new_token]
        routes = self._routes([last for _, last in told])
        for number, (row, _) in enumerate(told):
            writing = self._writings.get(row.state.request_id)
            if writing is None:  # cancelled as it came: the manager empties its queue of requests first
                self._manager.cancel_request(row.state.request_id)
            elif not writing.done:
                chosen = choose(scores[0, number], writing.job.sampling, writing.generator)
                output_ids[0, number] = chosen.id
                writing.hear(chosen, tuple(routes[number]))

    def _routes(self, tokens: list[int]) -> list[list[int]]:
        """Of each of these tokens of the forward call that has just ended, the expert at each point."""
        if self._router is None:
            return [[] for _ in tokens]
        self._router.unpin()
        choices = torch.stack([decision.choice.flatten() for decision in self._record.calls[-1].values()])
        if self.on_step is not None:
            self.on_step(_distinct(choices))
        routes: list[list[int]] = choices[:, tokens].T.tolist()
        return routes

    @property
    def _rows(self) -> list[Any]:
        """The requests of the forward call, in the order of their tokens."""
        rows: list[Any] = self._processor.inputs_and_outputs.requests_in_batch
        return rows


class _Deaths(OutputRouter):
    """Hears of requests that the manager ends. Only failures are news; tokens were told when they were chosen."""

    def __init__(self, lost: Callable[[str, str], object]) -> None:
        super().__init__()
        self._lost = lost

    def deliver(self, output: GenerationOutput) -> None:
        if output.error is not None:
            self._lost(output.request_id, output.error)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            self.deliver(output)


def _manager(model: Any, context: int) -> Any:
    return model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=1, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=_pages(model, context),
            max_batch_tokens=STEP_TOKENS,
            max_requests_per_batch=MAX_TOGETHER,
            safety_margin=RESERVE,
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
        ),
    )


def engine_dead() -> MissingError:
    return MissingError(
        "ENGINE_DEAD",
        "the engine has stopped and answers nothing any more",
        fix="start the server again; its log says why",
    )


def _distinct(choices: Tensor) -> int:
    """How many experts worked at the busiest point, (points, tokens)."""
    worked = torch.zeros(len(choices), int(choices.max()) + 2, dtype=torch.bool, device=choices.device)
    return int(worked.scatter_(1, choices - NO_EXPERT, True).sum(1).max())


def _pages(model: Any, context: int) -> int:
    """The size of the cache: one full context or more, and no more than half of the memory that is left."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    page_bytes = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize * PAGE_TOKENS
    wanted = max(context + PAGE_TOKENS, CACHED_TOKENS) // PAGE_TOKENS + 1
    return max(2, int(min(wanted, _free_bytes(model.device) // 2 // page_bytes)))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available: int = psutil.virtual_memory().available
    return available
