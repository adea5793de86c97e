from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.federation_sim import FederationSim

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def private_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has its own cache and trust state."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("FEDCOMPOSE_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import make_tiny_base

    return make_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def random_experts(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from tests.federation_sim import make_random_experts

    return make_random_experts(tiny_base, tmp_path_factory.mktemp("experts"))


@pytest.fixture
def sim(
    tmp_path: Path, tiny_base: Path, random_experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> FederationSim:
    """A federation with two sites that have trained but not yet contributed."""
    from tests.federation_sim import make_federation

    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a test outlives no power cut
    return make_federation(tmp_path / "federation", tiny_base, random_experts)


@pytest.fixture(scope="session")
def teachable_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import make_teachable_base

    return make_teachable_base(tmp_path_factory.mktemp("base") / "teachable")
