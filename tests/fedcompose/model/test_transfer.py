"""A composition on another model than the one it was made for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fedcompose
from fedcompose.bases import resolve_base
from fedcompose.errors import RefusedError
from fedcompose.model.composed import assemble
from tests.federation_sim import FederationSim
from tests.tiny import make_tiny_base

IDS = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(8))


@torch.no_grad()
def test_a_release_transfers_to_a_base_of_the_same_shapes(sim: FederationSim, tmp_path: Path) -> None:
    release = sim.released()
    other = make_tiny_base(tmp_path / "other", seed=1)

    with pytest.raises(RefusedError) as refusal:
        fedcompose.load(release.path, [sim.root.keyid], base=other)
    assert refusal.value.code == "BASE_MISMATCH"

    model, _ = fedcompose.load(release.path, [sim.root.keyid], base=other, transfer=True)
    experts, candidate = [each.path for each in sim.experts()], sim.coordinator_home / "candidate"
    there, here = (assemble(base, experts, candidate)[0] for base in (resolve_base(other), sim.base))
    assert torch.equal(model(IDS).logits, there(IDS).logits)
    assert (model(IDS).logits - here(IDS).logits).abs().max() > 1e-2


@pytest.mark.parametrize(("shape", "reason"), [({"hidden": 64}, "wrong shape"), ({"layers": 3}, "missing")])
def test_a_release_is_not_put_on_a_base_that_it_does_not_fit(
    shape: dict[str, int], reason: str, sim: FederationSim, tmp_path: Path
) -> None:
    release = sim.released()
    other = make_tiny_base(tmp_path / "other", **shape)
    with pytest.raises(RefusedError) as refusal:
        fedcompose.load(release.path, [sim.root.keyid], base=other, transfer=True)
    assert refusal.value.code == "ADAPTER_TENSORS" and reason in refusal.value.diagnostics()
