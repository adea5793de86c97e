"""A training run, on disk and in memory: what every engine takes steps on, and how it goes on after kill -9.

Every random choice is a function of (seed, step), so a checkpoint is the adapter, the optimizer's moments and a step
number. A validation split decides which adapter is the best of its stage; the test split decides nothing. How a step is
made is each engine's own story.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save

from fedcompose.files import disk_errors, new_folder, sha256_hex, write_atomic
from fedcompose.model.lm import completion_ids, load_base, merged, prompt_ids
from fedcompose.model.sampling import sample
from fedcompose.provenance import DpStatement
from fedcompose.tasks import Example, Task
from fedcompose_client.config import Training
from fedcompose_client.data import Splits
from fedcompose_client.packed import Tree

CHECKPOINT_EVERY = 5  # steps; about a minute of work on two CPU cores
VALIDATE_EVERY = 10  # reinforcement steps
ADAM_BETAS = (0.9, 0.95)
MAX_GRADIENT_NORM = 1.0
LR_RAMP_STEPS = 3

OnProgress = Callable[[str, int, int, str], None]  # stage, step, steps, note


@dataclass
class Progress:
    """What a run has done so far: everything of a checkpoint that is not a tensor."""

    stage: str = "warm_up"  # warm_up, rlvr, tested, done
    step: int = 0
    rewards: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    validation: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    test: dict[str, list[int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    rewarded: list[str] = field(default_factory=list)  # digests of the questions whose samples earned unequal rewards


@dataclass
class Run:
    """One training run in memory; `folder` holds what survives it."""

    folder: Path
    settings: Training
    task: Task
    splits: Splits
    model: Any
    tokenizer: Any
    optimizer: torch.optim.Optimizer
    progress: Progress
    on_progress: OnProgress
    dp: DpStatement | None = None

    def report(self, stage: str, step: int, steps: int, note: str = "") -> None:
        """Tell the caller, and append one line to `progress.jsonl` for anyone who watches the folder."""
        line = {"time": round(time.time(), 1), "stage": stage, "step": step, "steps": steps, "note": note}
        with disk_errors(self.folder), (self.folder / "progress.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        self.on_progress(stage, step, steps, note)


def new_run(folder: Path, settings: Training, task: Task, splits: Splits, base: Path, on_progress: OnProgress) -> Run:
    """A run with a fresh adapter, or with that of the checkpoint in its folder."""
    frozen, tokenizer = load_base(base)
    torch.manual_seed(settings.seed)
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        target_modules=list(settings.targets),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(frozen, lora)
    run = Run(folder, settings, task, splits, model, tokenizer, new_optimizer(model), Progress(), on_progress)
    _load_checkpoint(run)
    return run


def new_optimizer(model: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(trainable(model), lr=0.0, betas=ADAM_BETAS, weight_decay=0.0)


def trainable(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def draw(rows: Sequence[Example], count: int, step: int, seed: int) -> list[Example]:
    """The rows of one step: a walk through a shuffle that is made anew each epoch."""
    positions = range(step * count, (step + 1) * count)
    orders = {}
    for epoch in {position // len(rows) for position in positions}:
        orders[epoch] = random.Random(f"{seed}:{epoch}").sample(range(len(rows)), len(rows))
    return [rows[orders[position // len(rows)][position % len(rows)]] for position in positions]


def supervised_tree(run: Run, example: Example) -> Tree:
    """A worked solution as the only completion of its prompt, with weight 1."""
    prompt = prompt_ids(run.tokenizer, run.task.prompt(example.question))
    return Tree(tuple(prompt), ((tuple(completion_ids(run.tokenizer, run.task.target(example))), 1.0),))


def note_rewarded(run: Run, example: Example) -> None:
    """Remember that a question taught something; an audit asks that of its canaries."""
    if (note := note_of(example)) not in run.progress.rewarded:
        run.progress.rewarded.append(note)


def note_of(example: Example) -> str:
    return sha256_hex(example.question.encode())[:16]


def start_stage(run: Run, stage: str) -> None:
    run.progress.stage, run.progress.step = stage, 0
    run.optimizer = new_optimizer(run.model)
    save_checkpoint(run)


def after_step(run: Run, stage: str, step: int, steps: int, started: float, note: str) -> None:
    run.progress.step = step
    seconds = run.progress.seconds
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started
    run.report(stage, step, steps, note)
    if step % CHECKPOINT_EVERY == 0:
        save_checkpoint(run)


def validate(run: Run, name: str, step: int) -> None:
    """Accuracy on the validation split; keeps the adapter in `<name>/` when it is the best of its stage so far."""
    history = run.progress.validation.setdefault(name, [])
    if any(done == step for done, _ in history):
        return
    correct = correct_answers(run, run.splits.validation, "validate")
    score = sum(correct) / max(1, len(correct))
    if not history or score >= max(past for _, past in history):
        save_adapter(run.model, run.folder / name)
    history.append((step, score))
    save_checkpoint(run)


def measure(run: Run, name: str) -> None:
    """Accuracy on the test split, if there is one, once per adapter."""
    if name in run.progress.test or not run.splits.test:
        return
    run.progress.test[name] = correct_answers(run, run.splits.test, f"test {name}")
    save_checkpoint(run)


def correct_answers(run: Run, examples: Sequence[Example], stage: str) -> list[int]:
    """Greedy decoding, one 0 or 1 per example."""
    done = 0

    def count(rows: int) -> None:
        nonlocal done
        done += rows
        run.report(stage, done, len(examples))

    prompts = [prompt_ids(run.tokenizer, run.task.prompt(example.question)) for example in examples]
    with merged(run.model):
        completions = sample(
            run.model, run.tokenizer, prompts, max_new_tokens=run.settings.max_new_tokens, on_done=count
        )
    return [
        int(run.task.is_correct(one.text, example.answer))
        for (one,), example in zip(completions, examples, strict=True)
    ]


def save_adapter(model: Any, folder: Path) -> None:
    """An ordinary PEFT folder, whole or not at all."""
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)


def save_checkpoint(run: Run) -> None:
    """Adapter, optimizer moments and progress in one file, replaced atomically."""
    tensors = {f"adapter/{name}": value.contiguous() for name, value in get_peft_model_state_dict(run.model).items()}
    for index, moments in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value.contiguous() for name, value in moments.items()}
    metadata = {"progress": json.dumps(run.progress.__dict__)}
    write_atomic(run.folder / "checkpoint.safetensors", save(tensors, metadata))


def _load_checkpoint(run: Run) -> None:
    """Continue an interrupted run, if there is one."""
    path = run.folder / "checkpoint.safetensors"
    if not path.exists():
        return
    tensors = load_file(path)
    with safe_open(path, "pt") as stream:
        run.progress = Progress(**json.loads(stream.metadata()["progress"]))
    adapter = {name.removeprefix("adapter/"): value for name, value in tensors.items() if name.startswith("adapter/")}
    set_peft_model_state_dict(run.model, adapter)
    state = run.optimizer.state_dict()
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, index, moment = name.split("/")
            state["state"].setdefault(int(index), {})[moment] = value
    run.optimizer.load_state_dict(state)
