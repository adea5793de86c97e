from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from fedcompose.bases import base_shapes
from fedcompose.contribution import CLOCK_SKEW, ReceivedContribution, VerifiedContribution, verify_contribution
from fedcompose.errors import RefusedError
from tests.attacks import attack
from tests.federation_sim import FederationSim


def verify(sim: FederationSim, folder: Path, after: timedelta = timedelta(0)) -> VerifiedContribution:
    return verify_contribution(
        ReceivedContribution(folder), sim.federation, now=sim.now + after, base_shapes=base_shapes(sim.base)
    )


def test_a_verified_contribution_says_who_made_what(sim: FederationSim) -> None:
    adapter, traces = sim.contribute("site-a")
    found = verify(sim, adapter.path)
    assert found == adapter
    assert (found.site, found.domain, found.kind) == ("site-a", "clock", "adapter")
    assert found.keyid == sim.sites["site-a"].signer.keyid
    assert len(verify(sim, traces.path).traces()) == 3


def test_the_digest_is_the_one_a_shell_computes(sim: FederationSim) -> None:
    import subprocess

    adapter, _ = sim.contribute("site-a")
    command = "find . -type f ! -name model.sig | cut -c3- | LC_ALL=C sort | xargs -r sha256sum | sha256sum"
    shell = subprocess.run(["bash", "-c", command], cwd=adapter.path, capture_output=True, text=True, check=True)
    assert shell.stdout.split()[0] == adapter.dir_hash


def code_of(sim: FederationSim, folder: Path) -> str | None:
    try:
        verify(sim, folder)
    except RefusedError as error:
        return error.code
    return None


def sign(sim: FederationSim, folder: Path) -> None:
    """All that lies in the folder, by site a, with claims about just these files."""
    attack.Contribution(sim, folder, sim.sites["site-a"].signer).sign()


def test_a_readme_may_come_along_if_it_is_signed(sim: FederationSim) -> None:
    adapter, _ = sim.contribute("site-a")
    (adapter.path / "README.md").write_text("about this expert")
    assert code_of(sim, adapter.path) == "FILE_UNSIGNED"
    sign(sim, adapter.path)
    assert code_of(sim, adapter.path) is None


def test_no_other_file_may_come_along_even_if_it_is_signed(sim: FederationSim) -> None:
    adapter, _ = sim.contribute("site-a")
    (adapter.path / "adapter_model.bin").write_bytes(b"x")
    sign(sim, adapter.path)
    assert code_of(sim, adapter.path) == "FILE_UNEXPECTED"


def test_a_base_must_be_one_of_the_federation_s(sim: FederationSim) -> None:
    adapter, _ = sim.contribute("site-a")
    bases = sim.federation.base_models
    for changed in ({"dir_hash": "0" * 64}, {"name": "another"}):
        federation = sim.federation.model_copy(update={"base_models": (bases[0].model_copy(update=changed),)})
        with pytest.raises(RefusedError) as refusal:
            verify_contribution(ReceivedContribution(adapter.path), federation, now=sim.now)
        assert refusal.value.code == "BASE_MISMATCH"


@pytest.mark.parametrize(
    ("ahead", "code"), [(CLOCK_SKEW, None), (CLOCK_SKEW + timedelta(seconds=1), "CONTRIBUTION_FROM_FUTURE")]
)
def test_a_site_s_clock_may_be_a_little_ahead(sim: FederationSim, ahead: timedelta, code: str | None) -> None:
    sim.now += ahead
    adapter, _ = sim.contribute("site-a")
    sim.now -= ahead
    assert code_of(sim, adapter.path) == code


def test_reading_later_notices_a_change(sim: FederationSim) -> None:
    adapter, _ = sim.contribute("site-a")
    assert adapter.read("adapter_config.json").startswith(b"{")
    (adapter.path / "adapter_config.json").write_bytes(b"{}")
    with pytest.raises(RefusedError, match="not the file that was signed"):
        adapter.read("adapter_config.json")


def test_an_expired_contribution_or_key_does_not_count(sim: FederationSim) -> None:
    adapter, _ = sim.contribute("site-a")
    for after, code in (
        (timedelta(days=29), None),
        (timedelta(days=30), "CONTRIBUTION_EXPIRED"),
        (timedelta(days=366), "KEY_EXPIRED"),
    ):
        if code is None:
            verify(sim, adapter.path, after)
            continue
        with pytest.raises(RefusedError) as refusal:
            verify(sim, adapter.path, after)
        assert refusal.value.code == code
