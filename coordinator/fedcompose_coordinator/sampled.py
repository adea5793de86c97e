"""Lessons for a domain whose site ships no traces: the coordinator samples the expert itself (class A).

Input: an admitted expert and the domain's declared generator. Output: lessons, each verified. Nothing comes from a site
but the expert that it shipped anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from fedcompose.bases import Base, base_shapes
from fedcompose.contribution import VerifiedContribution
from fedcompose.model.controls import FixedRouter
from fedcompose.model.experts import read_expert
from fedcompose.model.lm import load_base, prompt_ids
from fedcompose.model.placement import compose_model
from fedcompose.model.sampling import sample
from fedcompose.tasks import generator_task, get_task, training
from fedcompose_coordinator.config import Compose, CoordinatorConfig, DeclaredDomain
from fedcompose_coordinator.lessons import Lesson, lessons_of

FIRST_SEED = 2_000_000  # apart from the seeds that sites distill on


def all_lessons(
    config: CoordinatorConfig,
    wanted: Compose,
    admitted: Sequence[VerifiedContribution],
    base: Base,
    on_done: Callable[[str, int], None],
) -> list[Lesson]:
    """The sites' traces; where a site shipped none, its expert sampled on the domain's declared generator.

    `on_done(site, n)` is told of every n prompts that were sampled.
    """
    lessons = lessons_of(admitted)
    covered = {lesson.domain for lesson in lessons}
    for expert in admitted:
        declared = config.domains.get(expert.domain)
        if expert.kind == "adapter" and expert.domain not in covered and declared:
            tell = partial(on_done, expert.site)
            lessons += sample_lessons(expert, declared, base, wanted, config.evaluate.max_new_tokens, tell)
    return lessons


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
