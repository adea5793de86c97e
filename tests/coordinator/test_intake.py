from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import pytest

from fedcompose.errors import ConfigError, RefusedError
from tests.federation_sim import FederationSim


def test_admits_every_kind_from_every_site_and_lists_them(sim: FederationSim) -> None:
    made = [each for site in sim.sites for each in sim.contribute(site)]
    receipts = sim.receive()
    assert [receipt.outcome for receipt in receipts] == ["admitted"] * 4
    assert {each.dir_hash for each in sim.admitted()} == {each.dir_hash for each in made}
    assert [(each.site, each.kind) for each in sim.admitted()] == [
        ("site-a", "adapter"), ("site-a", "traces"), ("site-b", "adapter"), ("site-b", "traces"),
    ]  # fmt: skip


def test_the_store_is_private_and_read_only_and_the_quarantine_is_empty_again(sim: FederationSim) -> None:
    sim.contribute("site-a")
    sim.receive(sim.sites["site-a"].outbox)
    store = sim.coordinator_home / "store"
    assert stat.S_IMODE(store.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in store.glob("*/*")} == {0o400}
    assert list((sim.coordinator_home / "quarantine").iterdir()) == []


def test_changing_the_original_after_intake_changes_nothing(sim: FederationSim) -> None:
    adapter, _ = sim.contribute("site-a")
    sim.receive(adapter.path)
    (adapter.path / "adapter_config.json").write_bytes(b"{}")
    assert [each.dir_hash for each in sim.admitted()] == [adapter.dir_hash]


def test_receiving_the_same_folder_again_is_no_error(sim: FederationSim) -> None:
    adapter, _ = sim.contribute("site-a")
    first, second = (sim.receive(adapter.path)[0] for _ in range(2))
    assert (first.outcome, second.outcome) == ("admitted", "already admitted")
    assert second.contribution == first.contribution


def test_an_older_contribution_is_a_replay_and_a_newer_one_takes_over(sim: FederationSim, tmp_path: Path) -> None:
    first, _ = sim.contribute("site-a")
    shutil.copytree(first.path, tmp_path / "old")
    newer, _ = sim.contribute("site-a")
    assert newer.provenance.sequence > first.provenance.sequence
    sim.receive(newer.path)
    refusal = sim.receive(tmp_path / "old")[0].refusal
    assert refusal is not None and refusal.code == "REPLAYED"
    assert [each.dir_hash for each in sim.admitted()] == [newer.dir_hash]


def test_a_refusal_is_kept_with_its_reason_and_does_not_stop_the_others(sim: FederationSim) -> None:
    bad, good = sim.contribute("site-a")[0], sim.contribute("site-b")[0]
    (bad.path / "adapter_config.json").write_bytes(b"{}")
    refused, admitted = sim.receive(bad.path, good.path)
    assert (refused.outcome, admitted.outcome) == ("refused", "admitted")
    assert refused.kept is not None and refused.kept.parent == sim.coordinator_home / "quarantine"
    assert json.loads((refused.kept / "reason.json").read_bytes())["code"] == "FILE_CHANGED"
    assert (refused.kept / "adapter_config.json").read_bytes() == b"{}"


def test_an_altered_store_is_noticed(sim: FederationSim) -> None:
    adapter, _ = sim.contribute("site-a")
    sim.receive(adapter.path)
    path = sim.coordinator_home / "store" / adapter.dir_hash / "adapter_config.json"
    path.chmod(0o600)
    path.write_bytes(path.read_bytes().replace(b"8", b"9"))
    with pytest.raises(RefusedError) as refusal:
        sim.admitted()
    assert refusal.value.code == "FILE_CHANGED"


def test_a_folder_swapped_in_the_store_is_noticed(sim: FederationSim) -> None:
    ours, theirs = (sim.contribute(site)[0] for site in sim.sites)
    sim.receive(ours.path, theirs.path)
    store = sim.coordinator_home / "store"
    shutil.rmtree(store / ours.dir_hash)
    shutil.copytree(store / theirs.dir_hash, store / ours.dir_hash)
    with pytest.raises(RefusedError, match="does not hold what was admitted"):
        sim.admitted()


def test_a_crash_between_store_and_state_is_repaired_by_receiving_again(sim: FederationSim) -> None:
    adapter, _ = sim.contribute("site-a")
    sim.receive(adapter.path)
    (sim.coordinator_home / "state.json").unlink()
    assert sim.admitted() == []
    assert sim.receive(adapter.path)[0].outcome == "admitted"
    assert [each.dir_hash for each in sim.admitted()] == [adapter.dir_hash]


def test_a_folder_that_is_not_there_is_a_usage_error(sim: FederationSim, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        sim.receive(tmp_path / "nowhere")
    assert error.value.code == "FOLDER_MISSING"
    assert not (sim.coordinator_home / "state.json").exists()


def test_an_answer_to_a_call_that_was_never_made_is_refused(sim: FederationSim) -> None:
    from datetime import timedelta

    from fedcompose.call import make_call, read_own_call

    def call(nonce: bytes) -> bytes:
        deadline = sim.now + timedelta(days=1)
        return make_call(
            sim.federation, sim.coordinator, "tiny", ["adapter"], deadline=deadline, now=sim.now, nonce=nonce
        )

    ours, foreign = call(b"1" * 32), call(b"2" * 32)
    calls = sim.coordinator_home / "calls"
    calls.mkdir()
    (calls / "ours.json").write_bytes(ours)
    (answer,) = sim.contribute("site-a", call=read_own_call(foreign))
    refusal = sim.receive(answer.path)[0].refusal
    assert refusal is not None and refusal.code == "CALL_UNKNOWN"
    (answer,) = sim.contribute("site-a", call=read_own_call(ours))
    assert sim.receive(answer.path)[0].outcome == "admitted"
