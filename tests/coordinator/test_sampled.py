from __future__ import annotations

from typing import Any

import pytest

from fedcompose.bases import Base
from fedcompose.contribution import VerifiedContribution
from fedcompose_coordinator import sampled
from fedcompose_coordinator.config import CoordinatorConfig, DeclaredDomain
from fedcompose_coordinator.lessons import Lesson


def test_only_an_expert_without_traces_and_with_a_declared_generator_is_sampled(
    contributions: list[VerifiedContribution], base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """alpha has traces; beta has none, but a generator, as long as its domain is declared."""
    asked: list[str] = []

    def sample(expert: VerifiedContribution, *further: Any) -> list[Lesson]:
        asked.append(expert.domain)
        further[-1](3)
        return [Lesson(expert.domain, "sampled", "A")]

    monkeypatch.setattr(sampled, "lessons_of", lambda admitted: [Lesson("alpha", "shipped", "A")])
    monkeypatch.setattr(sampled, "sample_lessons", sample)
    domains = {each.domain: DeclaredDomain(site=each.site, generator="gcd") for each in contributions}
    config = CoordinatorConfig(id="hub", base="tiny", key="key", domains=domains)
    told: list[tuple[str, int]] = []

    found = sampled.all_lessons(config, config.compose, contributions, base, lambda *each: told.append(each))

    assert [(each.domain, each.prompt) for each in found] == [("alpha", "shipped"), ("beta", "sampled")]
    assert asked == ["beta"] and told == [("site-beta", 3)]
    undeclared = config.model_copy(update={"domains": {}})
    assert len(sampled.all_lessons(undeclared, config.compose, contributions, base, lambda *each: None)) == 1


def test_a_sampled_lesson_was_checked_and_comes_from_the_expert(
    contributions: list[VerifiedContribution], base: Base
) -> None:
    """An expert that writes one letter for ever answers nothing, so nothing is learned from it."""
    config = CoordinatorConfig(id="hub", base="tiny", key="key")
    wanted = config.compose.model_copy(update={"sampled_prompts": 4})
    domain = DeclaredDomain(site="site-alpha", generator="gcd")
    told: list[int] = []
    assert sampled.sample_lessons(contributions[0], domain, base, wanted, 6, told.append) == []
    assert sum(told) == 4
