"""Load a base model from a local folder, in the number format this machine is fastest in.

Nothing here looks anything up on a network, and no code from a model folder is ever run.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from fedcompose.errors import ConfigError

PROBE_SHAPE = (64, 512, 1536)  # rows, in, out: about one MLP projection of a small model
PROBE_SPEEDUP = 1.3  # bfloat16 must win clearly; a coin flip must not decide the numbers of a run


@functools.cache
def fast_dtype() -> torch.dtype:
    """bfloat16 where this processor multiplies it clearly faster than float32, else float32."""
    if torch.cuda.is_available():
        return torch.bfloat16
    wide, narrow = (_matmul_seconds(dtype) for dtype in (torch.float32, torch.bfloat16))
    return torch.bfloat16 if narrow * PROBE_SPEEDUP < wide else torch.float32


def load_base(
    folder: Path, dtype: torch.dtype | None = None, to_gpu: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base in evaluation mode with every parameter frozen, on the GPU if there is one, and its tokenizer.

    Raises: ConfigError: `BASE_UNUSABLE` when the folder holds no language model, causal or encoder and decoder.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        two = AutoConfig.from_pretrained(folder, local_files_only=True).is_encoder_decoder
        model = (AutoModelForSeq2SeqLM if two else AutoModelForCausalLM).from_pretrained(
            folder, dtype=dtype or fast_dtype(), local_files_only=True, use_safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "BASE_UNUSABLE", f"{folder} does not load as a language model", got=type(error).__name__
        ) from error
    model.eval().requires_grad_(False)
    if to_gpu and torch.cuda.is_available():
        model.to("cuda")  # type: ignore[arg-type]
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of one user turn, up to where the assistant begins to write."""
    if tokenizer.chat_template is None:
        return list(tokenizer(text + "\n").input_ids)
    chat = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(rendered, add_special_tokens=False).input_ids)


def completion_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of one finished assistant turn, closed by the end-of-turn token."""
    return [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]


def pad_right(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """(rows, longest) int64."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def _matmul_seconds(dtype: torch.dtype, repeats: int = 5) -> float:
    rows, inputs, outputs = PROBE_SHAPE
    left, right = torch.ones(rows, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.nn.functional.linear(left, right)
        best = min(best, time.perf_counter() - start)
    return best


@contextmanager
def merged(model: Any) -> Iterator[None]:
    """Fold a PEFT model's LoRA into its frozen weights for the block, then put the very same weights back.

    Sampling reads every weight once per token, so an unmerged adapter costs a quarter of the time of a small model. The
    merged weights are copies: nothing is subtracted afterwards, so no rounding accumulates.
    """
    layers: list[Any] = [
        module for module in model.modules() if isinstance(module, LoraLayer) and module.active_adapters
    ]
    originals = [layer.get_base_layer().weight.data for layer in layers]
    try:
        with torch.no_grad():
            for layer, weight in zip(layers, originals, strict=True):
                for name in layer.active_adapters:
                    delta = layer.get_delta_weight(name).float()
                    layer.get_base_layer().weight.data = (weight.float() + delta).to(weight.dtype)
        with model.disable_adapter():
            yield
    finally:
        for layer, weight in zip(layers, originals, strict=True):
            layer.get_base_layer().weight.data = weight
