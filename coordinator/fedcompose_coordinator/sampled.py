"""Lessons for a domain whose site ships no traces: the coordinator samples the expert itself (class A).

Input: an admitted expert and the domain's declared generator. Output: lessons, each verified. Nothing comes from a site
but the expert that it shipped anyway.
"""

from __future__ import annotations

from collections.abc import Callable

from fedcompose.bases import Base, base_shapes
from fedcompose.contribution import VerifiedContribution
from fedcompose.model.composed import compose_model
from fedcompose.model.experts import read_expert
from fedcompose.model.lm import load_base, prompt_ids
from fedcompose.model.router import FixedRouter
from fedcompose.model.sampling import sample
from fedcompose.tasks import generator_task, get_task, training
from fedcompose_coordinator.config import Compose, DeclaredDomain
from fedcompose_coordinator.lessons import Lesson

FIRST_SEED = 2_000_000  # apart from the seeds that sites distill on


def sample_lessons(
    expert: VerifiedContribution,
    domain: DeclaredDomain,
    base: Base,
    settings: Compose,
    max_new_tokens: int,
    on_done: Callable[[int], None],
) -> list[Lesson]:
    """Verified completions of one expert on its domain's generator, at most one per prompt."""
    model, tokenizer = load_base(base.path)
    compose_model(model, [read_expert(expert, base_shapes(base))], FixedRouter(0, 1))
    task = get_task(generator_task(domain.generator))
    examples = training(domain.generator, domain.config, settings.sampled_prompts, FIRST_SEED)
    prompts = [task.prompt(example.question) for example in examples]
    groups = sample(
        model, tokenizer, [prompt_ids(tokenizer, prompt) for prompt in prompts], max_new_tokens=max_new_tokens,
        temperature=settings.temperature, seed=settings.seed, on_done=on_done,
    )  # fmt: skip
    return [
        Lesson(expert.domain, prompt, one.text)
        for prompt, example, (one,) in zip(prompts, examples, groups, strict=True)
        if one.finished and task.is_correct(one.text, example.answer)
    ]
