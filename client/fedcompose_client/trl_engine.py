"""The trl engine: the same on-policy GRPO steps as the packed engine, by TRL's GRPOTrainer as it is.

Input and output are those of `reinforce_packed`: a run after its warm-up; the adapter that did best on the validation
split in `rlvr/`. TRL samples, weighs and updates. The rows of each step, the optimizer with its rate, the checkpoints
and the seed of every step are ours, so that a run is the same function of its settings in either engine and goes on
after kill -9 from the same file. TRL itself writes nothing, logs nothing and reports nothing.

A test holds the two engines to one gradient; `benchmarks/grpo.py` measures how their speeds compare on a machine.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from datasets import Dataset
from huggingface_hub import constants
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from fedcompose.errors import ConfigError
from fedcompose_client.run import (
    LR_RAMP_STEPS,
    MAX_GRADIENT_NORM,
    VALIDATE_EVERY,
    Run,
    after_step,
    draw,
    validate,
)

RewardFunction: TypeAlias = Callable[..., list[float | None]]  # called by keyword; columns of the rows are among them


def reinforce_with_trl(run: Run) -> None:
    """Do the remaining steps of a run; the best adapter by validation ends up in `rlvr/`.

    Raises: ConfigError: `TRL_ONE_GPU` where a process sees several GPUs, which TRL does not split a step over.
    """
    if torch.cuda.device_count() > 1:
        raise ConfigError(
            "TRL_ONE_GPU",
            "the trl engine trains on one GPU",
            expected="one visible GPU",
            got=f"{torch.cuda.device_count()}",
            fix="set CUDA_VISIBLE_DEVICES=0",
        )
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # TRL's to transformers, not to a site
        if run.progress.step < run.settings.steps:
            make_trainer(run, reward_function(run)).train()
    run.model.eval()
    validate(run, "rlvr", run.settings.steps)


def make_trainer(run: Run, reward: RewardFunction) -> GRPOTrainer:
    """TRL's trainer over the steps that are left, with our rows, optimizer, rate and checkpoints."""
    constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL reports every trainer made; the environment was read long ago
    trainer = GRPOTrainer(
        model=run.model,
        reward_funcs=reward,
        args=grpo_config(run),
        train_dataset=_rows(run),
        processing_class=run.tokenizer,
        callbacks=[_Steps(run)],
        optimizers=(run.optimizer, _schedule(run)),
    )
    trainer.remove_callback(PrinterCallback)  # prints every log record to the terminal
    return trainer


def grpo_config(run: Run) -> GRPOConfig:
    """The settings under which TRL's loss is the packed engine's: dr_grpo, unscaled rewards, one on-policy update.

    A step's samples are generated at once and learned from in passes of one group's size, which bounds memory.
    """
    settings = run.settings
    on_cpu = run.model.device.type == "cpu"
    return GRPOConfig(
        output_dir=str(run.folder),
        max_steps=settings.steps - run.progress.step,
        per_device_train_batch_size=settings.samples_per_prompt,
        gradient_accumulation_steps=settings.prompts_per_step,
        num_generations=settings.samples_per_prompt,
        max_completion_length=settings.max_new_tokens,
        temperature=settings.temperature,
        loss_type="dr_grpo",
        scale_rewards="none",
        num_iterations=1,
        beta=0.0,
        max_grad_norm=MAX_GRADIENT_NORM,
        shuffle_dataset=False,
        seed=settings.seed,
        use_cpu=on_cpu,
        bf16=False,  # no autocast: base and adapter keep the formats they were loaded in
        gradient_checkpointing=not on_cpu,  # memory is short on a GPU, time on a CPU
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _rows(run: Run) -> Dataset:
    """One row per prompt, in the order in which the steps that are left use them."""
    settings, task = run.settings, run.task
    rows = []
    for step in range(run.progress.step, settings.steps):
        for example in draw(run.splits.train, settings.prompts_per_step, step, settings.seed + 1):
            rows.append({"prompt": _prompt(run.tokenizer, task.prompt(example.question)), "answer": example.answer})
    return Dataset.from_list(rows)


def _prompt(tokenizer: Any, text: str) -> str | list[dict[str, str]]:
    """What TRL turns into the ids of `prompt_ids`: it renders a chat itself, without a second start token."""
    return text + "\n" if tokenizer.chat_template is None else [{"role": "user", "content": text}]


def reward_function(run: Run) -> RewardFunction:
    """The task's reward in TRL's form; also where a step's mean reward is known."""

    def reward(completion_ids: Sequence[Sequence[int]], answer: Sequence[str], **_: Any) -> list[float | None]:
        scores: list[float] = []
        for tokens, expected in zip(completion_ids, answer, strict=True):
            text = run.tokenizer.decode(tokens[:-1], skip_special_tokens=True).strip()
            finished = tokens[-1] == run.tokenizer.eos_token_id
            scores.append(run.task.reward(text, expected) if finished else 0.0)
        run.progress.rewards.append(sum(scores) / len(scores))
        return [*scores]

    return reward


def _schedule(run: Run) -> torch.optim.lr_scheduler.LambdaLR:
    """The packed engine's learning rate: a short ramp, then constant."""
    first = run.progress.step
    for group in run.optimizer.param_groups:
        group["lr"] = run.settings.lr
    return torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda done: min(1.0, (first + done + 1) / LR_RAMP_STEPS))


class _Steps(TrainerCallback):
    """What `reinforce_packed` does around an update: validate, seed, tell, save. TRL takes nothing but a class here."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        run, step = self.run, self.run.progress.step
        if step and step % VALIDATE_EVERY == 0:
            run.model.eval()  # TRL puts it back; while training with checkpointing a model keeps no cache
            validate(run, "rlvr", step)
        torch.manual_seed(run.settings.seed * 1_000_003 + step)
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        run, step = self.run, self.run.progress.step + 1
        recent = run.progress.rewards[-5:]
        note = f"reward {sum(recent) / len(recent):.2f}"
        after_step(run, "rlvr", step, run.settings.steps, self.started, note)
