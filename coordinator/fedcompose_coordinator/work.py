"""What every way to compose is given: the base with the experts in it, the lessons as token ids, who owns what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from fedcompose.adapter import CONFIG_FILE, parse_config
from fedcompose.bases import Base, base_shapes
from fedcompose.contribution import VerifiedContribution
from fedcompose.gates import GATES_FILE, Gates, read_gates
from fedcompose.model.composed import add_attention
from fedcompose.model.experts import Expert, read_expert
from fedcompose.model.learned import make_router
from fedcompose.model.lm import load_base
from fedcompose.model.placement import compose_model, decision_points
from fedcompose.model.router import RoutingRecord
from fedcompose_coordinator.completion import Pass, make_pass
from fedcompose_coordinator.lessons import Lesson, Row, encode, within_budget
from fedcompose_coordinator.methods import ComposeSettings, Recipe
from fedcompose_coordinator.refine import refine


@dataclass(frozen=True)
class Work:
    """`owners` are the experts (rows of the router) of each domain; `attention` what is trainable of its LoRA."""

    model: Any
    tokenizer: Any
    experts: Sequence[Expert]
    rows: Sequence[Row]
    domains: Sequence[str]
    owners: Sequence[Sequence[int]]
    recipe: Recipe
    seed: int
    attention: Sequence[nn.Parameter] = ()
    gates: Sequence[Gates | None] = ()  # what each expert's site shipped

    @property
    def settings(self) -> ComposeSettings:
        return self.recipe.settings

    @property
    def learned(self) -> list[nn.Parameter]:
        """What is trainable of the router."""
        return [each for each in self.model.router.parameters() if each.requires_grad] if self.experts else []

    @contextmanager
    def recording(self) -> Iterator[RoutingRecord]:
        """Keep what is decided inside the block; nothing, where there are no experts."""
        if not self.experts:
            yield RoutingRecord()
            return
        with self.model.routing.recording() as record:
            yield record

    def rows_of(self, domain: int) -> list[Row]:
        return [row for row in self.rows if row.domain == domain]

    def read(self, rows: Sequence[Row]) -> Pass:
        """One forward pass over these rows."""
        return make_pass(self.model, rows, self.tokenizer.pad_token_id)


def prepare(
    used: Sequence[VerifiedContribution], lessons: Sequence[Lesson], base: Base, recipe: Recipe, seed: int, device: Any
) -> Work:
    """Load the base, give it an attention LoRA if the recipe wants one, and put experts and router in.

    Raises: ConfigError: `COMPOSE_NO_LESSONS`, `COMPOSE_NO_ATTENTION`, those of `make_router`.
            RefusedError: `FILE_CHANGED`; `COMPOSE_TARGETS`, `COMPOSE_SHAPES` for an expert of another base.
    """
    model: Any
    model, tokenizer = load_base(base.path)
    model.to(device)
    domains = sorted({lesson.domain for lesson in lessons} | {each.domain for each in used})
    owners = [[index for index, each in enumerate(used) if each.domain == domain] for domain in domains]
    rows = encode(tokenizer, lessons, domains) if recipe.needs_lessons else []
    rows = within_budget(rows, recipe.settings.tokens_per_domain)
    experts = [read_expert(each, base_shapes(base)) for each in used]
    if recipe.settings.expert_steps:
        own = [[row for row in rows if index in owners[row.domain]] for index in range(len(used))]
        experts = refine(model, experts, own, tokenizer.pad_token_id, recipe.settings, seed)
    rank = recipe.attention_rank
    attention = add_attention(model, rank, 2 * rank, seed) if rank else []
    if experts and recipe.router:
        points = decision_points(model, experts, recipe.router.decides)
        compose_model(model, experts, make_router(recipe.router, points, len(experts), seed), recipe.router.decides)
    gates = [shipped_gates(each) for each in used]
    return Work(model, tokenizer, experts, rows, domains, owners, recipe, seed, attention, gates)


def shipped_gates(contribution: VerifiedContribution) -> Gates | None:
    """The gates in an adapter's contribution, if its site shipped some.

    Raises: RefusedError: `FILE_CHANGED`.
    """
    if GATES_FILE not in contribution.digests:
        return None
    config = parse_config(contribution.read(CONFIG_FILE))
    return read_gates(contribution.read(GATES_FILE), config, None)
