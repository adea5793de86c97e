"""A world that is learned in seconds: two experts, each of which writes one letter whatever it is asked."""

from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from fedcompose.adapter import read_adapter
from fedcompose.contribution import VerifiedContribution
from fedcompose.files import dir_hash, folder_digests
from fedcompose.gates import GATES_FILE, write_gates
from fedcompose.model.lm import load_base
from fedcompose_coordinator.completion import completion_losses, make_pass
from fedcompose_coordinator.lessons import Lesson, encode
from tests.tiny_experts import TARGETS

LETTERS = {"alpha": "A", "beta": "B"}


def make_lessons(domain: str, count: int) -> list[Lesson]:
    """Repeat the domain's letter: a prompt says which letter, an expert has learned to write it."""
    letter = LETTERS[domain]
    return [Lesson(domain, letter.lower() * (3 + n % 4), letter * (6 + n % 3)) for n in range(count)]


def make_lively_base(tiny_base: Path, folder: Path) -> Path:
    """The tiny base with longer embeddings: as it was born, no logit of it can exceed 0.7."""
    model: Any
    model, tokenizer = load_base(tiny_base, torch.float32)
    model.get_input_embeddings().weight.data *= 15
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train_expert(base: Path, folder: Path, domain: str, targets: tuple[str, ...] = TARGETS) -> Path:
    """A small expert that writes its own letter, whatever it is asked."""
    from peft import LoraConfig, get_peft_model

    model: Any
    model, tokenizer = load_base(base, torch.float32)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
    prompts = [lesson.prompt for name in LETTERS for lesson in make_lessons(name, 4)]
    rows = encode(tokenizer, [Lesson(domain, prompt, LETTERS[domain] * 7) for prompt in prompts], [domain])
    batch = make_pass(model, rows, tokenizer.pad_token_id)
    for _ in range(25):
        optimizer.zero_grad()
        (completion_losses(model, batch).sum() / len(rows)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink()
    return folder


def with_gates(expert: VerifiedContribution, folder: Path) -> VerifiedContribution:
    """The same expert with random gates beside it."""
    shutil.copytree(expert.path, folder)
    adapter, rng = read_adapter(folder, None), np.random.default_rng(0)
    widths = {module: adapter.pair(module)[0].shape[1] for module in adapter.modules()}
    gates = {module: rng.normal(size=width).astype("<f4") for module, width in widths.items()}
    (folder / GATES_FILE).write_bytes(write_gates(gates))
    return replace(admit(folder, expert.domain), site=expert.site)


def admit(folder: Path, domain: str | None = None) -> VerifiedContribution:
    """As intake would hand it over; who signed it is of no interest here."""
    digests = folder_digests(folder)
    return VerifiedContribution(
        path=folder, kind="adapter", site=f"site-{folder.name}", domain=domain or folder.name,
        dir_hash=dir_hash(digests), keyid="", payload_sha256="", provenance=cast("Any", None), digests=digests,
        received_on=datetime.now(UTC),
    )  # fmt: skip
