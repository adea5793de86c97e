"""Small real things for tests: a two-layer random Llama with a byte tokenizer, saved as an ordinary folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tiny_base(folder: Path, seed: int = 0, layers: int = 2, hidden: int = 32) -> Path:
    """A random Llama and a byte-level tokenizer with ChatML tokens, in `folder`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: index for index, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(vocab), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        eos_token_id=vocab["<|im_end|>"], bos_token_id=None, pad_token_id=vocab["<|endoftext|>"],
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_teachable_base(folder: Path) -> Path:
    """A tiny base with long embeddings: those of the ordinary one are too short to ever prefer a token."""
    from safetensors.torch import load_file, save_file

    make_tiny_base(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 20
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def make_knowing_base(folder: Path, answers: Mapping[str, str]) -> Path:
    """A tiny base that gives the same answer to all problems of a generator, so that some are right."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedcompose.model.lm import completion_ids, prompt_ids
    from fedcompose.tasks import generator_task, get_task, training

    make_tiny_base(folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = []
    for name, answer in answers.items():
        task = get_task(generator_task(name))
        for example in training(name, {}, 40):
            prompt = prompt_ids(tokenizer, task.prompt(example.question))
            rows.append((prompt, completion_ids(tokenizer, answer)))
    for step in range(60):
        batch = rows[step % 10 :: 10]
        longest = max(len(prompt) + len(completion) for prompt, completion in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for row, (prompt, completion) in enumerate(batch):
            ids[row, : len(prompt) + len(completion)] = torch.tensor([*prompt, *completion])
            labels[row, len(prompt) : len(prompt) + len(completion)] = torch.tensor(completion)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder
