"""A training run that was cut off goes on: weights, optimizer state and log in one file, replaced in one step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as dump_safetensors
from torch import Tensor, nn

from fedcompose.files import write_atomic


def save_checkpoint(
    path: Path, inputs: str, trained: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, log: Sequence[Any]
) -> None:
    """`inputs` names the run; the log tells how far it came."""
    tensors: dict[str, Tensor] = {}
    for index, parameter in enumerate(trained):
        state = optimizer.state[parameter]
        parts = {"weight": parameter.detach(), **{key: state[key] for key in ("exp_avg", "exp_avg_sq", "step")}}
        tensors |= {f"{index}.{key}": value.cpu().contiguous() for key, value in parts.items()}
    metadata = {"inputs": inputs, "log": json.dumps(list(log))}
    write_atomic(path, dump_safetensors(tensors, metadata=metadata))


def resume(
    path: Path, inputs: str, trained: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
) -> list[dict[str, Any]]:
    """The log of the steps already done, their state restored; empty without a checkpoint of this run."""
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError):
        return []
    if metadata.get("inputs") != inputs:
        return []
    for index, parameter in enumerate(trained):
        parameter.data.copy_(tensors[f"{index}.weight"])
        optimizer.state[parameter] = {
            "step": tensors[f"{index}.step"],
            **{key: tensors[f"{index}.{key}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")},
        }
    log: list[dict[str, Any]] = json.loads(metadata["log"])
    return log
