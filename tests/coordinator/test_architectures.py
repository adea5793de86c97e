"""The three main methods on models that are no transformer decoders: Mamba's mixers, and T5 with its two sequences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedcompose.bases import Base, resolve_base
from fedcompose.contribution import VerifiedContribution
from fedcompose.model.composed import assemble
from fedcompose.routing import RouterConfig
from fedcompose_coordinator.completion import completion_losses, make_pass
from fedcompose_coordinator.compose import compose
from fedcompose_coordinator.lessons import Lesson, encode
from fedcompose_coordinator.methods import recipe
from tests.coordinator.letters import admit
from tests.tiny_architectures import TARGETS, make_tiny

DOMAINS = ("alpha", "beta", "gamma")
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ: \n"
LESSONS = [Lesson(domain, letter * (3 + n), letter.upper() * 4) for domain, letter in zip(DOMAINS, "abc", strict=True)
           for n in range(4)]  # fmt: skip
SMALL = {"steps": 3, "batch": 6, "selections": 2, "attention_rank": 0}


def _save_tokenizer(folder: Path) -> None:
    """A token per letter."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<pad>", "<end>", "<unk>", *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)


def _save_expert(architecture: str, folder: Path, seed: int) -> Path:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=2, lora_alpha=4, target_modules=list(TARGETS[architecture]), task_type="CAUSAL_LM")
    model: Any = get_peft_model(make_tiny(architecture), settings)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    return folder


@pytest.fixture(scope="module", params=["Mamba", "T5"])
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Base, list[VerifiedContribution]]:
    """An architecture's name, its tiny base, and three experts for it."""
    name, root = request.param, tmp_path_factory.mktemp(request.param)
    make_tiny(name).save_pretrained(root / "base")
    _save_tokenizer(root / "base")
    experts = [admit(_save_expert(name, root / domain, seed)) for seed, domain in enumerate(DOMAINS)]
    return name, resolve_base(root / "base"), experts


@pytest.mark.parametrize("method", ["hard", "guided", "lora-mixer", "remix", "ridge", "arrow"])
def test_methods_compose_other_architectures(
    method: str, world: tuple[str, Base, list[VerifiedContribution]], tmp_path: Path
) -> None:
    name, base, experts = world
    router: dict[str, Any] = {}
    if name == "T5" and method not in ("lora-mixer", "arrow"):  # its cross attention reads two sequences
        router = {"decides": "linear", "sharing": "model" if method == "hard" else "module"}

    composition = compose(experts, LESSONS, base, recipe(method, SMALL, router), 0, tmp_path / "candidate")

    assert composition["targets"] == sorted(TARGETS[name]) and composition["attention"] is None
    config = RouterConfig.model_validate(composition["router"])
    model, tokenizer = assemble(base, [each.path for each in experts], tmp_path / "candidate", config)
    rows = encode(tokenizer, LESSONS, DOMAINS)
    assert completion_losses(model, make_pass(model, rows, tokenizer.pad_token_id)).isfinite().all()
    if composition["training"].get("steps_done"):
        log = [json.loads(line) for line in (tmp_path / "candidate/training.jsonl").read_text().splitlines()]
        assert log[-1]["router_moved"] > 1e-3 and 0 <= log[-1]["routing_accuracy"] <= 1
        assert all(abs(sum(share) - 1) < 1e-5 for share in log[-1]["share"].values())


@pytest.mark.parametrize("world", ["T5"], indirect=True)
def test_the_loss_of_a_model_with_two_sequences_is_that_of_its_own_head(
    world: tuple[str, Base, list[VerifiedContribution]],
) -> None:
    _, base, _ = world
    model, tokenizer = assemble(base, [], Path("nowhere"), dtype=torch.float32)
    rows = encode(tokenizer, LESSONS, DOMAINS)
    found = completion_losses(model, make_pass(model, rows, tokenizer.pad_token_id))
    for row, loss in zip(rows, found.tolist(), strict=True):
        labels = torch.tensor([row.ids[row.prompt :]])
        mean = model(input_ids=torch.tensor([row.ids[: row.prompt]]), labels=labels).loss
        assert loss == pytest.approx(float(mean) * labels.shape[1], rel=1e-4)
