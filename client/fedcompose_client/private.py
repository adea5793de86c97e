"""Train with differential privacy: the same two stages, in steps that no single unit of the data can move far.

A unit is a question with all its rows or, with a `user` column, all rows of one person. Every step draws each unit
with a fixed probability, makes the gradient of each drawn unit alone, clips it, adds Gaussian noise to the sum and
divides by the nominal number of units. A unit is sampled, scored and differentiated by itself, so that nothing of
another unit can enter its part. What the optimizer does with the noisy sum is post-processing.

Nothing else may look at the data: there is no choice between adapters by validation, the last one is kept, and the test
accuracies stay on this machine. Noise and draws come from the operating system's entropy and are kept nowhere, so a
private run cannot be repeated. Floating point leaves a gap between this noise and the real numbers of the theorem; each
number is the sum of four, which closes the known way through it.

Source: M. Abadi et al., Deep learning with differential privacy, CCS 2016; N. Holohan and S. Braghin, Secure random
sampling in differential privacy, ESORICS 2021 (sums of Gaussians); NIST SP 800-226 for what has to be stated.
"""

from __future__ import annotations

import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedcompose.errors import ConfigError
from fedcompose.model.lm import merged, prompt_ids
from fedcompose.model.sampling import sample
from fedcompose.provenance import DpPhase, DpStatement
from fedcompose.tasks import Example
from fedcompose_client.accounting import Steps, epsilon_of, noise_for
from fedcompose_client.config import Dp, Training
from fedcompose_client.data import same_question
from fedcompose_client.packed import Tree, advantage_tree, backward
from fedcompose_client.run import (
    LR_RAMP_STEPS,
    Run,
    after_step,
    measure,
    note_rewarded,
    save_adapter,
    save_checkpoint,
    start_stage,
    supervised_tree,
    trainable,
)

CLIP_NORM = 0.1  # of one unit's gradient; small, so that most units are scaled to it and its exact value matters little
ROWS_PER_UNIT = 4  # of a unit with more rows, so many are drawn anew each time it is its turn
UNIFORM_BITS = 53  # of a float's mantissa

Unit = tuple[Example, ...]
Gradient = list[torch.Tensor]


def learn_privately(run: Run, request: Dp, owners: Mapping[int, str] | None = None) -> None:
    """Both stages of a run; its statement is in `run.dp`, its adapter in `rlvr/`, or `warmup/` without a second stage.

    Raises: ConfigError: `DP_UNSOUND`, `DP_EPSILON`. MissingError: `PACKAGE_MISSING`.
    """
    units = units_of(run.splits.train, owners)
    check_sound(run.model, run.settings, request, len(units))
    run.dp = state(run.settings, request, len(units))
    if run.progress.stage == "warm_up":
        _warm_up(run, units, run.dp)
    if run.progress.stage == "rlvr" and run.settings.steps:
        _reinforce(run, units, run.dp)


def units_of(rows: Sequence[Example], owners: Mapping[int, str] | None) -> list[Unit]:
    """Rows put together by whose they are, or by their question; `owners` is by `id` of the row."""
    units: dict[str, list[Example]] = {}
    for row in rows:
        units.setdefault(same_question(row.question) if owners is None else owners[id(row)], []).append(row)
    return [tuple(unit) for unit in units.values()]


def check_sound(model: Any, settings: Training, request: Dp, units: int) -> None:
    """Refuse what would make the stated guarantee untrue.

    Raises: ConfigError: `DP_UNSOUND`.
    """
    if settings.engine == "trl":
        raise _unsound("TRL shuffles rows instead of drawing them, and knows no unit", 'engine = "auto" or "packed"')
    if request.delta * units > 1:
        raise _unsound("delta allows to give away a whole unit", f"a delta of at most 1/{units}")
    if max(settings.warm_up_batch, settings.prompts_per_step) > public_count(units):
        raise _unsound("a step draws more units than there are", f"batches of at most {public_count(units)}")
    normed = any(isinstance(part, torch.nn.modules.batchnorm._BatchNorm) for part in model.modules())
    if normed or getattr(model.config, "router_aux_loss_coef", None):
        raise _unsound("the base lets the rows of a batch influence each other", "a base without experts or batch norm")


def _unsound(what: str, expected: str) -> ConfigError:
    return ConfigError(
        "DP_UNSOUND", f"no differential privacy with these settings: {what}", expected=expected,
        fix="correct site.toml or the options, or train without --dp-epsilon and state no guarantee",
    )  # fmt: skip


def public_count(units: int) -> int:
    """The number of units that is stated and computed with: two digits of it, rounded down."""
    step = int(10 ** max(0, len(str(units)) - 2))
    return units // step * step


def state(settings: Training, request: Dp, units: int) -> DpStatement:
    """The guarantee of a run with these settings, and the noise that it needs; a function of public numbers alone."""
    count = public_count(units)
    phases = [
        DpPhase(name="warm-up", batch=settings.warm_up_batch, steps=settings.warm_up_steps or 1),
        DpPhase(name="reinforcement", batch=settings.prompts_per_step, steps=settings.steps or 1),
    ]
    used = [phase for phase, steps in zip(phases, (settings.warm_up_steps, settings.steps), strict=True) if steps]
    cost = [Steps(phase.batch / count, phase.steps) for phase in used]
    noise = math.ceil(noise_for(request.epsilon, cost, request.delta) * 1e4) / 1e4
    return DpStatement(
        epsilon=math.ceil(epsilon_of(noise, cost, request.delta) * 1e3) / 1e3,
        delta=request.delta,
        unit=request.unit,
        neighbours="add-or-remove-one",
        trust_model="central",
        mechanism="clipped-gaussian",
        sampler="poisson",
        accountant="prv",
        noise_multiplier=noise,
        clip_norm=CLIP_NORM,
        units=count,
        phases=tuple(used),
        uncounted=("choice-of-settings", "number-of-units", "other-runs"),
    )


def _warm_up(run: Run, units: Sequence[Unit], dp: DpStatement) -> None:
    """Supervised steps on worked solutions; each row's loss is divided by a constant, not by the step's tokens."""
    settings, steps = run.settings, run.settings.warm_up_steps
    for step in range(run.progress.step, steps):
        started = time.perf_counter()
        lr = settings.warm_up_lr * min(1.0, (step + 1) / LR_RAMP_STEPS) * (1 - 0.9 * step / steps)
        drawn = draw_units(units, settings.warm_up_batch / dp.units)
        groups = [[supervised_tree(run, row) for row in unit] for unit in drawn]
        private_update(run, groups, settings.max_new_tokens, settings.warm_up_batch, dp, lr)
        after_step(run, "warm_up", step + 1, steps, started, f"{len(drawn)} units")
    if steps:
        save_adapter(run.model, run.folder / "warmup")
        measure(run, "warmup")
    start_stage(run, "rlvr")


def _reinforce(run: Run, units: Sequence[Unit], dp: DpStatement) -> None:
    """GRPO: the advantages of a group come from that group alone, its loss is divided by a constant."""
    settings, progress = run.settings, run.progress
    normaliser = settings.samples_per_prompt * settings.max_new_tokens
    for step in range(progress.step, settings.steps):
        started = time.perf_counter()
        drawn = draw_units(units, settings.prompts_per_step / dp.units)
        with merged(run.model):
            explored = [[explore_alone(run, row) for row in unit] for unit in drawn]
        rewards = [reward for unit in explored for _, scores in unit for reward in scores]
        progress.rewards.append(sum(rewards) / max(1, len(rewards)))
        groups = [[tree for tree, _ in unit if tree] for unit in explored]
        lr = settings.lr * min(1.0, (step + 1) / LR_RAMP_STEPS)
        private_update(run, groups, normaliser, settings.prompts_per_step, dp, lr, settings.temperature)
        recent = progress.rewards[-5:]
        after_step(run, "rlvr", step + 1, settings.steps, started, f"reward {sum(recent) / len(recent):.2f}")
    save_checkpoint(run)
    save_adapter(run.model, run.folder / "rlvr")
    measure(run, "rlvr")
    progress.stage = "tested"


def draw_units(units: Sequence[Unit], rate: float) -> list[Unit]:
    """Each unit with probability `rate`, whatever happens to the others; of a large one, some of its rows."""
    chosen = [unit for unit, number in zip(units, uniform(len(units)), strict=True) if number < rate]
    picked = secrets.SystemRandom()
    return [unit if len(unit) <= ROWS_PER_UNIT else tuple(picked.sample(unit, ROWS_PER_UNIT)) for unit in chosen]


def explore_alone(run: Run, example: Example) -> tuple[Tree | None, list[float]]:
    """One group, sampled in a batch of its own: its gradient's tree, if it has one, and its rewards."""
    settings = run.settings
    prompt = prompt_ids(run.tokenizer, run.task.prompt(example.question))
    (group,) = sample(
        run.model, run.tokenizer, [prompt], count=settings.samples_per_prompt, temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens, seed=secrets.randbits(63),
    )  # fmt: skip
    scores = [run.task.reward(one.text, example.answer) if one.finished else 0.0 for one in group]
    tree = advantage_tree(prompt, [one.tokens for one in group], scores)
    if tree:
        note_rewarded(run, example)
    return tree, scores


def private_update(
    run: Run, groups: Sequence[Sequence[Tree]], normaliser: float, batch: int, dp: DpStatement, lr: float,
    temperature: float = 1.0,
) -> None:  # fmt: skip
    """One optimizer step on the clipped, noisy sum over units; an empty draw makes a step of noise alone."""
    weights = trainable(run.model)

    def gradient(trees: Sequence[Tree]) -> Gradient:
        return gradient_alone(run.model, weights, trees, normaliser, run.tokenizer.pad_token_id, temperature)

    noisy = noisy_sum(groups, gradient, [weight.shape for weight in weights], dp.clip_norm, dp.noise_multiplier)
    for weight, part in zip(weights, noisy, strict=True):
        weight.grad = (part / batch).to(weight.device, weight.dtype)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    run.optimizer.zero_grad()


def noisy_sum(
    groups: Sequence[Sequence[Tree]], gradient: Callable[[Sequence[Tree]], Gradient], shapes: Sequence[torch.Size],
    clip_norm: float, noise: float,
) -> Gradient:  # fmt: skip
    """Σ of every unit's clipped gradient, plus noise of `noise` times the most that one unit can add."""
    total = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    for trees in filter(None, groups):
        for part, added in zip(total, clipped(gradient(trees), clip_norm), strict=True):
            part += added
    return [part + noise * clip_norm * torch.from_numpy(normal(part.numel())).view(part.shape) for part in total]


def gradient_alone(
    model: Any, weights: Sequence[torch.nn.Parameter], trees: Sequence[Tree], normaliser: float, pad_id: int,
    temperature: float = 1.0,
) -> Gradient:  # fmt: skip
    """The gradient of one unit's loss, computed in passes that hold nothing else."""
    model.zero_grad(set_to_none=True)
    for tree in trees:
        backward(model, [tree], normaliser, pad_id, temperature)
    return [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]


def clipped(gradient: Gradient, norm: float) -> Gradient:
    """The gradient as float64 on the CPU, shortened to `norm` where it is longer; nothing where it is not a number."""
    parts = [part.detach().to("cpu", torch.float64) for part in gradient]
    length = math.sqrt(sum(float(part.square().sum()) for part in parts))
    if not math.isfinite(length):
        return [torch.zeros_like(part) for part in parts]
    return [part * min(1.0, norm / max(length, 1e-300)) for part in parts]


def normal(count: int) -> NDArray[np.float64]:
    """Standard normal numbers, each the sum of four halves."""
    radius = np.sqrt(-2 * np.log(1 - uniform(2 * count)))
    angle = 2 * np.pi * uniform(2 * count)
    pairs = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]).reshape(4, count)
    return np.asarray(pairs.sum(0) / 2)


def uniform(count: int) -> NDArray[np.float64]:
    """Numbers in [0, 1) from the operating system's entropy: no generator, so no seed that could be kept."""
    words = np.frombuffer(os.urandom(8 * count), dtype=np.uint64)
    return np.asarray((words >> np.uint64(64 - UNIFORM_BITS)) * 2.0**-UNIFORM_BITS)
