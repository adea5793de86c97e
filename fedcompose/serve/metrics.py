"""Numbers for Prometheus: how long answers take, how many wait, and which expert writes how much.

Labels are paths of this server, statuses, and the names of the release; nothing that a client wrote.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER_PATH = "other"
PATHS = ("/", "/health", "/ready", "/metrics", "/release", "/v1/models", "/v1/chat/completions", "/v1/completions")
FIRST_TOKEN_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
NEXT_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The numbers of one server. Every method may be called from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self.clock = clock
        self._requests = Counter(
            "fedcompose_requests", "Answers by path and status.", ["path", "status"], registry=self.registry
        )
        self.first = Histogram(
            "fedcompose_time_to_first_token_seconds",
            "From the request to its first token.",
            buckets=FIRST_TOKEN_S,
            registry=self.registry,
        )
        self.next = Histogram(
            "fedcompose_inter_token_seconds",
            "Between two tokens of an answer.",
            buckets=NEXT_TOKEN_S,
            registry=self.registry,
        )
        self.tokens = Counter(
            "fedcompose_tokens", "Tokens written, by the expert that wrote most of each.", ["expert"],
            registry=self.registry,
        )  # fmt: skip
        self._distinct = Histogram(
            "fedcompose_distinct_experts_per_step",
            "Experts that worked in one step of the model; each is one more set of weights to read.",
            buckets=(1, 2, 3, 4, 6, 8, 12, 16, 32, 64),
            registry=self.registry,
        )
        self._waiting = Gauge("fedcompose_requests_waiting", "Not begun yet.", registry=self.registry)
        self._running = Gauge("fedcompose_requests_running", "Being written.", registry=self.registry)
        self._cache = Gauge(
            "fedcompose_cache_free_ratio", "Share of the cache that no answer holds.", registry=self.registry
        )

    def load(self, waiting: Callable[[], float], running: Callable[[], float], cache_free: Callable[[], float]) -> None:
        """How to look up the queue and the cache whenever somebody reads the numbers."""
        self._waiting.set_function(waiting)
        self._running.set_function(running)
        self._cache.set_function(cache_free)

    def answered(self, path: str, status: int) -> None:
        """Unknown paths count as one, so that a stranger cannot make rows."""
        self._requests.labels(path if path in PATHS else OTHER_PATH, str(status)).inc()

    def step(self, experts: int) -> None:
        """One step of the model, and how many experts worked in it; none in a step of the base."""
        if experts:
            self._distinct.observe(experts)

    def begin(self) -> Watch:
        """For one answer, at the moment it is asked for."""
        return Watch(self)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)


@dataclass
class Watch:
    """Follows one answer."""

    metrics: Metrics
    _last: float = field(init=False)
    _begun: bool = False

    def __post_init__(self) -> None:
        self._last = self.metrics.clock()

    def token(self, expert: str) -> None:
        """A token was written, most of it by `expert`."""
        now = self.metrics.clock()
        (self.metrics.next if self._begun else self.metrics.first).observe(now - self._last)
        self._last, self._begun = now, True
        self.metrics.tokens.labels(expert).inc()
