"""A small real federation for tests: real keys, a tiny base, sites with random experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def make_random_expert(
    base: Path, folder: Path, *, seed: int = 0, dtype: str = "float32", **lora: Any
) -> Path:
    """A PEFT folder as `save_pretrained` writes it, with random weights that change the base's outputs."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    options = {
        "r": 4,
        "lora_alpha": 8,
        "task_type": "CAUSAL_LM",
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
    }
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**{**options, **lora}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        if "lora_" in name:
            parameter.data = parameter.data.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder
