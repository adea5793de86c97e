"""What it costs a server to know who wrote each token: the same answers with routes recorded and told, and without.

    python benchmarks/capture.py RELEASE --pairs 30

In each pair the engine answers the same questions twice, once with capture and once without, in alternating order, and
counts its own processor time. `ratio` is the median over the pairs with its 95 % interval (of order statistics, so it
assumes nothing about the noise). `blank` is the same for pairs of which both are without capture: what the clock
makes of equal work. The server has no switch for it, so it is taken out of the engine here. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fedcompose.bases import resolve_base
from fedcompose.release import ReceivedRelease
from fedcompose.serve.batching import Worker
from fedcompose.serve.bench import measure_engine, questions
from fedcompose.serve.engine import Engine
from fedcompose.standing import verify_for_use


@contextmanager
def silent(worker: Worker) -> Iterator[None]:
    """Inside, nothing is recorded and nobody is told who speaks; the router decides as ever."""
    routing, router, tell = worker._model.routing, worker._router, worker._routes
    record = routing._record

    def no_routes(tokens: list[int]) -> list[list[int]]:
        assert router is not None
        router.unpin()
        return [[] for _ in tokens]

    routing._record, worker._routes = None, no_routes  # type: ignore[method-assign]
    try:
        yield
    finally:
        routing._record, worker._routes = record, tell  # type: ignore[method-assign]


def cpu_seconds(engine: Engine, prompts: Sequence[str], tokens: int, capture: bool) -> float:
    began = time.process_time()
    if capture:
        measure_engine(engine, prompts, len(prompts), tokens)
    else:
        assert isinstance(engine._worker, Worker), "this model answers one at a time"
        with silent(engine._worker):
            measure_engine(engine, prompts, len(prompts), tokens)
    return time.process_time() - began


def compare(engine: Engine, prompts: Sequence[str], tokens: int, pairs: int, kinds: tuple[bool, bool]) -> list[float]:
    """The ratio of each pair, the first kind over the second."""
    ratios = []
    for number in range(pairs):
        order = (0, 1) if number % 2 else (1, 0)
        print(f"pair {number + 1} of {pairs}", file=sys.stderr)
        spent = {place: cpu_seconds(engine, prompts, tokens, kinds[place]) for place in order}
        ratios.append(spent[0] / spent[1])
    return ratios


def summary(ratios: Sequence[float]) -> dict[str, Any]:
    """The median and the order statistics that hold it with a probability of at least 95 %."""
    ordered, n = sorted(ratios), len(ratios)
    below, place = 0.0, 0
    while below + math.comb(n, place) / 2**n <= 0.025:
        below += math.comb(n, place) / 2**n
        place += 1
    low, high = (ordered[place - 1], ordered[n - place]) if place else (None, None)
    return {"pairs": n, "median": statistics.median(ordered), "low": low, "high": high, "each": list(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", type=Path)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--requests", type=int, default=8, help="answered together")
    parser.add_argument("--tokens", type=int, default=24, help="of each answer")
    parser.add_argument("--root-fingerprint", action="append")
    parser.add_argument("--base")
    asked = parser.parse_args()
    release = verify_for_use(ReceivedRelease(asked.release), asked.root_fingerprint)
    engine = Engine(release, asked.base and resolve_base(asked.base), torch.float32)
    prompts = questions(asked.requests)
    try:
        compare(engine, prompts, asked.tokens, 1, (True, False))  # the first calls are slower than all others
        blank = compare(engine, prompts, asked.tokens, asked.pairs // 2, (False, False))
        ratio = compare(engine, prompts, asked.tokens, asked.pairs, (True, False))
    finally:
        engine.close()
    told = {"requests": asked.requests, "tokens": asked.tokens, "blank": summary(blank), "ratio": summary(ratio)}
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
