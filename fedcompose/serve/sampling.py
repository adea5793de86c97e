"""Choose a token: greedily, or by chance with a generator of the request's own.

A request's random numbers are its own, so a seed repeats an answer whoever else is being answered. Log-probabilities
are those of the model, before temperature and top_p, as OpenAI's are.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_TEMPERATURE = 1e-3  # below it sampling is greedy anyway, and dividing by it overflows


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `logprobs`: None, or of how many likely tokens to tell besides the chosen one."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE

    def generator(self, choice: int = 0) -> torch.Generator:
        """The random numbers of one of the answers to a request."""
        if self.seed is None:
            return torch.Generator().manual_seed(secrets.randbits(63))
        name = f"{self.seed}/{choice}".encode()
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:7], "big"))


@dataclass(frozen=True)
class Chosen:
    """A token and, where asked for, how likely the model found it, and which it found likeliest."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Chosen:
    """The next token by its logits (vocabulary,) float32."""
    token = int(logits.argmax()) if sampling.greedy else _draw(logits, sampling, generator)
    if sampling.logprobs is None:
        return Chosen(token)
    logprobs = logits.log_softmax(-1)
    values, tokens = logprobs.topk(min(sampling.logprobs, len(logprobs)))
    return Chosen(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))


def _draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One random number against the running sum of the probabilities, likeliest first where only those count."""
    probabilities = (logits / sampling.temperature).softmax(-1)
    order = None
    if sampling.top_p < 1:
        probabilities, order = probabilities.sort(descending=True, stable=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = torch.where(before < sampling.top_p, probabilities, 0.0)
    running = probabilities.double().cumsum(-1)
    drawn = torch.rand((), generator=generator, dtype=torch.float64).to(running.device) * running[-1]
    # A token of probability 0 is never drawn: it does not raise the sum.
    place = int(torch.searchsorted(running, drawn, right=True))
    if place == len(running):  # the product was rounded up to the whole sum
        place = int(probabilities.argmax())
    return place if order is None else int(order[place])
