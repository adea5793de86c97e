"""TRL's trainer and the packed engine: one policy gradient, and runs that end the same way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch
from huggingface_hub.utils import _telemetry, send_telemetry
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback

from fedcompose.model.lm import load_base, pad_right, prompt_ids
from fedcompose.tasks import Example
from fedcompose_client import run as run_module
from fedcompose_client import trl_engine
from fedcompose_client.config import Training
from fedcompose_client.data import Splits
from fedcompose_client.packed import Tree, advantage_tree, backward
from fedcompose_client.run import Progress, Run, new_optimizer, trainable
from fedcompose_client.train import train, update
from fedcompose_client.trl_engine import make_trainer, reward_function
from tests.client.small_site import make_site, silent

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SETTINGS = Training(engine="trl", rank=4, steps=2, prompts_per_step=3, samples_per_prompt=4, max_new_tokens=6, lr=0.01)


class Vowels:
    """A task that every completion answers with a score of its own, so that nearly every group has a gradient."""

    name = "vowels"

    def prompt(self, question: str) -> str:
        return question

    def reward(self, completion: str, answer: str) -> float:
        return (len(completion) % 4) / 4 + (0.2 if answer in completion else 0.0)

    def is_correct(self, completion: str, answer: str) -> bool:
        return answer in completion


class Killed(BaseException):
    """Stands for kill -9: no handler of ours may see it."""


@pytest.fixture
def run(teachable_base: Path, tmp_path: Path) -> Run:
    """A float32 run after a warm-up that taught the tiny model to end its turns."""
    frozen, tokenizer = load_base(teachable_base, torch.float32)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=list(SETTINGS.targets), init_lora_weights=False)
    model = get_peft_model(frozen, lora)
    examples = [Example(question * length, "e") for length, question in enumerate("abcdefgh", 1)]
    splits = Splits(examples, examples[:2], examples[:2])
    run = Run(tmp_path, SETTINGS, Vowels(), splits, model, tokenizer, new_optimizer(model), Progress("rlvr"), silent)
    prompts = [tuple(prompt_ids(tokenizer, example.question)) for example in examples]
    ending = tuple(((letter, tokenizer.eos_token_id), 1.0) for letter in range(40, 44))
    for _ in range(6):
        update(run, [Tree(prompt, ending) for prompt in prompts], 64.0, 0.02)
    run.optimizer = new_optimizer(model)
    return run


def gradient(run: Run) -> torch.Tensor:
    """Every gradient in one vector, taken away from the model."""
    parts = [weight.grad.flatten().clone() for weight in trainable(run.model) if weight.grad is not None]
    run.model.zero_grad(set_to_none=True)
    return torch.cat(parts)


def packed_gradient(run: Run, groups: Sequence[tuple[list[int], list[tuple[int, ...]], list[float]]]) -> torch.Tensor:
    """The gradient that the packed engine gives the optimizer for these groups."""
    samples = sum(len(completions) for _, completions, _ in groups)
    trees = [tree for tree in (advantage_tree(*group) for group in groups) if tree]
    backward(run.model, trees, float(samples * run.settings.max_new_tokens), run.tokenizer.pad_token_id)
    return gradient(run)


def test_both_engines_have_the_same_gradient_on_a_fixed_batch(run: Run) -> None:
    groups = [
        ([5, 9, 17, 30], [(40, 41, 2), (50, 2), (40, 41, 2), (60, 61, 62, 63, 64, 65)], [1.0, 0.0, 1.0, 0.1]),
        ([7, 8], [(44, 2), (45, 46, 2), (47, 2), (48, 2)], [0.5, 0.5, 0.5, 0.5]),
        ([3, 11, 12, 13, 14, 15], [(70, 2), (71, 72, 73, 2), (70, 2), (74, 2)], [0.0, 1.0, 0.0, 0.0]),
    ]
    rows = [(prompt, tokens) for prompt, completions, _ in groups for tokens in completions]
    width = max(len(prompt) for prompt, _ in rows)
    rewards = torch.tensor([scores for *_, scores in groups])
    batch = {
        "prompt_ids": torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in rows]),
        "prompt_mask": torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in rows]),
        "completion_ids": pad_right([tokens for _, tokens in rows], 0),
        "completion_mask": pad_right([[1] * len(tokens) for _, tokens in rows], 0),
        "advantages": (rewards - rewards.mean(1, keepdim=True)).flatten(),
    }
    trainer = make_trainer(run, reward_function(run))
    trainer.compute_loss(run.model.eval(), batch).backward()
    wanted = gradient(run)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(packed_gradient(run, groups), wanted, rtol=1e-5, atol=1e-5)


def test_a_whole_step_of_trl_has_the_packed_gradient_of_its_own_samples(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the rows to the optimizer: prompts, advantages, accumulation, normaliser."""
    seen: list[tuple[tuple[int, ...], float]] = []
    gradients: list[torch.Tensor] = []
    real = reward_function(run)

    def watched(completion_ids: Sequence[Sequence[int]], **others: Any) -> list[float]:
        scores = real(completion_ids=completion_ids, **others)
        seen.extend(zip(map(tuple, completion_ids), scores, strict=True))
        return list(scores)

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            gradients.append(gradient(run))
            raise Killed

    monkeypatch.setattr(trl_engine, "MAX_GRADIENT_NORM", 0.0)  # 0 clips nothing in TRL
    trainer = make_trainer(run, watched)
    trainer.add_callback(Watch())
    with pytest.raises(Killed):
        trainer.train()
    run.model.eval()
    group = SETTINGS.samples_per_prompt
    examples = trl_engine.draw(run.splits.train, SETTINGS.prompts_per_step, 0, SETTINGS.seed + 1)
    groups = []
    for index, example in enumerate(examples):
        chosen = seen[index * group : (index + 1) * group]
        prompt = prompt_ids(run.tokenizer, run.task.prompt(example.question))
        groups.append((prompt, [tokens for tokens, _ in chosen], [score for _, score in chosen]))
    assert len(seen) == SETTINGS.prompts_per_step * group
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(packed_gradient(run, groups), gradients[0], rtol=1e-5, atol=1e-5)
    assert run.progress.rewards == [pytest.approx(sum(score for _, score in seen) / len(seen))]


def test_a_turn_that_did_not_end_earns_nothing(run: Run) -> None:
    reward = reward_function(run)
    letter = run.tokenizer("e", add_special_tokens=False).input_ids
    ended = [*letter, run.tokenizer.eos_token_id]
    assert reward(completion_ids=[ended, letter], answer=["e", "e"]) == [0.45, 0.0]
    assert run.progress.rewards == [0.225]


@pytest.mark.parametrize("template", [True, False])
def test_trl_reads_the_same_prompt_tokens(run: Run, template: bool) -> None:
    if not template:
        run.tokenizer.chat_template = None
    examples = trl_engine.draw(run.splits.train, SETTINGS.prompts_per_step, 0, SETTINGS.seed + 1)
    rows = trl_engine._rows(run)["prompt"][: len(examples)]
    ids, *_ = make_trainer(run, reward_function(run))._tokenize_prompts(list(rows))
    assert ids == [prompt_ids(run.tokenizer, example.question) for example in examples]


def test_the_rate_and_the_rows_go_on_where_a_run_stopped(run: Run) -> None:
    whole = trl_engine._rows(run)
    assert trl_engine._schedule(run).get_last_lr() == [pytest.approx(0.01 / 3)]
    run.progress.step = 1
    assert trl_engine._schedule(run).get_last_lr() == [pytest.approx(0.02 / 3)]
    assert list(trl_engine._rows(run)) == list(whole)[SETTINGS.prompts_per_step :]


def test_trl_reports_to_nobody(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    outgoing: Queue[Any] = Queue()
    monkeypatch.setattr(_telemetry, "_TELEMETRY_QUEUE", outgoing)
    monkeypatch.setattr(_telemetry, "_start_telemetry_thread", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.delenv("CI", raising=False)
    send_telemetry("trl/control")
    assert outgoing.get_nowait()["topic"] == "trl/control"  # the control: this is where a report would be seen
    make_trainer(run, reward_function(run))
    assert outgoing.empty()


def test_a_killed_run_resumes_to_the_same_expert(
    tmp_path: Path, teachable_base: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(trl_engine, "VALIDATE_EVERY", 2)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = train(whole, make_site(whole, teachable_base, engine="trl", steps=3), "order", silent)
    assert [step for step, _ in result["validation"]["rlvr"]] == [2, 3]
    assert set(result["accuracy"]) == {"base", "warmup", "rlvr"}
    assert len(result["rewards"]) == 3
    assert all(reward > 0 for reward in result["rewards"])  # there was something to learn
    assert json.loads((whole / "runs/order/result.json").read_text()) == json.loads(json.dumps(result))
    config = make_site(killed, teachable_base, engine="trl", steps=3)

    def kill(stage: str, step: int, steps: int, note: str) -> None:
        if (stage, step) == ("rlvr", 3):  # the last checkpoint is that of step 2
            raise Killed

    with pytest.raises(Killed):
        train(killed, config, "order", kill)
    again = train(killed, config, "order", silent)
    assert again["rewards"] == result["rewards"]
    ends = [load_file(site / "runs/order/checkpoint.safetensors") for site in (whole, killed)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert (whole / "runs/order/expert/adapter_model.safetensors").is_file()
    assert capfd.readouterr().out == ""  # TRL keeps quiet
