from __future__ import annotations

from pathlib import Path

import pytest

from fedcompose.bases import Base
from fedcompose.contribution import VerifiedContribution
from fedcompose_coordinator.lessons import Lesson


@pytest.fixture(scope="session")
def lively_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.coordinator.letters import make_lively_base

    return make_lively_base(tiny_base, tmp_path_factory.mktemp("base") / "lively")


@pytest.fixture(scope="session")
def contributions(lively_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[VerifiedContribution]:
    """An expert that writes A and one that writes B."""
    from tests.coordinator.letters import LETTERS, admit, train_expert

    store = tmp_path_factory.mktemp("store")
    return [admit(train_expert(lively_base, store / domain, domain)) for domain in LETTERS]


@pytest.fixture
def base(lively_base: Path) -> Base:
    from fedcompose.bases import resolve_base

    return resolve_base(lively_base)


@pytest.fixture(scope="session")
def lessons() -> list[Lesson]:
    from tests.coordinator.letters import LETTERS, make_lessons

    return [lesson for domain in LETTERS for lesson in make_lessons(domain, 12)]
