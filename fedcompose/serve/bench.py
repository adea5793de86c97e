"""How fast a release answers: many requests together, the same ones in static batches, and by another server.

Everybody gets the same prompts and writes the same number of tokens, greedily; nobody stops at an end of turn, so that
all do the same work. CPU seconds are this process's own: on a machine that is busy otherwise they say more than time.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from fedcompose.model.lm import prompt_ids
from fedcompose.serve.engine import Engine, Settings
from fedcompose.tasks import generator_task, get_task, held_out

GENERATORS = ("chain_sum", "extreme", "order_statistic", "clock")  # prompts of different lengths
PERCENTILE = 95


@dataclass(frozen=True)
class Timing:
    """One way to answer, at one number of requests at a time."""

    how: str
    together: int
    requests: int
    tokens: int
    seconds: float
    cpu_seconds: float | None
    first_token_s: float
    first_token_p95_s: float
    next_token_s: float
    next_token_p95_s: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_per_second": self.tokens_per_second}


def questions(count: int) -> list[str]:
    """Public prompts of several kinds in turn."""
    kinds = [(get_task(generator_task(name)), held_out(name, {}, count)) for name in GENERATORS]
    return [kinds[i % len(kinds)][0].prompt(kinds[i % len(kinds)][1][i].question) for i in range(count)]


def measure_engine(engine: Engine, prompts: Sequence[str], together: int, tokens: int) -> Timing:
    """Our engine, asked by as many threads as there are requests at a time."""

    def ask(prompt: str) -> list[float]:
        times = [time.perf_counter()]
        job = engine.prepare([{"role": "user", "content": prompt}], Settings(max_tokens=tokens))
        engine.submit(job, lambda _: times.append(time.perf_counter())).result()
        return times

    with _endless(engine):
        return _timed("fedcompose", together, prompts, ask)


def measure_static(model: Any, tokenizer: Any, prompts: Sequence[str], together: int, tokens: int) -> Timing:
    """`generate` on left-padded batches: each waits for the whole of the one before."""
    found: list[list[float]] = []
    began, cpu = time.perf_counter(), time.process_time()
    for start in range(0, len(prompts), together):
        batch = prompts[start : start + together]
        clock = _Clock()
        rows = [prompt_ids(tokenizer, each) for each in batch]
        width = max(map(len, rows))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        found += [clock.times] * len(batch)
    return _timing("transformers", together, found, time.perf_counter() - began, time.process_time() - cpu)


def measure_url(url: str, key: str | None, model: str, prompts: Sequence[str], together: int, tokens: int) -> Timing:
    """Any server that speaks the OpenAI protocol, say vLLM, over its streams; `ignore_eos` is vLLM's word."""
    import httpx

    headers = {"Authorization": f"Bearer {key}"} if key else {}

    def ask(prompt: str) -> list[float]:
        times = [time.perf_counter()]
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens}
        body |= {"stream": True, "temperature": 0, "ignore_eos": True}
        with (
            httpx.Client(timeout=600, headers=headers) as http,
            http.stream("POST", f"{url}/v1/chat/completions", json=body) as reply,
        ):
            reply.raise_for_status()
            for line in reply.iter_lines():
                if _has_text(line):
                    times.append(time.perf_counter())
        return times

    timing = _timed(url, together, prompts, ask)
    return Timing(**{**asdict(timing), "cpu_seconds": None})


def _has_text(line: str) -> bool:
    if not line.startswith("data: {"):
        return False
    choices = json.loads(line.removeprefix("data: ")).get("choices", [])
    return any(choice["delta"].get("content") for choice in choices)


def _timed(how: str, together: int, prompts: Sequence[str], ask: Callable[[str], list[float]]) -> Timing:
    began, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(together) as threads:
        found = list(threads.map(ask, prompts))
    return _timing(how, together, found, time.perf_counter() - began, time.process_time() - cpu)


def _timing(how: str, together: int, found: Sequence[Sequence[float]], seconds: float, cpu: float) -> Timing:
    """`found`: of each request, when it was asked and when each of its tokens came."""
    first = [times[1] - times[0] for times in found]
    later = [after - before for times in found for before, after in pairwise(times[1:])] or [0.0]
    return Timing(
        how=how,
        together=together,
        requests=len(found),
        tokens=sum(len(times) - 1 for times in found),
        seconds=seconds,
        cpu_seconds=cpu,
        first_token_s=statistics.median(first),
        first_token_p95_s=_high(first),
        next_token_s=statistics.median(later),
        next_token_p95_s=_high(later),
    )


def _high(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * PERCENTILE // 100)]


class _Clock(StoppingCriteria):
    """Never stops anything; notes when each step was done."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _endless(engine: Engine) -> Iterator[None]:
    """Inside, no token ends an answer."""
    before = engine.ends
    engine.__dict__["ends"] = frozenset[int]()
    try:
        yield
    finally:
        engine.__dict__["ends"] = before
