"""Sample completions in batches: each prompt is read once, its cache repeated, finished rows leave the batch.

One loop serves training, distilling and evaluating, on plain, adapted and composed models alike. It differs from
`generate` only in work saved: `count` samples of a prompt share one prefill, and a row costs nothing once it has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

MAX_ROWS = 96  # rows decoded together; more gained nothing on two CPU cores


@dataclass(frozen=True)
class Completion:
    """One sampled turn; `tokens` ends with the end-of-turn token when `finished`."""

    tokens: tuple[int, ...]
    text: str
    finished: bool


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    count: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    on_done: Callable[[int], None] | None = None,
) -> list[list[Completion]]:
    """`count` completions of every prompt, in the order of the prompts; temperature 0 is greedy.

    `on_done(n)` is told how many prompts each finished batch held.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    per_batch = max(1, max_rows // count)
    results: list[list[Completion]] = [[] for _ in prompts]
    for start in range(0, len(by_length), per_batch):
        chosen = by_length[start : start + per_batch]
        rows = _decode(
            model,
            tokenizer,
            [prompts[index] for index in chosen],
            count,
            temperature,
            max_new_tokens,
            generator,
        )
        for position, index in enumerate(chosen):
            results[index] = [
                _completion(tokenizer, tokens) for tokens in rows[position * count : (position + 1) * count]
            ]
        if on_done:
            on_done(len(chosen))
    return results


@torch.no_grad()
def _decode(
    model: Any, tokenizer: Any, prompts: list[Sequence[int]], count: int, temperature: float, max_new_tokens: int,
    generator: torch.Generator,
) -> list[list[int]]:  # fmt: skip
    """Token rows, `count` per prompt, each up to and including its end-of-turn token."""
    device = generator.device
    width = max(map(len, prompts))
    pads = [width - len(prompt) for prompt in prompts]
    ids = torch.tensor(
        [[tokenizer.pad_token_id] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)],
        device=device,
    )
    seen = (torch.arange(width, device=device)[None, :] >= torch.tensor(pads, device=device)[:, None]).long()
    cache = DynamicCache(config=model.config)
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    # A tensor of positions, not a number: the number slices, and a slice sends the output layer down a path that copies
    # its whole weight once per row.
    last = torch.tensor([width - 1], device=device)
    logits = model(
        input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=cache, logits_to_keep=last
    ).logits[:, -1]
    if count > 1:
        cache.batch_repeat_interleave(count)
        seen, positions, logits = (part.repeat_interleave(count, dim=0) for part in (seen, positions, logits))
    position = positions[:, -1:] + 1
    rows: list[list[int]] = [[] for _ in range(len(prompts) * count)]
    alive = list(range(len(rows)))
    for step in range(max_new_tokens):
        chosen = _choose(logits, temperature, generator)
        for row, token in zip(alive, chosen.tolist(), strict=True):
            rows[row].append(token)
        going = (chosen != tokenizer.eos_token_id).nonzero().flatten()
        if step == max_new_tokens - 1 or not len(going):
            break
        if len(going) < len(alive):
            alive = [alive[index] for index in going.tolist()]
            cache.batch_select_indices(going)
            seen, position, chosen = seen[going], position[going], chosen[going]
        seen = torch.cat([seen, seen.new_ones(len(alive), 1)], dim=1)
        logits = model(
            input_ids=chosen[:, None], attention_mask=seen, position_ids=position, past_key_values=cache
        ).logits[:, -1]
        position = position + 1
    return rows


def _choose(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """(rows,) next token of each row."""
    if temperature == 0:
        return logits.argmax(-1)
    # One random number per row against the running sum of the probabilities: drawing one per token of the vocabulary,
    # as the Gumbel trick does, took a tenth of a training step.
    running = torch.softmax(logits.float() / temperature, dim=-1).cumsum(-1)
    draws = torch.rand(len(logits), 1, device=logits.device, generator=generator) * running[:, -1:]
    return torch.searchsorted(running, draws, right=True).flatten().clamp(max=logits.shape[-1] - 1)


def _completion(tokenizer: Any, tokens: list[int]) -> Completion:
    finished = tokens[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(tokens[:-1] if finished else tokens, skip_special_tokens=True)
    return Completion(tuple(tokens), text.strip(), finished)
