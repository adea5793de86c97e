"""What a model thinks of a lesson: how likely its completion is, and which of its tokens are real.

Works for models that continue a text (Llama, Mamba, ...) and for those that read one and write another (T5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedcompose.model.lm import pad_right
from fedcompose_coordinator.lessons import Row

IGNORED = -100  # cross entropy's own mark for positions that teach nothing


@dataclass(frozen=True)
class Stream:
    """A sequence of tokens that a model's blocks read; `real` and `writes` are (rows, width) bool.

    `writes`: the positions that predict a token of the completion.
    """

    real: Tensor
    writes: Tensor


@dataclass(frozen=True)
class Pass:
    """Rows as one forward pass reads them; `labels` (rows, width) at the position that predicts each."""

    inputs: dict[str, Tensor]
    labels: Tensor
    streams: tuple[Stream, ...]


def make_pass(model: Any, rows: Sequence[Row], pad_id: int) -> Pass:
    """Padded on the right. Streams of one pass have different widths, by which they are told apart."""
    device = next(model.parameters()).device
    make = _two_streams if model.config.is_encoder_decoder else _one_stream
    made = make(model, rows, pad_id)
    return Pass(
        {name: tensor.to(device) for name, tensor in made.inputs.items()}, made.labels.to(device),
        tuple(Stream(each.real.to(device), each.writes.to(device)) for each in made.streams),
    )  # fmt: skip


def completion_losses(model: Any, batch: Pass) -> Tensor:
    """Σ −log p of the completion's tokens given what stands before them, for each row; (rows,) float32.

    Only positions that predict a completion token meet the vocabulary matrix, the largest of a small model.
    """
    taught = batch.labels != IGNORED
    if model.config.is_encoder_decoder:
        logits = model(**batch.inputs, use_cache=False).logits[taught].float()
    else:
        hidden = model.base_model(**batch.inputs, use_cache=False).last_hidden_state
        head = model.get_output_embeddings()
        logits = head(hidden[taught].to(head.weight.dtype)).float()  # Mamba keeps its sums in float32
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    each = functional.cross_entropy(logits, batch.labels[taught], reduction="none")
    return each.new_zeros(len(taught)).index_add(0, taught.nonzero()[:, 0], each)


def _one_stream(model: Any, rows: Sequence[Row], pad_id: int) -> Pass:
    real = pad_right([[1] * len(row.ids) for row in rows], 0)
    next_ids = [[IGNORED] * (row.prompt - 1) + [*row.ids[row.prompt :], IGNORED] for row in rows]
    labels = pad_right(next_ids, IGNORED)
    inputs = {"input_ids": pad_right([row.ids for row in rows], pad_id), "attention_mask": real}
    return Pass(inputs, labels, (Stream(real.bool(), labels != IGNORED),))


def _two_streams(model: Any, rows: Sequence[Row], pad_id: int) -> Pass:
    prompts, completions = ([row.ids[: row.prompt] for row in rows], [row.ids[row.prompt :] for row in rows])
    asked = pad_right([[1] * len(ids) for ids in prompts], 0)
    labels = pad_right(completions, IGNORED)
    if labels.shape == asked.shape:
        labels = functional.pad(labels, (0, 1), value=IGNORED)
    start = torch.full((len(rows), 1), model.config.decoder_start_token_id)
    before = torch.cat([start, labels[:, :-1].where(labels[:, :-1] != IGNORED, pad_id)], dim=1)
    written = labels != IGNORED
    inputs = {"input_ids": pad_right(prompts, pad_id), "attention_mask": asked, "decoder_input_ids": before}
    reads = asked.bool()
    return Pass(inputs, labels, (Stream(reads, torch.zeros_like(reads)), Stream(written, written)))
