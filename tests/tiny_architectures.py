"""Two-layer random models of every architecture that experts are routed in, and the linears that they change."""

from __future__ import annotations

from typing import Any

MLP = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MAMBA = ("in_proj", "x_proj")  # PEFT refuses out_proj
T5 = ("q", "v")
TARGETS: dict[str, tuple[str, ...]] = {
    "Llama": MLP, "Qwen2": MLP, "Qwen3": MLP, "Gemma2": MLP, "Gemma3Text": MLP, "Mistral": MLP,
    "Mamba": MAMBA, "FalconMamba": MAMBA, "T5": T5,
}  # fmt: skip
_COMMON: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_TRANSFORMER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip
_MAMBA: dict[str, Any] = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 4}
_T5: dict[str, Any] = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
}  # fmt: skip


def make_tiny(architecture: str, seed: int = 0) -> Any:
    """A random model in evaluation mode, frozen, whose weights are large enough for tokens to matter."""
    import torch
    import transformers

    sizes = {"T5": _T5, "Mamba": _MAMBA, "FalconMamba": _MAMBA}.get(architecture, _TRANSFORMER)
    window = {"sliding_window": 8} if architecture in ("Gemma2", "Gemma3Text", "Mistral") else {}
    config: Any = getattr(transformers, f"{architecture}Config")(**_COMMON, **sizes, **window)
    suffix = "ForConditionalGeneration" if architecture == "T5" else "ForCausalLM"
    name = architecture.removesuffix("Text")
    torch.manual_seed(seed)
    model = getattr(transformers, name + suffix)(config)
    for parameter in model.parameters():
        if parameter.ndim == 2 and architecture in ("Llama", "Qwen2", "Qwen3", "Gemma2", "Gemma3Text", "Mistral"):
            parameter.data *= 4
    return model.eval().requires_grad_(False)
