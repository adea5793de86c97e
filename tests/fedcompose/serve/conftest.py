from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedcompose.release import VerifiedRelease
from fedcompose.serve.engine import Engine
from tests.federation_sim import ATTENTION, FederationSim, make_federation
from tests.tiny_experts import make_tiny_expert


@pytest.fixture(scope="session")
def talking_experts(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Experts strong enough to make the tiny base babble, each in its own way, and an attention LoRA."""
    folder = tmp_path_factory.mktemp("experts")
    return {
        "site-a": make_tiny_expert(tiny_base, folder / "a", seed=1),
        "site-b": make_tiny_expert(tiny_base, folder / "b", seed=2),
        "attention": make_tiny_expert(tiny_base, folder / "attention", seed=3, target_modules=ATTENTION),
    }


@pytest.fixture(scope="session")
def talking_sim(
    tiny_base: Path, talking_experts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> FederationSim:
    folder = tmp_path_factory.mktemp("talking")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDCOMPOSE_HOME", str(folder / "home"))
        sim = make_federation(folder / "federation", tiny_base, talking_experts)
        sim.released()
    return sim


@pytest.fixture(scope="session")
def release(talking_sim: FederationSim) -> VerifiedRelease:
    from fedcompose.release import ReceivedRelease, verify_release

    folder = talking_sim.coordinator_home / "release"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDCOMPOSE_HOME", str(talking_sim.folder.parent / "home"))
        return verify_release(ReceivedRelease(folder), [talking_sim.root.keyid])


@pytest.fixture(scope="session")
def engine(release: VerifiedRelease, talking_sim: FederationSim) -> Iterator[Engine]:
    engine = Engine(release, talking_sim.base, torch.float32)
    yield engine
    engine.close()
