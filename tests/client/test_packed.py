"""The packed engine against the textbook: one full row per completion, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from fedcompose.model.lm import load_base
from fedcompose_client import packed
from fedcompose_client.packed import Tree, advantage_tree, backward

PAD = 0
Group = tuple[list[int], list[tuple[int, ...]], list[float]]  # prompt, completions, rewards
GROUPS: list[Group] = [
    ([5, 9, 17, 30], [(40, 41, 2), (50, 2), (40, 41, 2), (60, 61, 62, 63, 2)], [1.0, 0.0, 1.0, 0.1]),  # duplicates
    ([7, 8], [(44, 2), (45, 46, 2), (47, 2)], [0.5, 0.5, 0.5]),  # equal rewards: no gradient
    ([11, 12, 13, 14, 15, 16, 21], [(70, 2), (71, 72, 73, 74, 75, 76)], [0.0, 1.0]),  # lengths, not finished
    ([3], [(80, 81, 2), (80, 81, 2), (82, 2)], [1.0, 0.0, 0.0]),  # equal completions, different rewards
]


@pytest.fixture(scope="module")
def shared_model(tiny_base: Path) -> Any:
    """A float32 tiny model with a LoRA that does something."""
    frozen, _ = load_base(tiny_base, torch.float32)
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False
    )
    return get_peft_model(frozen, config)


@pytest.fixture
def model(shared_model: Any) -> Any:
    shared_model.zero_grad(set_to_none=True)
    return shared_model


def gradient(model: Any) -> torch.Tensor:
    """Every trainable gradient in one vector, taken away from the model."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    parts = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    model.zero_grad(set_to_none=True)
    return torch.cat([part.flatten() for part in parts])


def log_probability(model: Any, prompt: Sequence[int], tokens: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0] / temperature
    return -cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(tokens), reduction="sum")


def textbook_gradient(model: Any, groups: Sequence[Group], normaliser: float) -> torch.Tensor:
    for prompt, completions, rewards in groups:
        mean = sum(rewards) / len(rewards)
        for tokens, reward in zip(completions, rewards, strict=True):
            loss = -(reward - mean) * log_probability(model, prompt, tokens) / normaliser
            loss.backward()
    return gradient(model)


def packed_gradient(model: Any, groups: Sequence[Group], normaliser: float) -> torch.Tensor:
    trees = [advantage_tree(*group) for group in groups]
    backward(model, [tree for tree in trees if tree], normaliser, PAD)
    return gradient(model)


def test_the_policy_gradient_is_the_textbook_one(model: Any) -> None:
    wanted = textbook_gradient(model, GROUPS, 7.0)
    assert wanted.abs().max() > 1e-3  # a gradient of nothing would agree with anything
    torch.testing.assert_close(packed_gradient(model, GROUPS, 7.0), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", range(len(GROUPS)))
def test_every_kind_of_group_has_its_textbook_gradient(model: Any, index: int) -> None:
    wanted = textbook_gradient(model, [GROUPS[index]], 1.0)
    torch.testing.assert_close(packed_gradient(model, [GROUPS[index]], 1.0), wanted, rtol=1e-5, atol=1e-5)


def test_the_gradient_is_that_of_the_temperature_sampled_at(model: Any) -> None:
    tree = Tree((5, 9), (((40, 41, 2), 1.0),))
    backward(model, [tree], 1.0, PAD, temperature=0.5)
    hot = gradient(model)
    (-log_probability(model, tree.prompt, (40, 41, 2), temperature=0.5)).backward()
    torch.testing.assert_close(hot, gradient(model), rtol=1e-5, atol=1e-5)
    backward(model, [tree], 1.0, PAD)
    assert not torch.allclose(hot, gradient(model), rtol=1e-3)


def test_small_batches_give_the_same_gradient(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = packed_gradient(model, GROUPS, 1.0)
    batches = []
    monkeypatch.setattr(packed, "MAX_BATCH_TOKENS", 12)
    monkeypatch.setattr(packed, "_loss", lambda *a, real=packed._loss: batches.append(len(a[1])) or real(*a))
    torch.testing.assert_close(packed_gradient(model, GROUPS, 1.0), whole, rtol=1e-5, atol=1e-5)
    assert batches == [1, 1, 1]


def test_the_loss_does_not_depend_on_what_pads_a_batch(model: Any) -> None:
    trees = [tree for tree in (advantage_tree(*group) for group in GROUPS) if tree]
    losses = [backward(model, trees, 1.0, pad) for pad in (0, 99)]
    assert losses[0] == losses[1]


def test_groups_without_a_signal_cost_nothing() -> None:
    assert advantage_tree([1], [(2,), (3,)], [0.7, 0.7]) is None
    assert advantage_tree([1], [(2,), (2,)], [1.0, 0.0]) is None  # the same text, right and wrong: cancels


def test_equal_completions_are_one_branch_with_the_sum_of_advantages() -> None:
    tree = advantage_tree([1], [(2,), (3,), (2,), (4,)], [1.0, 0.0, 1.0, 0.5])
    assert tree == Tree((1,), (((2,), 0.75), ((3,), -0.625), ((4,), -0.125)))


def test_a_supervised_tree_is_cross_entropy(model: Any) -> None:
    prompt, answer = (5, 9, 17), (40, 41, 42, 2)
    loss = backward(model, [Tree(prompt, ((answer, 1.0),))], float(len(answer)), PAD)
    packed_way = gradient(model)
    ids = torch.tensor([[*prompt, *answer]])
    reference = model(input_ids=ids, labels=torch.tensor([[-100] * len(prompt) + [*answer]])).loss
    reference.backward()
    assert loss == pytest.approx(reference.item(), abs=1e-6)
    torch.testing.assert_close(packed_way, gradient(model), rtol=1e-5, atol=1e-5)


def test_a_completion_does_not_see_its_siblings(model: Any) -> None:
    """Weight 0 makes a branch present and mute: whatever it says, the other branch's loss stays as it is alone."""
    prompt, branch = (5, 9, 17), ((40, 41, 2), 1.0)
    alone = backward(model, [Tree(prompt, (branch,))], 1.0, PAD)
    for sibling in [(60,), (60, 61, 62, 63, 64), (41, 40, 2)]:
        for branches in [(branch, (sibling, 0.0)), ((sibling, 0.0), branch)]:
            assert backward(model, [Tree(prompt, branches)], 1.0, PAD) == pytest.approx(alone, abs=1e-5)


def test_a_mask_that_lets_siblings_be_seen_would_be_noticed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: with an ordinary causal mask its equality does not hold."""
    prompt, branch = (5, 9, 17), ((40, 41, 2), 1.0)
    alone = backward(model, [Tree(prompt, (branch,))], 1.0, PAD)

    def causal(*args: Any, attention_mask: torch.Tensor, **kwargs: Any) -> Any:
        return type(model).forward(model, *args, attention_mask=torch.ones_like(attention_mask).tril(), **kwargs)

    monkeypatch.setattr(model, "forward", causal)
    beside = backward(model, [Tree(prompt, (((60, 61, 62), 0.0), branch))], 1.0, PAD)
    assert abs(beside - alone) > 1e-3
