"""How many times faster is a reinforcement step of the packed engine than one of TRL's trainer?

Both engines start from the same adapter (a short warm-up on worked solutions) and do the same steps in turn, in one
process, with all cores: the same prompts, as many samples per prompt, the same length limit. Two cases are timed:

- `full`: no completion may end before the limit and every one earns a reward of its own. Both engines then generate
  and learn from exactly as many tokens; the packed engine's shortcuts for equal completions, for groups without a
  signal and for rows that end early are of no use to it.
- `trained`: completions end where the model ends them and earn what the task gives them, as in the demo.

The first step of each case is not counted. `ratio` is the median of TRL's seconds over the median of ours.

    python benchmarks/grpo.py --out grpo.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
import trl
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from fedcompose.bases import resolve_base
from fedcompose.model.lm import load_base
from fedcompose.model.sampling import Completion, sample
from fedcompose.tasks import AnswerLine, Example, get_task, training
from fedcompose_client import train
from fedcompose_client.config import Training
from fedcompose_client.data import Splits
from fedcompose_client.run import LR_RAMP_STEPS, Progress, Run, draw, new_optimizer, supervised_tree
from fedcompose_client.trl_engine import make_trainer, reward_function

TIMED_STEPS = 3
WARM_UP_STEPS = 12
GENERATOR, TASK = "order_statistic", "numeric"
SETTINGS = Training(
    steps=1 + TIMED_STEPS, prompts_per_step=8, samples_per_prompt=8, max_new_tokens=24, warm_up_steps=WARM_UP_STEPS
)
SHOWN = ("prompts_per_step", "samples_per_prompt", "max_new_tokens", "rank", "temperature")
Adapter = dict[str, torch.Tensor]


class EveryCompletionCounts:
    """The task of the case `full`: a reward that no two texts share, so that every group has a gradient."""

    def __init__(self, task: AnswerLine) -> None:
        self.prompt = task.prompt

    def reward(self, completion: str, answer: str) -> float:
        return zlib.crc32(completion.encode()) / 2**32


def new_run(base: Path, adapter: Adapter | None, examples: list[Example], folder: Path, full: bool) -> Run:
    """A run as `train` opens it, before its first reinforcement step."""
    frozen, tokenizer = load_base(base)
    torch.manual_seed(SETTINGS.seed)
    lora = LoraConfig(r=SETTINGS.rank, lora_alpha=2 * SETTINGS.rank, target_modules=list(SETTINGS.targets))
    model = get_peft_model(frozen, lora)
    if adapter is not None:
        set_peft_model_state_dict(model, adapter)
    task: Any = get_task(TASK)
    if full:
        task = EveryCompletionCounts(task)
        unused = next(name for name in reversed(tokenizer.all_special_tokens) if name not in _in_use(tokenizer))
        tokenizer.eos_token = unused  # a turn ends with a token that no model writes: at the limit
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    folder.mkdir()
    splits = Splits(examples, [], [])
    return Run(folder, SETTINGS, task, splits, model, tokenizer, new_optimizer(model), Progress("rlvr"), _say_nothing)


def taught(base: Path, examples: list[Example], folder: Path) -> Adapter:
    """The adapter after a short warm-up, so that completions are those of a model in training."""
    run = new_run(base, None, examples, folder, full=False)
    for step in range(SETTINGS.warm_up_steps):
        chosen = draw(examples, SETTINGS.warm_up_batch, step, SETTINGS.seed)
        trees = [supervised_tree(run, example) for example in chosen]
        tokens = sum(len(tree.branches[0][0]) for tree in trees)
        loss = train.update(run, trees, float(tokens), SETTINGS.warm_up_lr * min(1.0, (step + 1) / LR_RAMP_STEPS))
        print(f"warm-up {step + 1}/{SETTINGS.warm_up_steps}, loss {loss:.2f}", flush=True)
    return {name: weight.clone() for name, weight in get_peft_model_state_dict(run.model).items()}


def packed_step(run: Run, step: int, full: bool) -> tuple[float, int]:
    """Seconds and sampled tokens of one step of the packed engine."""
    tokens = 0

    def watched(*arguments: Any, **options: Any) -> list[list[Completion]]:
        nonlocal tokens
        groups = sample(*arguments, **options)
        tokens = sum(len(one.tokens) for group in groups for one in group)
        return [[replace(one, finished=True) for one in group] for group in groups] if full else groups

    with patch.object(train, "sample", watched):
        started = time.perf_counter()
        examples = draw(run.splits.train, SETTINGS.prompts_per_step, step, SETTINGS.seed + 1)
        trees, rewards = train.explore(run, examples, step)
        normaliser = float(len(rewards) * SETTINGS.max_new_tokens)
        train.update(run, trees, normaliser, SETTINGS.lr * min(1.0, (step + 1) / LR_RAMP_STEPS))
        return time.perf_counter() - started, tokens


class InTurn(transformers.TrainerCallback):
    """After every step of TRL's, one of ours."""

    def __init__(self, ours: Run, theirs: Run, full: bool, tokens: list[int]) -> None:
        self.ours, self.theirs, self.full, self.tokens = ours, theirs, full, tokens
        self.rows: list[dict[str, dict[str, float]]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        step = len(self.rows)
        theirs = self.theirs.progress.seconds["rlvr"] - sum(row["trl"]["seconds"] for row in self.rows)
        seconds, tokens = packed_step(self.ours, step, self.full)
        row = {
            "packed": {"seconds": seconds, "tokens": tokens},
            "trl": {"seconds": theirs, "tokens": self.tokens[step]},
        }
        self.rows.append(row)
        print(f"step {step}:", *(f"{name} {one['seconds']:.2f} s, {one['tokens']} tokens" for name, one in row.items()))


def measure(base: Path, adapter: Adapter, examples: list[Example], folder: Path, full: bool) -> dict[str, Any]:
    """The timed steps of both engines in one case."""
    ours, theirs = (new_run(base, adapter, examples, folder / name, full) for name in ("packed", "trl"))
    tokens: list[int] = []
    trainer = make_trainer(theirs, _counted(theirs, full, tokens))
    in_turn = InTurn(ours, theirs, full, tokens)
    trainer.add_callback(in_turn)  # behind those of the engine, so that our seconds are not counted as TRL's
    trainer.train()
    timed = in_turn.rows[1:]
    seconds = {name: statistics.median(row[name]["seconds"] for row in timed) for name in ("packed", "trl")}
    return {"steps": timed, "median_seconds": seconds, "ratio": seconds["trl"] / seconds["packed"]}


def _counted(run: Run, full: bool, tokens: list[int]) -> Callable[..., list[float | None]]:
    """The reward function of a case, which also notes how many tokens TRL sampled."""
    as_trained = reward_function(run)

    def reward(completion_ids: Sequence[Sequence[int]], answer: Sequence[str], **others: Any) -> list[float | None]:
        tokens.append(sum(map(len, completion_ids)))
        scores = as_trained(completion_ids=completion_ids, answer=answer, **others)
        if not full:
            return scores
        return [run.task.reward(run.tokenizer.decode(one, skip_special_tokens=True), "") for one in completion_ids]

    return reward


def _in_use(tokenizer: Any) -> set[str]:
    return {tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token}


def _say_nothing(stage: str, step: int, steps: int, note: str) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m", help="alias, folder or hub id of the base model")
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    transformers.utils.logging.disable_progress_bar()
    base = resolve_base(arguments.base)
    examples = training(GENERATOR, {}, 200)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter = taught(base.path, examples, folder / "warm-up")
        cases = {}
        for case in ("full", "trained"):
            print(f"\n{case}", flush=True)
            (folder / case).mkdir()
            cases[case] = measure(base.path, adapter, examples, folder / case, full=case == "full")
    report = {
        "base": base.name,
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, trl)},
        "settings": SETTINGS.model_dump(mode="json", include=set(SHOWN)),
        "cases": cases,
    }
    print(f"\n{'case':10}{'packed s':>10}{'trl s':>10}{'ratio':>8}")
    for case, row in cases.items():
        seconds = row["median_seconds"]
        print(f"{case:10}{seconds['packed']:>10.2f}{seconds['trl']:>10.2f}{row['ratio']:>8.2f}")
    print(json.dumps(report))
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
