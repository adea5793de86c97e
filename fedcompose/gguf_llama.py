"""Rewrite one Llama from the GGUF format as an ordinary Hugging Face folder, the same bytes on every machine.

Sites and coordinator agree on a base by the digest of its files, so the conversion must not depend on which
library version wrote it: weights are dequantised in numpy and the small files are written from the GGUF's own
fields. Nothing of the model runs here and no torch is needed. The caller has checked the file's digest; this
is no reader for files of unknown origin.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedcompose.files import dump_json, write_atomic, write_json

# ChatML without the published template's default system message, which costs 21 tokens in every prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONTROL_TOKEN = 3  # token_type of special tokens in GGUF

_OUTSIDE_BLOCKS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INSIDE_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_llama(gguf_file: Path, folder: Path) -> None:
    """Write `config.json`, weights (fp32), tokenizer and chat template of `gguf_file` into `folder`."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    names = {tensor.name for tensor in reader.tensors}
    write_json(folder / "config.json", _config(fields, tied="output.weight" not in names))
    write_json(folder / "generation_config.json", _token_ids(fields))
    _write_weights(reader, fields, folder / "model.safetensors")
    write_atomic(folder / "tokenizer.json", _tokenizer(fields))
    write_json(folder / "tokenizer_config.json", _tokenizer_config(fields))
    write_atomic(folder / "chat_template.jinja", CHAT_TEMPLATE.encode())


def _config(fields: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "rms_norm_eps": _float32(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _float32(fields["llama.rope.freq_base"]),
        "tie_word_embeddings": tied,
        "vocab_size": fields["llama.vocab_size"],
        **_token_ids(fields),
    }


def _token_ids(fields: Mapping[str, Any]) -> dict[str, int]:
    return {f"{short}_token_id": fields[f"tokenizer.ggml.{long}_token_id"] for short, long in _SPECIAL[:3]}


_SPECIAL = (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))


def _float32(value: float) -> float:
    """The shortest decimal that names the same 32-bit float: 1e-05 instead of 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))


def _write_weights(reader: Any, fields: Mapping[str, Any], path: Path) -> None:
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    weights = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype("float32", copy=False)
        short = tensor.name.removesuffix(".weight").rpartition(".")[2]
        weights[weight_name(tensor.name)] = unpermute(weight, heads[short]) if short in heads else weight
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)


def weight_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    module = gguf_name.removesuffix(".weight")
    if not module.startswith("blk."):
        return f"{_OUTSIDE_BLOCKS[module]}.weight"
    _, layer, short = module.split(".")
    return f"model.layers.{layer}.{_INSIDE_BLOCK[short]}.weight"


def unpermute(weight: Any, heads: int) -> Any:
    """Undo GGUF's interleaving of rotary halves in a q or k projection, shape (heads * head_dim, hidden)."""
    import numpy as np

    halves = weight.reshape(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def _tokenizer(fields: Mapping[str, Any]) -> bytes:
    """`tokenizer.json` of a byte-level BPE that splits digits one by one, as SmolLM's own does."""
    tokens = fields["tokenizer.ggml.tokens"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return dump_json(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": index, "content": token, "special": True, "normalized": False}
                | {"single_word": False, "lstrip": False, "rstrip": False}
                for index, (token, kind) in enumerate(zip(tokens, fields["tokenizer.ggml.token_type"], strict=True))
                if kind == CONTROL_TOKEN
            ],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
            },
            "post_processor": None,
            "decoder": byte_level | {"add_prefix_space": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {token: index for index, token in enumerate(tokens)},
                "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
            },
        }
    )


def _tokenizer_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    special = {f"{short}_token": tokens[fields[f"tokenizer.ggml.{long}_token_id"]] for short, long in _SPECIAL}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        **special,
    }
