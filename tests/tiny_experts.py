"""Random experts for the tiny base, made by PEFT itself, and a router for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedcompose.model.learned import Router
from fedcompose.model.scorers import LinearScorer

TARGETS = ("gate_proj", "up_proj", "down_proj")


def make_tiny_router(experts: int, seed: int = 0, hidden: int = 32, strength: float = 1.0) -> Router:
    """The default router, untrained."""
    router = Router(LinearScorer((hidden,), experts, seed))
    router.scorer.weights[0].data *= strength
    return router


def make_tiny_expert(base: Path, folder: Path, seed: int = 0, strength: float = 0.3, **options: Any) -> Path:
    """A PEFT folder whose A and B are random, so that the expert visibly changes the base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS), **options}
    settings.setdefault("task_type", "CAUSAL_LM")
    generator = torch.Generator().manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = strength * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder
