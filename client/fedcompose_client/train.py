"""Train one domain's expert: warm-up on worked solutions, then reinforcement from verifiable rewards.

Input: the site's own file. Output: `runs/<domain>/expert/`, a plain PEFT LoRA folder, and `result.json` with the
accuracy of base, warm-up and RLVR on rows that were never trained on. What a run is, `run.py` says. The steps here are
those of the packed engine; TRL's are in `trl_engine.py`, those with differential privacy in `private.py`.

It deliberately does not ship, sign or send anything.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedcompose.bases import resolve_base
from fedcompose.files import new_folder, write_atomic, write_json
from fedcompose.intervals import accuracy, paired_difference
from fedcompose.model.lm import merged, prompt_ids
from fedcompose.model.sampling import sample
from fedcompose.tasks import Example, get_task
from fedcompose_client.config import Domain, Dp, SiteConfig
from fedcompose_client.own_rows import SETTINGS_FILE, check_made_from, made_from, own_rows
from fedcompose_client.packed import Tree, advantage_tree, backward
from fedcompose_client.private import learn_privately
from fedcompose_client.run import (
    LR_RAMP_STEPS,
    MAX_GRADIENT_NORM,
    VALIDATE_EVERY,
    OnProgress,
    Run,
    after_step,
    draw,
    measure,
    new_run,
    note_rewarded,
    save_checkpoint,
    start_stage,
    supervised_tree,
    trainable,
    validate,
)


def train(
    site: Path, config: SiteConfig, domain_name: str, on_progress: OnProgress, fresh: bool = False, dp: Dp | None = None
) -> dict[str, Any]:
    """Train to the end, or go on where an interrupted run stopped; returns what `result.json` holds.

    `dp` asks for another differential privacy than the domain's settings do.

    Raises: ConfigError: `RUN_OTHER_SETTINGS` when the folder holds a run with other settings or data; with `dp`,
        `DP_UNSOUND` and `DP_EPSILON` where the guarantee cannot be given.
    """
    domain = config.domain(domain_name)
    dp = dp or domain.dp
    run, owners = _open_run(site / "runs" / domain_name, site, config, domain, on_progress, fresh, dp)
    if run.progress.stage == "done":
        return dict(json.loads((run.folder / "result.json").read_text()))
    learn(run, dp, owners)
    return _finish(run, config.id, domain_name, domain)


def learn(run: Run, dp: Dp | None = None, owners: Mapping[int, str] | None = None) -> None:
    """Both stages, or what is left of them."""
    measure(run, "base")  # before the first step the adapter changes nothing
    if dp:
        learn_privately(run, dp, owners)
        return
    if run.progress.stage == "warm_up":
        warm_up(run)
    if run.progress.stage == "rlvr" and run.settings.steps:
        reinforce(run)


def warm_up(run: Run) -> None:
    """Supervised steps on worked solutions, or bare answers where there are none; the rate falls to a tenth."""
    settings, progress = run.settings, run.progress
    rows = run.splits.train
    steps = settings.warm_up_steps
    for step in range(progress.step, steps):
        started = time.perf_counter()
        lr = settings.warm_up_lr * min(1.0, (step + 1) / LR_RAMP_STEPS) * (1 - 0.9 * step / steps)
        trees = [supervised_tree(run, example) for example in draw(rows, settings.warm_up_batch, step, settings.seed)]
        tokens = sum(len(tree.branches[0][0]) for tree in trees)
        progress.losses.append(update(run, trees, float(tokens), lr))
        after_step(run, "warm_up", step + 1, steps, started, f"loss {progress.losses[-1]:.2f}")
    if steps:
        validate(run, "warmup", steps)
        measure(run, "warmup")
    start_stage(run, "rlvr")


def reinforce(run: Run) -> None:
    """GRPO by the chosen engine; `rlvr/` holds the adapter that did best on the validation split."""
    engine = run.settings.engine
    if engine == "auto":
        engine = "trl" if torch.cuda.is_available() else "packed"
    if engine == "trl":
        from fedcompose_client.trl_engine import reinforce_with_trl

        reinforce_with_trl(run)
    else:
        reinforce_packed(run)
    run.model.load_adapter(str(run.folder / "rlvr"), "best")
    run.model.set_adapter("best")
    measure(run, "rlvr")
    run.progress.stage = "tested"


def reinforce_packed(run: Run) -> None:
    """Sample, score, one on-policy update; again."""
    settings, progress = run.settings, run.progress
    for step in range(progress.step, settings.steps):
        if step and step % VALIDATE_EVERY == 0:
            validate(run, "rlvr", step)
        started = time.perf_counter()
        examples = draw(run.splits.train, settings.prompts_per_step, step, settings.seed + 1)
        trees, rewards = explore(run, examples, step)
        progress.rewards.append(sum(rewards) / len(rewards))
        normaliser = float(len(rewards) * settings.max_new_tokens)
        lr = settings.lr * min(1.0, (step + 1) / LR_RAMP_STEPS)
        update(run, trees, normaliser, lr, settings.temperature)
        recent = progress.rewards[-5:]
        after_step(run, "rlvr", step + 1, settings.steps, started, f"reward {sum(recent) / len(recent):.2f}")
    validate(run, "rlvr", settings.steps)


def explore(run: Run, examples: Sequence[Example], step: int) -> tuple[list[Tree], list[float]]:
    """Sample a group of completions for every example: the trees that carry a gradient, and all rewards."""
    settings = run.settings
    prompts = [prompt_ids(run.tokenizer, run.task.prompt(example.question)) for example in examples]
    with merged(run.model):
        groups = sample(
            run.model, run.tokenizer, prompts, count=settings.samples_per_prompt, temperature=settings.temperature,
            max_new_tokens=settings.max_new_tokens, seed=settings.seed * 1_000_003 + step,
        )  # fmt: skip
    trees, rewards = [], []
    for prompt, example, group in zip(prompts, examples, groups, strict=True):
        scores = [run.task.reward(one.text, example.answer) if one.finished else 0.0 for one in group]
        rewards += scores
        if tree := advantage_tree(prompt, [one.tokens for one in group], scores):
            trees.append(tree)
            note_rewarded(run, example)
    return trees, rewards


def update(run: Run, trees: Sequence[Tree], normaliser: float, lr: float, temperature: float = 1.0) -> float:
    """One optimizer step on weighted completions; returns the loss."""
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    loss = backward(run.model, trees, normaliser, run.tokenizer.pad_token_id, temperature) if trees else 0.0
    if trees:
        torch.nn.utils.clip_grad_norm_(trainable(run.model), MAX_GRADIENT_NORM)
        run.optimizer.step()
        run.optimizer.zero_grad()
    return loss


def _open_run(
    folder: Path, site: Path, config: SiteConfig, domain: Domain, on_progress: OnProgress, fresh: bool, dp: Dp | None
) -> tuple[Run, Mapping[int, str] | None]:
    """The run, and where the unit of privacy is a user, whose each row is."""
    settings, base = domain.training, resolve_base(config.base)
    own = own_rows(site, domain, dp)
    wanted = made_from(base.digest, domain, dp, own)
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)  # also what was made of the old expert: its traces, gates and audit
    check_made_from(folder, wanted)
    write_atomic(folder / SETTINGS_FILE, wanted)
    return new_run(folder, settings, get_task(domain.task), own.splits, base.path, on_progress), own.owners


def keep(run: Run) -> str:
    """Write `expert/`: the better adapter by validation, or the last one where none may be chosen; returns its name."""
    best = {name: max(score for _, score in history) for name, history in run.progress.validation.items()}
    last = "rlvr" if run.settings.steps else "warmup"
    kept = max(best, key=lambda name: (best[name], name == "rlvr")) if best else last
    with new_folder(run.folder / "expert") as folder:
        for path in (run.folder / kept).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    return kept


def _finish(run: Run, site_id: str, domain_name: str, domain: Domain) -> dict[str, Any]:
    """Keep an adapter, and write `result.json`."""
    progress, kept = run.progress, keep(run)
    test = progress.test
    result = {
        "site": site_id,
        "domain": domain_name,
        "task": domain.task,
        "kept": kept,
        "rows": {
            "train": len(run.splits.train),
            "validation": len(run.splits.validation),
            "test": len(run.splits.test),
        },
        "accuracy": {name: accuracy(correct).as_dict() for name, correct in test.items()},
        "gain_over_base": paired_difference(test[kept], test["base"]).as_dict(),
        "gain_of_rlvr_over_warmup": (
            paired_difference(test["rlvr"], test["warmup"]).as_dict() if {"rlvr", "warmup"} <= set(test) else None
        ),
        "validation": progress.validation,
        "rewards": progress.rewards,
        "warm_up_losses": progress.losses,
        "seconds": progress.seconds,
        "settings": run.settings.model_dump(mode="json"),
        "dp": run.dp.model_dump(mode="json") if run.dp else None,
    }
    write_json(run.folder / "result.json", result)
    progress.stage = "done"
    save_checkpoint(run)
    run.report("done", 1, 1)
    return result
