"""Every byte of a small contribution, a small release and a federation file, changed in two ways, each refused.

By default every nth byte is changed, with n small; `pytest -m slow` changes every one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcompose.contribution import ReceivedContribution, verify_contribution
from fedcompose.errors import RefusedError
from fedcompose.federation_file import verify_federation
from fedcompose.release import ReceivedRelease, verify_release
from tests.attacks.attack import copied
from tests.attacks.every_byte import changes, small_federation
from tests.attacks.federations import two_roots
from tests.federation_files import NOW
from tests.federation_sim import FederationSim


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> FederationSim:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDCOMPOSE_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setattr(os, "fsync", lambda descriptor: None)
        return small_federation(tmp_path_factory.mktemp("federation"), tiny_base)


def every(step: int) -> pytest.MarkDecorator:
    """By default every `step`th byte."""
    return pytest.mark.parametrize("step", [step, pytest.param(1, marks=pytest.mark.slow)])


def refused(judge: Callable[[], object], what: str) -> None:
    with pytest.raises(RefusedError) as caught:
        judge()
        pytest.fail(f"accepted: {what}")
    assert caught.value.code


def refused_everywhere(folder: Path, judge: Callable[[], object], step: int) -> int:
    """Change bytes of all files below `folder`, one at a time; how many changes were tried."""
    judge()
    tried = 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        original = path.read_bytes()
        for position in range(0, len(original), step):
            for changed in changes(original, position):
                path.write_bytes(changed)
                refused(judge, f"{path.relative_to(folder)} at {position}")
                tried += 1
        path.write_bytes(original)
    judge()
    return tried


@every(17)
def test_of_a_contribution(small: FederationSim, tmp_path: Path, step: int) -> None:
    folder = copied(small.sites["site-a"].outbox / "adapter", tmp_path / "adapter")
    federation = small.federation
    tried = refused_everywhere(
        folder, lambda: verify_contribution(ReceivedContribution(folder), federation, now=small.now), step
    )
    assert tried > 8000 // step


@every(97)
def test_of_a_release(small: FederationSim, tmp_path: Path, step: int) -> None:
    folder = copied(small.coordinator_home / "release", tmp_path / "release")
    tried = refused_everywhere(
        folder, lambda: verify_release(ReceivedRelease(folder), [small.root.keyid], small.now), step
    )
    assert tried > 30_000 // step


@every(7)
def test_of_a_federation_file_that_two_roots_signed(step: int) -> None:
    """Both signatures are asked for, so that no byte of either may be lost."""
    made = two_roots()
    known = [root.keyid for root in made.roots]
    verify_federation(made.current, root_fingerprints=known, now=NOW)
    for position in range(0, len(made.current), step):
        for changed in changes(made.current, position):
            refused(
                lambda changed=changed: verify_federation(changed, root_fingerprints=known, now=NOW),  # type: ignore[misc]
                f"position {position}",
            )
